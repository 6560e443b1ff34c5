"""What verifiers that ask a model share: the same tokens agree unasked, and a server that fails agrees to nothing.

A text never fails by its verifier. A verdict that does not come in time, or is none, keeps the target's own step, is
counted, and the first one is logged with its reason.

Cost: a verdict delays its step by what the model takes; `cost` adds it up. Leaves out: giving up on a server that
fails again and again; where that makes drafts slower than none, the switch serves texts without them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from rl_accel.errors import LookaheadError
from rl_accel.lookahead.step import Cost, Step

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 300


class ModelVerifier:
    """Base of verifiers over a server; a subclass has `_compare`."""

    lossless = False
    needs_logprobs = False
    """Whether the target should be asked for `logprobs`."""

    def __init__(self, session: aiohttp.ClientSession, url: str, timeout_s: float, api_key: str | None = None):
        """
        Args:
            session: the caller's, and so are its limits.
            url: the server's, with the path.
            timeout_s: seconds in which a verdict must be there.
            api_key: sent as a bearer token; None: nothing is sent.
        """
        self.session, self.url, self.timeout_s = session, url, timeout_s
        self.cost = Cost()
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def agree(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        """As `Verifier.agree`; False where no verdict can be had."""
        if draft.token_ids == target.token_ids:
            return True
        clock = asyncio.get_running_loop().time
        started = clock()
        self.cost.calls += 1
        try:
            return await asyncio.wait_for(self._compare(prefix_ids, draft, target), self.timeout_s)
        except asyncio.TimeoutError as error:
            self._fail(str(error) or f"no answer in {self.timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ValueError, LookaheadError) as error:
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self.cost.seconds += clock() - started
        return False

    async def _compare(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        raise NotImplementedError

    async def _post(self, body: Mapping[str, Any]) -> tuple[Mapping[str, str], bytes]:
        """Return the headers and the body of an answer.

        Raises:
            LookaheadError: if the server refuses.
        """
        async with self.session.post(self.url, json=body, headers=self._headers) as response:
            data = await response.read()
            if response.status != 200:
                text = data[:MAX_ERROR_CHARS].decode(errors="replace")
                raise LookaheadError(f"{self.url} answers {response.status}: {text}")
            return response.headers, data

    def _fail(self, reason: str) -> None:
        self.cost.failures += 1
        if self.cost.failures == 1:
            logger.warning(
                "rl_accel: lookahead: the verifier at %s gave no verdict (%s); steps without one are the target's own. "
                "Counted as failures; not logged again", self.url, reason,
            )  # fmt: skip


def read_json(url: str, data: str | bytes) -> Any:
    """
    Raises:
        LookaheadError: for what is no JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LookaheadError(f"{url} answers no JSON: {data[:MAX_ERROR_CHARS]!r}") from error
