"""Names of data-set rows, and the batch columns that carry them from the agent-loop manager to its workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

PROBLEM_ID = "rl_accel_problem_id"
OCCURRENCE = "rl_accel_occurrence"


def problem_id_of(extra_info: Mapping[str, Any] | None, data_source: str, raw_prompt: Any) -> str:
    """Return a name of a data-set row that is stable over epochs, runs and machines.

    `extra_info["problem_id"]` if the data set has it, else its split and index, else a hash of the prompt.
    """
    extra_info = extra_info or {}
    if extra_info.get("problem_id") is not None:
        return str(extra_info["problem_id"])
    if extra_info.get("index") is not None and extra_info.get("split") is not None:
        return f"{data_source}/{extra_info['split']}/{extra_info['index']}"
    text = json.dumps(list(raw_prompt), sort_keys=True, default=str)
    return "prompt/" + hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
