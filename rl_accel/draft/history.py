"""Snapshots of a drafter's history: a folder of segment files and a manifest, written whole or not at all.

    manifest.json   format, version, tokenizer, epoch, window, what the planner learned, list of segments
    scoring.npy     float32, what the index learned about acceptance
    NNN.segment     one closed epoch each; see kernels/suffix/README.md for the format

Left out: requests that are running; two processes that save to one place at once. A folder is written beside its place
under another name, synced and renamed, so a process that is killed leaves the old snapshot or the new one; what else it
leaves (`*.tmpPID`, `*.oldPID`), the next save removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rl_accel.draft.index import SuffixIndex
from rl_accel.errors import DraftError

FORMAT, VERSION = "rl_accel.draft", 1
MANIFEST, SCORING = "manifest.json", "scoring.npy"


def save_snapshot(path: str | os.PathLike, index: SuffixIndex, manifest: Mapping[str, Any]) -> None:
    """Write the closed epochs and what was learned to the folder `path`, replacing an older snapshot.

    Raises:
        DraftError: if the folder exists and is no snapshot, or cannot be written.
    """
    target = Path(path)
    fresh = target.with_name(f"{target.name}.tmp{os.getpid()}")
    try:
        if not _replaceable(target):
            raise DraftError(f"{target} exists and is not a snapshot of drafting history; choose another folder")
        _remove_left_overs(target, "tmp")
        fresh.mkdir(parents=True)
        segments = []
        for number, info in enumerate(index.segments()):
            name = f"{number:03d}.segment"
            index.write_segment(number, str(fresh / name))
            segments.append({"file": name, **info})
        _write(fresh / SCORING, lambda file: np.save(file, index.scoring_state()))
        text = json.dumps({"format": FORMAT, "version": VERSION, **manifest, "segments": segments}, indent=1)
        _write(fresh / MANIFEST, lambda file: file.write(text.encode()))
        _sync(fresh)
        if target.exists():
            old = target.with_name(f"{target.name}.old{os.getpid()}")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        fresh.rename(target)
        _sync(target.parent)
        _remove_left_overs(target, "old")
    except OSError as error:
        raise DraftError(f"history cannot be saved to {target}: {error}") from error


def read_manifest(path: str | os.PathLike, tokenizer: int) -> dict[str, Any]:
    """Return the manifest of a snapshot.

    Raises:
        DraftError: if it is missing, damaged, of another format or of another tokenizer.
    """
    folder = _folder(Path(path))
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise DraftError(f"{folder}: version {manifest['version']} of {manifest['format']}; known: {VERSION}")
        for key, kind in (("tokenizer", int), ("epoch", int), ("window", int), ("planner", dict), ("segments", list)):
            if not isinstance(manifest[key], kind):
                raise DraftError(f"{folder}: {key} in {MANIFEST} is not {kind.__name__}")
        if not all(abs(manifest[key]) < 1 << 62 for key in ("epoch", "window")):
            raise DraftError(f"{folder}: epoch or window in {MANIFEST} is out of range")
    except FileNotFoundError:
        raise DraftError(f"{folder} has no {MANIFEST}; it is not a snapshot of drafting history") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DraftError(f"{folder / MANIFEST} is damaged ({error!r})") from error
    if manifest["tokenizer"] != tokenizer:
        raise DraftError(f"{folder} was written with another tokenizer")
    return manifest


def load_segments(path: str | os.PathLike, index: SuffixIndex, manifest: Mapping[str, Any]) -> None:
    """Map all segments of a snapshot and restore the scoring.

    Raises:
        DraftError: if a file is missing or damaged; segments read before it stay in `index`.
    """
    folder = _folder(Path(path))
    try:
        state = np.load(folder / SCORING, allow_pickle=False)
    except Exception as error:  # on damaged bytes numpy's reader raises whatever its parsers raise
        raise DraftError(f"{folder / SCORING} is damaged ({error!r})") from error
    if not isinstance(state, np.ndarray) or state.dtype != np.float32 or state.ndim != 1:
        raise DraftError(f"{folder / SCORING} is damaged (not a row of float32)")
    index.load_scoring_state(state)
    for segment in manifest["segments"]:
        try:
            name, num_tokens, epoch = segment["file"], segment["num_tokens"], segment["epoch"]
        except (KeyError, TypeError) as error:
            raise DraftError(f"{folder / MANIFEST} is damaged ({error!r})") from error
        if Path(str(name)).name != name:
            raise DraftError(f"{folder / MANIFEST} is damaged (segment named {name!r})")
        info = index.open_segment(str(folder / name))
        if (info["num_tokens"], info["epoch"]) != (num_tokens, epoch):
            raise DraftError(f"{folder / name} is not the segment that {MANIFEST} lists")


def _folder(path: Path) -> Path:
    """A process that was killed between the two renames of a save left the old snapshot under its other name."""
    if path.exists():
        return path
    manifests = [manifest for old in _left_overs(path, "old") if (manifest := old / MANIFEST).exists()]
    return max(manifests, key=lambda manifest: manifest.stat().st_mtime_ns).parent if manifests else path


def _replaceable(target: Path) -> bool:
    """Whether nothing but a snapshot would be lost."""
    if not target.exists():
        return True
    if not target.is_dir():
        return False
    names = {entry.name for entry in target.iterdir()}
    ours = all(name in (MANIFEST, SCORING) or name.endswith(".segment") for name in names)
    return not names or (ours and MANIFEST in names and FORMAT in (target / MANIFEST).read_text("latin-1"))


def _left_overs(target: Path, kind: str) -> list[Path]:
    """Folders that saves to `target` have written (`tmp`) or put away (`old`) and not removed."""
    pattern = re.compile(re.escape(f"{target.name}.{kind}") + r"\d{1,9}")
    return [entry for entry in target.parent.glob("*") if pattern.fullmatch(entry.name)]


def _remove_left_overs(target: Path, kind: str) -> None:
    """Remove those of this process and of processes that are no more."""
    for entry in _left_overs(target, kind):
        pid = int(entry.name.rpartition(kind)[2])
        if pid == os.getpid() or not _lives(pid):
            shutil.rmtree(entry, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write(path: Path, write: Any) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
