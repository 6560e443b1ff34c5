"""Snapshots of a drafter's history: a folder of segment files and a manifest, written whole or not at all.

    manifest.json   format, version, tokenizer, epoch, window, what the planner learned, list of segments
    learned.npz     `scoring`: what the index learned about acceptance; response lengths by problem
    NNN.segment     rollouts of one epoch each; see kernels/suffix/README.md for the format

Left out: requests that are running; two processes that save to one place at once, of which one may fail. A folder is
written beside its place under another name, synced and renamed, so a process that is killed leaves the old snapshot or
the new one; what else it leaves (`*.tmpPID`, `*.oldPID`), the next save removes. A save that fails leaves the old one.
Cost: 17,000 problems take 0.1 s, a new segment what its bytes take; one that an earlier snapshot holds is linked.
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

from rl_accel.errors import DraftError
from rl_accel.kernels.suffix.api import SuffixIndex

FORMAT, VERSION = "rl_accel.draft", 2
MANIFEST, LEARNED, SCORING = "manifest.json", "learned.npz", "scoring"
SEGMENT = re.compile(r"[0-9]{3,9}\.segment")
CHECKSUM_AT = 24
"""Place of the checksum in a segment's file, bytes."""


def save_snapshot(
    path: str | os.PathLike,
    index: SuffixIndex,
    manifest: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    files: Mapping[int, str],
) -> dict[int, str]:
    """Write the closed epochs and what was learned to the folder `path`, replacing an older snapshot.

    Args:
        path: the folder.
        index: whose segments and scoring are written.
        manifest: what else is known, for `read_manifest`.
        arrays: numbers, for `load_learned`.
        files: where segments were written before, by checksum.

    Returns:
        `files` as of this snapshot.

    Raises:
        DraftError: if the folder exists and is no snapshot, or cannot be written.
    """
    target = Path(path)
    fresh = target.with_name(f"{target.name}.tmp{os.getpid()}")
    try:
        if not _replaceable(target):
            raise DraftError(f"{target} exists and is not a snapshot of drafting history; choose another folder")
        _remove_left_overs(target, "tmp")
        if (target / MANIFEST).exists():
            _remove_left_overs(target, "old")
        fresh.mkdir(parents=True)
        segments = index.segments()
        for number, info in enumerate(segments):
            info["file"] = f"{number:03d}.segment"
            if not _link(files.get(info["checksum"]), fresh / info["file"], info):
                index.write_segment(number, str(fresh / info["file"]))
        learned: dict[str, Any] = {SCORING: index.scoring_state(), **arrays}
        _write(fresh / LEARNED, lambda file: np.savez(file, **learned))
        text = json.dumps({"format": FORMAT, "version": VERSION, **manifest, "segments": segments})
        _write(fresh / MANIFEST, lambda file: file.write(text.encode()))
        _sync(fresh)
        _replace(target, fresh)
        _sync(target.parent)
        _remove_left_overs(target, "old")
    except OSError as error:
        raise DraftError(f"history cannot be saved to {target}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # of a save that failed: the disk may be full
    return {info["checksum"]: str(target / info["file"]) for info in segments}


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
            if type(manifest[key]) is not kind:  # a bool is an int, too
                raise DraftError(f"{folder}: {key} in {MANIFEST} is not {kind.__name__}")
        if not all(abs(manifest[key]) < 1 << 62 for key in ("epoch", "window")):
            raise DraftError(f"{folder}: epoch or window in {MANIFEST} is out of range")
    except FileNotFoundError:
        raise DraftError(f"{folder} has no {MANIFEST}; it is not a snapshot of drafting history") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DraftError(f"{folder / MANIFEST} is damaged ({error!r})") from error
    if manifest["tokenizer"] != tokenizer:
        raise DraftError(f"{folder} was written with another tokenizer")
    return manifest


def load_learned(path: str | os.PathLike, index: SuffixIndex) -> dict[str, np.ndarray]:
    """Restore the scoring, and return the other arrays that were saved.

    Raises:
        DraftError: if the file is missing or damaged.
    """
    file = _folder(Path(path)) / LEARNED
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        state = arrays.pop(SCORING)
    except Exception as error:  # on damaged bytes the readers of numpy and zipfile raise whatever their parsers raise
        raise DraftError(f"{file} is damaged ({error!r})") from error
    if not isinstance(state, np.ndarray) or state.dtype != np.float32 or state.ndim != 1:
        raise DraftError(f"{file} is damaged ({SCORING} is not a row of float32)")
    index.load_scoring_state(state)
    return arrays


def load_segments(path: str | os.PathLike, index: SuffixIndex, manifest: Mapping[str, Any]) -> dict[int, str]:
    """Read all segments of a snapshot; returns their files by checksum.

    Raises:
        DraftError: if a file is missing or damaged; segments read before it stay in `index`.
    """
    folder, files = _folder(Path(path)), {}
    for segment in reversed(manifest["segments"]):  # the oldest first, so that the newest stay where memory is short
        try:
            name, num_tokens, epoch = segment["file"], segment["num_tokens"], segment["epoch"]
            foreign, shared = bool(segment["foreign"]), bool(segment["shared"])
        except (KeyError, TypeError) as error:
            raise DraftError(f"{folder / MANIFEST} is damaged ({error!r})") from error
        if not isinstance(name, str) or not SEGMENT.fullmatch(name):
            raise DraftError(f"{folder / MANIFEST} is damaged (segment named {name!r})")
        info = index.open_segment(str(folder / name), foreign, shared)
        if (info["num_tokens"], info["epoch"]) != (num_tokens, epoch):
            raise DraftError(f"{folder / name} is not the segment that {MANIFEST} lists")
        files[info["checksum"]] = str(folder / name)
    return files


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
    ours = all(name in (MANIFEST, LEARNED, f"{SCORING}.npy") or name.endswith(".segment") for name in names)
    return not names or (ours and MANIFEST in names and FORMAT in (target / MANIFEST).read_text("latin-1"))


def _link(earlier: str | None, path: Path, info: Mapping[str, Any]) -> bool:
    """Give a segment's file of an earlier snapshot another name; False where that file is another one, or gone."""
    if earlier is None:
        return False
    try:
        os.link(earlier, path)  # first: what is looked at then cannot be replaced any more
        with path.open("rb") as file:
            file.seek(CHECKSUM_AT)
            same = int.from_bytes(file.read(8), "little") == info["checksum"]
        if same and path.stat().st_size == info["num_bytes"]:
            return True
        path.unlink()
    except OSError:  # no links on this file system, or to that one
        path.unlink(missing_ok=True)
    return False


def _replace(target: Path, fresh: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    old = target.with_name(f"{target.name}.old{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise


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
