"""Snapshots of a drafter's history: a folder of segment files and a manifest, written whole or not at all.

    manifest.json   format, version, tokenizer, epoch, window, what the planner learned, list of segments
    scoring.npy     float32, what the index learned about acceptance
    NNN.segment     one closed epoch each; see kernels/suffix/README.md for the format

Left out: requests that are running. A folder is written beside its place under another name, synced and renamed, so a
process that is killed leaves the old snapshot or the new one.
"""

from __future__ import annotations

import json
import os
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
    if target.exists() and not (target / MANIFEST).exists() and any(target.iterdir()):
        raise DraftError(f"{target} exists and is not a snapshot of drafting history; choose another folder")
    fresh = target.with_name(f"{target.name}.tmp{os.getpid()}")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
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
        old = target.with_name(f"{target.name}.old{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
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
    except (OSError, ValueError, EOFError) as error:
        raise DraftError(f"{folder / SCORING} is damaged ({error})") from error
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
    if not path.exists():
        for old in sorted(path.parent.glob(f"{path.name}.old*")):
            return old
    return path


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
