"""Linear layers of the CPU build are packed at a sync as they were when the engine was loaded.

oneDNN chooses the layout of a packed weight by the number of OpenMP threads, and vLLM shares its oneDNN kernels, made
for one layout, between all layers of a shape for the life of the process. Packed again with another number of threads,
a layer may get another layout, and then multiplies with garbage: 192 x 64 with one thread and then two does so on AVX2,
384 x 128 does not. vLLM's ngram drafter is enough for that, as numba raises the number to that of the cores.

Host symbols: `torch._C.set_num_threads`; vLLM's CPU worker replaces `torch.set_num_threads` by nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def remember_threads(runner: Any) -> None:
    """Note with how many threads the model of a runner has just been loaded."""
    runner.rl_accel_load_threads = torch.get_num_threads()


@contextmanager
def threads_of_load(runner: Any) -> Iterator[None]:
    """Have as many OpenMP threads as when the model was loaded; the number found is restored."""
    found = torch.get_num_threads()
    wanted = getattr(runner, "rl_accel_load_threads", found)
    if wanted == found:
        yield
        return
    torch._C.set_num_threads(wanted)
    try:
        yield
    finally:
        torch._C.set_num_threads(found)
