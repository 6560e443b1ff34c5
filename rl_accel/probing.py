"""Heavy imports of the doctor happen in processes of their own, each of which prints one line of JSON at its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

TIMEOUT_S = 300


def run_probe(
    module: str, arguments: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Run a module; return its JSON and "", or None and the end of what it printed."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, **(env or {})},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {TIMEOUT_S} s"
    lines = result.stdout.strip().splitlines()
    if result.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    return None, "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
