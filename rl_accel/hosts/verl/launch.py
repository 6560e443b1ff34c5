"""Hands a configuration to verl, which takes seconds to import and reads its platform from the environment then."""

from __future__ import annotations

from typing import Any


def run(config: Any) -> None:
    """Train; returns when the training is done. Host symbol: `verl.trainer.main_ppo.main`."""
    from verl.trainer.main_ppo import main

    main.__wrapped__(config)  # without Hydra's reading of the command line
