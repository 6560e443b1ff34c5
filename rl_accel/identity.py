"""Which rollout a request is, and which generation of it: the value of `SamplingParams.extra_args["rl_accel"]`.

    {"problem_id": str, "sample_index": int, "step": int, "validate": bool, "call": int}

`validate` (default false) and `call` (default 0) may be left out. Anybody who can send a request can send anything
here, so it is read strictly, in one place, and what was read is safe to hash. Left out: whether two requests share an
identity; they then get equal random numbers, which is what an identity says.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FIELD = "rl_accel"
"""Of `extra_args`."""
_INT64 = 1 << 63


@dataclass(frozen=True)
class RolloutIdentity:
    """Names a generation in a run, the same in every run of the same data and seed."""

    problem_id: str
    """Stable name of the problem, such as a data-set id."""
    sample_index: int
    """Which of the samples of this problem in this step; fits 64 bits, as `step` and `call` do."""
    step: int
    """Training step."""
    validate: bool = False
    """Validation shares step numbers with training."""
    call: int = 0
    """Which generation of this sample: see `CallNumbers`."""

    @classmethod
    def read(cls, value: Any) -> RolloutIdentity:
        """Check what a request carries.

        Raises:
            ValueError: with the field that is missing or not what it must be.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a mapping with problem_id, sample_index and step; got {_short(value)}")
        problem_id, validate = value.get("problem_id"), value.get("validate", False)
        if _is_int64(problem_id):
            problem_id = str(problem_id)
        if not isinstance(problem_id, str):
            raise ValueError(f"problem_id: expected a string; got {_short(problem_id)}")
        try:
            problem_id.encode()
        except UnicodeEncodeError:
            raise ValueError(f"problem_id: not Unicode text: {_short(problem_id)}") from None
        if not isinstance(validate, bool):
            raise ValueError(f"validate: expected true or false; got {_short(validate)}")
        numbers = {name: value.get(name, default) for name, default in _NUMBERS.items()}
        for name, number in numbers.items():
            if not _is_int64(number):
                raise ValueError(f"{name}: expected an integer of 64 bits; got {_short(number)}")
        return cls(problem_id=problem_id, validate=validate, **numbers)


_NUMBERS = {"sample_index": None, "step": None, "call": 0}


class CallNumbers:
    """Numbers the generations of one session, so that each gets random numbers of its own.

    The first call is 0: a session that generates once is named as if nothing was numbered. Every other call is named by
    its prompt and by how often the session asked for that prompt before. So k calls on one prompt are independent, and
    branches that run at the same time get the same numbers whoever is first, as long as their prompts differ. Which
    call is the first, and which of several on one prompt is which, follows the order in which they are made.
    """

    def __init__(self) -> None:
        self._asked: Counter[int] = Counter()

    def next(self, prompt_token_ids: Sequence[int]) -> int:
        """Return the number of a call that is made now, in [0, 2^63).

        Args:
            prompt_token_ids: [P], whatever the generation starts from.
        """
        prompt = hash64(np.asarray(prompt_token_ids, dtype=np.int64).tobytes())
        is_first, nth = not self._asked, self._asked[prompt]
        self._asked[prompt] += 1
        return 0 if is_first else hash64(f"{prompt}/{nth}".encode()) & (_INT64 - 1) or 1


def hash64(data: bytes) -> int:
    """Return 8 bytes of BLAKE2b as a signed int64; unlike `hash`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _is_int64(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_INT64 <= value < _INT64


def _short(value: Any) -> str:
    """A value for a log line: nobody fills the log with a megabyte, and no `__repr__` of theirs is run."""
    if isinstance(value, str):
        return ascii(value[:40]) + ("..." if len(value) > 40 else "")
    if isinstance(value, (bool, float)) or value is None or _is_int64(value):
        return repr(value)
    return f"a {type(value).__name__}"
