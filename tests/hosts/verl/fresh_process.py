"""A process in which verl was not imported yet, and most of what verl imports was: runs the code that it is given.

`main()` is run by `run_ranks`; it saves the last line that the code prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import textwrap

import datasets  # noqa: F401
import pandas  # noqa: F401
import ray  # noqa: F401
import tensordict  # noqa: F401
import torch
import transformers.modeling_utils  # noqa: F401
import vllm.v1.worker.cpu_worker  # noqa: F401


def main() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(textwrap.dedent(sys.argv[1]), {"__name__": "__main__"})
    torch.save(printed.getvalue().strip().splitlines()[-1:], os.environ["RESULT"])
