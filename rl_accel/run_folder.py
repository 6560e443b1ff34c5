"""The folder of a run: what it was started with, its metrics, tokens, checkpoints and curves.

run.json        command, recipe, arm, seed, git commit, versions, machine, start, end, whether it finished
config.yaml     the resolved configuration
metrics.jsonl   one line a step, written by verl's file logger
tokens/         token ids of every step (`rl_accel.compare.tokens`)
checkpoints/    verl's checkpoints
wandb/          the wandb run
curves.png      the plot that `train` writes at the end
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rl_accel.errors import ConfigError


class RunFolder:
    """Creates or reopens the folder of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().resolve()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    def open(self, resume: bool) -> None:
        """Make the folder.

        Raises:
            ConfigError: if it cannot be written, or holds a run and ``resume`` is False.
        """
        if self.metrics.exists() and not resume:
            raise ConfigError(
                f"rl_accel.run_dir={self.path} already holds a run. Choose another folder, or continue it with "
                "trainer.resume_mode=auto"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").touch()
            (self.path / ".writable").unlink()
        except OSError as error:
            raise ConfigError(f"rl_accel.run_dir={self.path} cannot be written: {error}") from error

    def read_info(self) -> dict[str, Any]:
        """Return run.json, or {} if there is none."""
        try:
            return json.loads(self.info.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def update_info(self, **values: Any) -> None:
        """Merge values into run.json; a reader never sees a half-written file."""
        merged = {**self.read_info(), **values}
        temporary = self.info.with_suffix(".tmp")
        temporary.write_text(json.dumps(merged, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, self.info)


def default_path(recipe: str) -> Path:
    """`outputs/<recipe>/<date-time>` under the working directory."""
    name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")
    return Path("outputs") / name / datetime.now().strftime("%Y%m%d-%H%M%S")


def provenance() -> dict[str, Any]:
    """Return command, start time and commit of the code that runs."""
    return {
        "command": [os.path.basename(sys.executable), "-m", "rl_accel.train", *sys.argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_sha": _git_sha(),
    }


def _git_sha() -> str | None:
    folder = Path(__file__).resolve().parent
    result = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None
