"""The verifier `hidden`: both steps leave a model in about the same states.

Compared by cosine are the means of the last hidden states (after the final norm) over the tokens of each step, read
behind the same prefix. The model is the one of a pooling server, whose vocabulary is the target's:

    vllm serve MODEL --runner pooling --pooler-config.task token_embed

Without the option vLLM's server embeds whole texts, refuses the task, and no step agrees.

Cost: two prefills of prefix and step in one request, which read no prefix cache, and their states come back for every
token of them: 2 x (prefix + step) x hidden size x 2 bytes (bfloat16), 33 MB at 2,000 tokens of 4,096. Leaves out:
models that have no token-wise states in vLLM.

Host symbols: vLLM's `/pooling` (entrypoints/pooling/pooling): `PoolingCompletionRequest`, `encoding_format=bytes`, the
header `metadata`.

Source: ours, as the paper's (arXiv 2506.19830) embedding verifier, without an embedding model of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

from rl_accel.errors import LookaheadError
from rl_accel.lookahead.model_verifier import MAX_ERROR_CHARS, ModelVerifier, read_json
from rl_accel.lookahead.step import Step

PATH = "/pooling"
THRESHOLD = 0.99
TIMEOUT_S = 120.0


class Hidden(ModelVerifier):
    """Agrees if the cosine of the two steps' mean states is at least the threshold."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        threshold: float = THRESHOLD,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ):
        """
        Args:
            url: of the pooling server, without a path.
            threshold: least cosine.
            model: its name there; None: whatever is served.
            timeout_s: seconds.
        """
        super().__init__(session, url.rstrip("/") + PATH, timeout_s, api_key)
        self.threshold, self.model = threshold, model

    async def _compare(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        a, b = await self.mean_states(prefix_ids, (draft.token_ids, target.token_ids))
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        if not 0 < norms < np.inf:
            raise LookaheadError(f"{self.url} answers states without a finite length: {norms}")
        return float(a @ b) / norms >= self.threshold

    async def mean_states(self, prefix_ids: Sequence[int], steps: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return for each step after the prefix the mean state of its tokens, float64 [hidden_size].

        Raises:
            LookaheadError: if the server refuses, or answers other than a state for each token.
        """
        body: dict[str, Any] = {
            "input": [[*prefix_ids, *step] for step in steps], "task": "token_embed", "use_activation": False,
            "add_special_tokens": False, "encoding_format": "bytes", "embed_dtype": "bfloat16", "endianness": "little",
        }  # fmt: skip
        if self.model is not None:
            body["model"] = self.model
        lengths = [len(prefix_ids) + len(step) for step in steps]
        self.cost.tokens += sum(lengths)
        headers, data = await self._post(body)
        metadata = read_json(self.url, headers.get("metadata", ""))
        try:
            items = sorted(metadata["data"], key=lambda item: item["index"])
            spans = [(item["start"], item["end"], *item["shape"]) for item in items]
            if [shape for _, _, *shape in spans] != [[length, spans[0][3]] for length in lengths]:
                raise LookaheadError(
                    f"{self.url} answers states of {[span[2:] for span in spans]} for {lengths} tokens"
                )
            return [_mean(data[a:b], size, len(step)) for (a, b, _, size), step in zip(spans, steps, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            text = str(metadata)[:MAX_ERROR_CHARS]
            raise LookaheadError(f"{self.url} answers no states: {error!r} in {text}") from error


def _mean(states: bytes, hidden_size: int, num_tokens: int) -> np.ndarray:
    """Return the mean of the last `num_tokens` states, which are bfloat16 [tokens, hidden_size]."""
    tail = np.frombuffer(states, "<u2").reshape(-1, hidden_size)[-num_tokens:]
    return (tail.astype("<u4") << 16).view("<f4").mean(axis=0, dtype=np.float64)
