"""The folder of a run: what it was started with, its metrics, tokens, checkpoints and curves.

run.json        command, recipe, arm, seed, git commit, versions, machine, start, end, whether it finished
config.yaml     the resolved configuration
metrics.jsonl   one line a step, written by verl's file logger
tokens/         token ids of every step (`rl_accel.compare.tokens`)
checkpoints/    verl's checkpoints
wandb/          the wandb run
curves.png      the plot that `train` writes at the end
error.log       the traceback of a run that failed
.lock           held by the process whose run it is; the kernel lets go of it when that process ends, however it ends
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rl_accel import resuming
from rl_accel.errors import ConfigError

logger = logging.getLogger("rl_accel")


class RunFolder:
    """Creates or reopens the folder of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().resolve()
        self._lock: int | None = None
        self._is_new = False

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    def open(self, resume: bool) -> None:
        """Make the folder and take it for this process.

        Raises:
            ConfigError: if it cannot be written, another process runs in it, or it holds a run and ``resume`` is False.
        """
        try:
            self._is_new = not self.path.exists() or not any(self.path.iterdir())
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"rl_accel.run_dir={self.path} cannot be written: {error}") from error
        self._take()
        self.read_info()  # damaged: said now, not after the run
        if self.metrics.exists() and not resume:
            raise ConfigError(
                f"rl_accel.run_dir={self.path} already holds a run. Choose another folder, or continue it with "
                "trainer.resume_mode=auto"
            )

    def discard(self) -> None:
        """Remove the folder of a run that was refused, unless it held something before."""
        if self._is_new:
            shutil.rmtree(self.path, ignore_errors=True)

    def _take(self) -> None:
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            raise ConfigError(
                f"rl_accel.run_dir={self.path}: process {holder or 'of another machine'} is training in this folder. "
                "Wait for it, or choose another folder"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run in it", self.path, error)
            return
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def save_config(self, config: DictConfig, accept_changes: bool) -> None:
        """Write config.yaml; where the folder holds a run, its settings must be those of this one.

        Raises:
            ConfigError: names the settings that differ, unless ``accept_changes``.
        """
        if self.config.exists() and self.metrics.exists():
            changed = resuming.changes(self.config, config)
            refused = [text for text, matters in changed if matters]
            if refused and not accept_changes:
                raise ConfigError(
                    f"rl_accel.run_dir={self.path} holds a run with other settings: {'; '.join(refused)}. Choose "
                    "another folder, give the settings that it began with, or resume with the new ones by "
                    "rl_accel.accept_changes=true"
                )
            for text, _ in changed:
                logger.info("resuming with a changed setting: %s", text)
            if changed:
                self.update_info(changes=[*self.read_info().get("changes", []), *(text for text, _ in changed)])
        write_whole(self.config, lambda path: path.write_text(resuming.as_yaml(config), encoding="utf-8"))

    def read_info(self) -> dict[str, Any]:
        """Return run.json, or {} if there is none.

        Raises:
            ConfigError: if it is damaged.
        """
        try:
            found = json.loads(self.info.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{self.info} is damaged ({error}); remove it to go on without what it says") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{self.info} is damaged (no mapping); remove it to go on without what it says")
        return found

    def update_info(self, **values: Any) -> None:
        """Merge values into run.json; a reader never sees a half-written file."""
        text = json.dumps({**self.read_info(), **values}, indent=1, default=str) + "\n"
        write_whole(self.info, lambda path: path.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path` and put it there when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def default_path(recipe: str) -> Path:
    """Make and return `outputs/<recipe>/<date-time>` under the working directory; a number tells runs of one second
    apart.

    Raises:
        ConfigError: if it cannot be made.
    """
    name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        path = Path("outputs") / name / (f"{stamp}-{number}" if number else stamp)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{path.absolute()} cannot be made: {error}. Set rl_accel.run_dir") from error
        return path
    raise ConfigError(f"outputs/{name} holds 1000 runs of this second; set rl_accel.run_dir")


_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "Read-only file system", "inline_container.cc")
"""Where an error has lost its number on the way; the last is torch's writer, whose file is shorter than it wrote."""


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that the disk is full, read-only, over quota or broken."""
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG):
        return True
    return any(word in str(error) for word in _DISK_WORDS)


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
