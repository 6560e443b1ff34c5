"""Makes the quantization method `milo` known to vLLM, in every process that knows quantization methods.

Host symbol: `register_quantization_config` (model_executor/layers/quantization/__init__.py).
"""

from __future__ import annotations

import importlib
from typing import Any


def register() -> None:
    """Add the name when vLLM's module of quantization methods is imported; changes nothing for who does not use it."""
    import wrapt

    wrapt.register_post_import_hook(_add, "vllm.model_executor.layers.quantization")


def _add(_: Any) -> None:
    importlib.import_module("rl_accel.moe.hosts.quantization")
