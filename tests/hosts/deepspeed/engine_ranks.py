"""One rank of test_attach.py: DeepSpeed engines with and without 4-bit communication, on real gloo.

The cases named as arguments run one after the other in one process group: `training_cases.py`, `attach_cases.py` and
`stage3_cases.py`.
"""

from __future__ import annotations

import logging
import os
import sys

import attach_cases
import stage3_cases
import torch
import torch.distributed as dist
import training_cases
from deepspeed.utils import logger

from rl_accel.hosts.deepspeed import load

CASES = {
    name.removeprefix("case_"): case
    for cases in (training_cases, attach_cases, stage3_cases)
    for name, case in vars(cases).items()
    if name.startswith("case_")
}


def main() -> None:
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    load("cpu").init_distributed(dist_backend="gloo", verbose=False)
    names = sys.argv[1:]
    for name in names:
        CASES[name]()
    torch.save(names, os.environ["RESULT"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
