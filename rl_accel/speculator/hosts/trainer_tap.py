"""Traces of a forward pass over whole rollouts: the rows that an engine leaves while it generates (`tap.py`), of the
same quantities, without drafts.

Hidden states are the outputs of the decoder layers `aux_layers`, the last before the final norm, and logits are those
before the temperature. Rollouts are taken from the other end of the order in which engines take them, so that the two
meet late. A row's policy is the training step here; readers know which version of an engine that was
(`tap_rings.py`).

Of a rollout of several turns only the first is traced: what follows are generations of other names. A loop that makes
several outputs of one session has no name for each, so nothing is traced there.

Cost: at most `max_share` of the pass's seconds, as measured on the CPU. Not covered: sequences that are cut over ranks,
logits that are (DTensor) or that a fused kernel does not make; adapters. Not run on a GPU.

Host symbols (verl 0.9.1): fields `input_ids`, `loss_mask`, `temperature`, `use_remove_padding`, `global_steps`,
`session_id` of a micro-batch, and where `FSDPEngineWithLMHead.prepare_model_inputs` puts its tokens.

Shape suffixes: R rows, A hidden states, N tokens of a row, V vocabulary, k kept entries.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu

from rl_accel.hosts.verl.identity import OCCURRENCE, PROBLEM_ID
from rl_accel.identity import RolloutIdentity, hash64
from rl_accel.speculator.head import normalized
from rl_accel.speculator.hosts.tap import MIN_SHARE
from rl_accel.speculator.tap_rings import MAX_PUT, make_ring
from rl_accel.speculator.traces import TOP_K, RowLayout, aux_layers, trace_name

FIRST_SHARE = 0.25
"""Of the rollouts, that are traced until it is known what that takes."""
FORGET = 0.8
"""Of measured seconds, from one micro-batch to the next."""


@dataclass
class _Stretch:
    """The traced part of a rollout."""

    name: int
    tokens: npt.NDArray[np.int32]
    """Of the whole rollout."""
    first: int
    """Position from which its first token was sampled."""
    count: int
    step: int
    temperature: float


@dataclass
class _MicroBatch:
    stretches: list[_Stretch]
    rows_R: torch.Tensor
    """Where the rows lie among the tokens of the model's input."""
    shape: tuple[int, int]
    packed: bool
    started: float
    hooks: list[Any] = field(default_factory=list)
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    target: torch.Tensor | None = None
    target_ids: torch.Tensor | None = None


class TrainerTap:
    """Leaves traces of one training rank.

    Args:
        model: causal language model of transformers.
        history: tokens before the last one that the head sees.
        num_samples: rollouts of a problem in a step.
        max_share: of the seconds of a pass that this may take.
        run: name of the run, for the ring.

    Raises:
        ValueError: if the model's decoder layers cannot be told from the rest.
    """

    def __init__(self, model: torch.nn.Module, history: int, num_samples: int, max_share: float, run: str):
        text = model.config.get_text_config()
        count = int(text.num_hidden_layers)
        layers = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
        if len(layers) != 1:
            raise ValueError(f"{type(model).__name__} has {len(layers)} lists of {count} layers; 1 expected")
        self.model = model
        self.layers = {k: layers[0][k - 1] for k in aux_layers(count)}
        self.layout = RowLayout(len(self.layers) * int(text.hidden_size), history + 1, int(text.vocab_size))
        self.ring = make_ring(self.layout, run)
        self.num_samples, self.max_share, self.share = num_samples, max_share, FIRST_SHARE
        self.error: Exception | None = None
        """What failed inside the model's own call, where nothing may be raised."""
        self._batch: _MicroBatch | None = None
        self._tap_s, self._pass_s, self._spent_s = 0.0, 0.0, 0.0
        self._pass_is_new = True
        self._begin_pass()

    def begin(self, micro_batch: Any) -> None:
        """Choose what to trace of a micro-batch that is about to be run."""
        started = time.perf_counter()
        if self._pass_is_new:
            self._begin_pass()
        packed = bool(tu.get_non_tensor_data(micro_batch, "use_remove_padding", True))
        offsets = micro_batch["input_ids"].offsets().tolist()
        longest = int(np.diff(offsets).max())
        starts = offsets[:-1] if packed else [longest * i for i in range(len(offsets) - 1)]
        chosen = self._choose(micro_batch, offsets)
        rows = [np.arange(s.first, s.first + s.count) + starts[i] for i, s in chosen]
        shape = (1, offsets[-1]) if packed else (len(starts), longest)
        where = torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0, dtype=torch.int64)
        self._batch = batch = _MicroBatch([s for _, s in chosen], where, shape, packed, started)
        if rows:
            for k, layer in self.layers.items():
                batch.hooks.append(layer.register_forward_hook(self._hook(lambda o, k=k: self._see_states(k, o))))
            batch.hooks.append(self.model.register_forward_hook(self._hook(self._see_logits)))
        self._spent_s = time.perf_counter() - started

    def end(self) -> None:
        """The micro-batch has been run: write the rows."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        for hook in batch.hooks:
            hook.remove()
        if batch.rows_R.is_cuda:
            torch.cuda.synchronize(batch.rows_R.device)  # until here it is the pass that takes the time
        started = time.perf_counter()
        if batch.target is not None and len(batch.layers) == len(self.layers):
            self._write(batch)
        now = time.perf_counter()
        self._count(now - batch.started, self._spent_s + now - started)

    def pass_ended(self) -> None:
        """What comes next is another pass."""
        self._pass_is_new = True

    def detach(self) -> None:
        """Leave the model as it was."""
        for hook in self._batch.hooks if self._batch is not None else ():
            hook.remove()
        self._batch = None

    def metrics(self) -> dict[str, float]:
        """Return numbers of the last pass."""
        rows, tap_s, pass_s = self._rows, self._last_tap_s, self._last_pass_s
        return {"trainer_tap_rows": float(rows), "trainer_tap_share": tap_s / pass_s if pass_s else 0.0}

    # What to trace.

    def _begin_pass(self) -> None:
        self._pass_is_new = False
        self._names: set[int] = set()
        self._rows, self._last_tap_s, self._last_pass_s = 0, 0.0, 0.0

    def _choose(self, micro_batch: Any, offsets: list[int]) -> list[tuple[int, _Stretch]]:
        """Return which rollouts are traced, by their place in the micro-batch."""
        tokens = micro_batch["input_ids"].values().cpu().numpy().astype(np.int32)
        masks, temperature = micro_batch["loss_mask"].unbind(), micro_batch["temperature"]
        size = len(offsets) - 1
        steps = _column(micro_batch, "global_steps", size) or [0] * size
        found = []
        for i, name in enumerate(self._names_of(micro_batch, tokens, offsets, steps)):
            text = tokens[offsets[i] : offsets[i + 1]]
            first, count = _first_turn(masks[i].cpu().numpy().astype(bool), len(text))
            if not count:
                continue  # of padding, no token was sampled
            if name in self._names:
                return []
            self._names.add(name)
            if 0xFFFF - (name & 0xFFFF) < self.share * 0x10000:
                warmth = float(temperature[i]) if isinstance(temperature, torch.Tensor) else float(temperature)
                found.append((i, _Stretch(name, text, first - 1, count, int(steps[i]), warmth)))
        return found

    def _names_of(self, micro_batch: Any, tokens: Any, offsets: list[int], steps: list[Any]) -> list[int]:
        size = len(offsets) - 1
        columns = [_column(micro_batch, key, size) for key in (PROBLEM_ID, OCCURRENCE, "session_id")]
        if any(column is None for column in columns):
            return [hash64(tokens[a:b].tobytes()) for a, b in itertools.pairwise(offsets)]
        return [
            trace_name(RolloutIdentity(str(problem), int(nth) * self.num_samples + int(session), int(step)))
            for problem, nth, session, step in zip(*columns, steps, strict=True)
        ]

    # What the model makes.

    def _hook(self, see: Any) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            started = time.perf_counter()
            try:
                see(output)
            except Exception as error:
                self.error = error
            self._spent_s += time.perf_counter() - started

        return hook

    def _see_states(self, layer: int, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        picked = self._pick(states)
        if picked is not None and self._batch is not None:
            self._batch.layers[layer] = picked

    def _see_logits(self, output: Any) -> None:
        batch, logits = self._batch, getattr(output, "logits", None)
        picked = self._pick(logits) if isinstance(logits, torch.Tensor) else None
        if batch is None or picked is None:
            return
        picked = picked[:, : self.layout.vocab_size]
        if self.layout.dense:
            batch.target = picked.half()
        else:
            best, batch.target_ids = picked.float().topk(TOP_K, -1)
            batch.target = (best - best[:, :1]).half()

    def _pick(self, values: torch.Tensor) -> torch.Tensor | None:
        """Return the rows that are traced, [R, ...]; None where the rank does not have all tokens."""
        batch = self._batch
        if batch is None or isinstance(values, DTensor) or values.dim() != 3:
            return None
        given = tuple(values.shape[:2])
        whole = given[0] == 1 and given[1] >= batch.shape[1] if batch.packed else given == batch.shape
        if not whole:
            return None
        batch.rows_R = batch.rows_R.to(values.device)
        return values.flatten(0, 1).index_select(0, batch.rows_R)

    def _write(self, batch: _MicroBatch) -> None:
        assert batch.target is not None
        states = torch.cat([batch.layers[k] for k in self.layers], -1).float()
        values: dict[str, Any] = {
            "aux": normalized(states, len(self.layers)).half().cpu().numpy(),
            "target": batch.target.cpu().numpy(),
        }
        if batch.target_ids is not None:
            values["target_ids"] = batch.target_ids.int().cpu().numpy()
        start = 0
        for stretch in batch.stretches:
            for first in range(0, stretch.count, MAX_PUT):
                count = min(MAX_PUT, stretch.count - first)
                position = np.arange(count, dtype=np.int32) + stretch.first + first
                where = position[:, None] + 1 - np.arange(self.layout.num_tokens)[None]
                part = slice(start + first, start + first + count)
                self.ring.put(
                    {
                        "request": np.full(count, stretch.name, np.int64),
                        "position": position,
                        "policy": stretch.step,
                        "draft": 0,
                        "drafted": -1,
                        "accepted": -1,
                        "temperature": stretch.temperature,
                        "tokens": stretch.tokens[np.maximum(where, 0)],
                        **{name: value[part] for name, value in values.items()},
                    }
                )
            start += stretch.count
        self._rows += start

    def _count(self, pass_s: float, tap_s: float) -> None:
        self._last_tap_s += tap_s
        self._last_pass_s += pass_s
        self._tap_s = FORGET * self._tap_s + tap_s
        self._pass_s = FORGET * self._pass_s + pass_s
        change = min(self.max_share * self._pass_s / max(self._tap_s, 1e-9), 2.0)
        self.share = min(1.0, max(self.share * change, MIN_SHARE))


def _first_turn(mask: npt.NDArray[np.bool_], length: int) -> tuple[int, int]:
    """Return where the first sampled stretch begins in a rollout, and its length; the mask may leave out the prompt."""
    sampled = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    if not len(sampled):
        return 0, 0
    first = int(sampled[0]) + length - len(mask)
    return (first, int(sampled[1] - sampled[0])) if first > 0 else (0, 0)


def _column(micro_batch: Any, key: str, size: int) -> list[Any] | None:
    """Return a field of each rollout, or None where the micro-batch lacks it."""
    if key not in micro_batch:
        return None
    values = micro_batch[key]
    if isinstance(values, torch.Tensor):
        return values.tolist()
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, (list, tuple)) else [values] * size
