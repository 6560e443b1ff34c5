"""Import DeepSpeed for the device of this process.

DeepSpeed 0.19.8 chooses its accelerator when it is imported, from `DS_ACCELERATOR` or by probing. On a CPU its
communication backend compiles the op `deepspeed_shm_comm` at start (half a minute, and a compiler must be there),
which only `inference_all_reduce` uses; `deepspeed.ops.__compatible_ops__` is the table that it asks first
(`deepspeed/comm/torch.py: build_shm_op`), and the entry set here makes it go on without.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType

from rl_accel.errors import ConfigError

SHM_OP = "deepspeed_shm_comm"


def load(device_type: str) -> ModuleType:
    """Return the module `deepspeed`, set up for ``device_type`` (`cpu`, `cuda`, `npu`).

    Raises:
        ConfigError: if DeepSpeed is not installed, or another accelerator was chosen in this process before.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("strategy=deepspeed needs the package deepspeed; it is not installed") from error
    chosen = deepspeed.get_accelerator().device_name()
    if chosen != device_type:
        raise ConfigError(
            f"DeepSpeed runs on {chosen!r} in this process (DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}), "
            f"the trainer on {device_type!r}; unset DS_ACCELERATOR"
        )
    if device_type == "cpu":
        # Assigned as a whole: reading the table first would probe every op with compiler runs.
        deepspeed.ops.__compatible_ops__ = {SHM_OP: False}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
