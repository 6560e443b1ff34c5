"""Python imports this at start where the folder is on PYTHONPATH: the wall clock jumps, the monotonic one does not."""

import os
import random
import time

_true_time, _moments = time.time, random.Random(int(os.environ.get("JUMP_SEED", "0")) + os.getpid())
_state = {"until": 0.0, "offset": 0.0}


def _time() -> float:
    now = time.monotonic()
    if now >= _state["until"]:
        _state["until"], _state["offset"] = now + _moments.uniform(1, 8), _moments.uniform(-86400, 86400)
    return _true_time() + _state["offset"]


time.time = _time
