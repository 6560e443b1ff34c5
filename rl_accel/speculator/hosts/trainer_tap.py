"""Traces of a forward pass over whole rollouts: the rows that an engine leaves while it generates (`tap.py`), of the
same quantities, without drafts.

Hidden states are the outputs of the decoder layers `aux_layers`, the last before the final norm, and logits are those
before the temperature. A micro-batch is traced when the passes so far have earned the time for it, as much of it as
`MAX_ROWS` allows, beginning at the other end of the order in which engines choose. The policy of a row is the training
step here; readers know which version of an engine that was (`tap_rings.py`).

Of a rollout of several turns only the first is traced: what follows are generations of other names. A loop that makes
several outputs of a session has one name for them, and a micro-batch with a name that was there before is left out.

Cost: `max_share` of the seconds of the passes, as measured on the CPU. Not covered: sequences that are cut over ranks,
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
from rl_accel.speculator.flat import normalized
from rl_accel.speculator.tap_rings import MAX_PUT, make_ring
from rl_accel.speculator.traces import TOP_K, RowLayout, aux_layers, trace_name

MAX_ROWS = 2048
"""Of a micro-batch."""
MAX_SAVED = 16
"""Micro-batches whose share of time may be saved for one that is traced."""


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

    def __init__(self, model: Any, history: int, num_samples: int, max_share: float, run: str):
        text = model.config.get_text_config()
        count = int(text.num_hidden_layers)
        layers = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
        if len(layers) != 1:
            raise ValueError(f"{type(model).__name__} has {len(layers)} lists of {count} layers; 1 expected")
        self.model = model
        self.layers = {k: layers[0][k - 1] for k in aux_layers(count)}
        self.layout = RowLayout(len(self.layers) * int(text.hidden_size), history + 1, int(text.vocab_size))
        self.ring = make_ring(self.layout, run)
        self.num_samples, self.max_share = num_samples, max_share
        self.error: Exception | None = None
        """What failed inside the model's own call, where nothing may be raised."""
        self._batch: _MicroBatch | None = None
        self._hooks: list[Any] = []
        self._started, self._spent_s, self._saved_s = 0.0, 0.0, 0.0
        self._pass_is_new = True
        self._begin_pass()

    def begin(self, micro_batch: Any) -> None:
        """Choose what to trace of a micro-batch that is about to be run."""
        self._started = time.perf_counter()
        if self._pass_is_new:
            self._begin_pass()
        if self._saved_s > 0.0:
            self._batch = self._chosen(micro_batch)
            if self._batch is not None:
                hook = self.model.register_forward_hook(self._hook(self._see_logits))
                self._hooks = [hook, *map(self._watch_layer, self.layers)]
        self._spent_s = time.perf_counter() - self._started

    def end(self) -> None:
        """The micro-batch has been run: write the rows."""
        batch = self._batch
        self.detach()
        if batch is not None:
            if batch.rows_R.is_cuda:
                torch.cuda.synchronize(batch.rows_R.device)  # until here it is the pass that takes the time
            started = time.perf_counter()
            if batch.target is not None and len(batch.layers) == len(self.layers):
                self._write(batch)
            self._spent_s += time.perf_counter() - started
        self._count(time.perf_counter() - self._started - self._spent_s, self._spent_s)

    def pass_ended(self) -> None:
        """What comes next is another pass."""
        self._pass_is_new = True

    def detach(self) -> None:
        """Leave the model as it was before `begin`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
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

    def _chosen(self, micro_batch: Any) -> _MicroBatch | None:
        """Return what is traced of a micro-batch, None for nothing."""
        packed = bool(tu.get_non_tensor_data(micro_batch, "use_remove_padding", True))
        ids, masks, temperature = micro_batch["input_ids"], micro_batch["loss_mask"], micro_batch["temperature"]
        offsets, mask_offsets = ids.offsets().tolist(), masks.offsets().tolist()
        tokens, sampled = ids.values().cpu().numpy().astype(np.int32), masks.values().cpu().numpy().astype(bool)
        size = len(offsets) - 1
        steps = _column(micro_batch, "global_steps", size) or [0] * size
        names = self._names_of(micro_batch, tokens, offsets, steps)
        longest = int(np.diff(offsets).max())
        stretches, rows, num_rows = [], [], 0
        for i in sorted(range(size), key=lambda i: -(names[i] & 0xFFFF)):
            text = tokens[offsets[i] : offsets[i + 1]]
            first, count = _first_turn(sampled[mask_offsets[i] : mask_offsets[i + 1]], len(text))
            count = min(count, MAX_ROWS - num_rows)
            if not count:  # padding has no sampled token
                continue
            if names[i] in self._names:
                return None
            self._names.add(names[i])
            warmth = float(temperature[i]) if isinstance(temperature, torch.Tensor) else float(temperature)
            stretches.append(_Stretch(names[i], text, first - 1, count, int(steps[i]), warmth))
            start = (offsets[i] if packed else longest * i) + first - 1
            rows.append(np.arange(start, start + count))
            num_rows += count
        if not stretches:
            return None
        shape = (1, offsets[-1]) if packed else (size, longest)
        return _MicroBatch(stretches, torch.from_numpy(np.concatenate(rows)), shape, packed)

    def _names_of(self, micro_batch: Any, tokens: Any, offsets: list[int], steps: list[Any]) -> list[int]:
        size = len(offsets) - 1
        problems, nths, sessions = (_column(micro_batch, key, size) for key in (PROBLEM_ID, OCCURRENCE, "session_id"))
        if problems is None or nths is None or sessions is None:
            return [hash64(tokens[a:b].tobytes()) for a, b in itertools.pairwise(offsets)]
        return [
            trace_name(RolloutIdentity(str(problem), int(nth) * self.num_samples + int(session), int(step)))
            for problem, nth, session, step in zip(problems, nths, sessions, steps, strict=True)
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

    def _watch_layer(self, layer: int) -> Any:
        return self.layers[layer].register_forward_hook(self._hook(lambda output: self._see_states(layer, output)))

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
                        "temperature": np.full(count, stretch.temperature, np.float16),
                        "tokens": stretch.tokens[np.maximum(where, 0)],
                        **{name: value[part] for name, value in values.items()},
                    }
                )
            start += stretch.count
        self._rows += start

    def _count(self, pass_s: float, tap_s: float) -> None:
        self._last_tap_s += tap_s
        self._last_pass_s += pass_s
        earned = self.max_share * pass_s
        self._saved_s = min(self._saved_s + earned, MAX_SAVED * earned) - tap_s


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
