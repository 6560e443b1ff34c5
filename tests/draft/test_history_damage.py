"""Snapshots of drafting history: what is damaged is refused and says why, down to single bits of a segment."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_accel.draft.index import SuffixIndex
from rl_accel.errors import DraftError

HEADER, ENTRY = struct.Struct("<8sIIQQQqqQQQ"), struct.Struct("<QQQII")
SIZE_AT, CHECKSUM_AT = 16, 24
MASK = (1 << 64) - 1


# What is damaged is refused.


def edit_manifest(snapshot: Path, edit) -> None:
    manifest = json.loads((snapshot / "manifest.json").read_text())
    edit(manifest)
    (snapshot / "manifest.json").write_text(json.dumps(manifest))


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def relabel(path: Path, **fields) -> None:
    """Change header fields of a segment and seal it again."""
    names = ["magic", "version", "byte_order", "size", "checksum", "tokenizer", "epoch"]
    data = bytearray(path.read_bytes())
    values = list(HEADER.unpack_from(data))
    for name, value in fields.items():
        values[names.index(name)] = value
    HEADER.pack_into(data, 0, *values)
    path.write_bytes(seal(data))


DAMAGE = {
    "no folder": (shutil.rmtree, "has no manifest.json"),
    "no manifest": (lambda s: (s / "manifest.json").unlink(), "has no manifest.json"),
    "cut manifest": (lambda s: cut(s / "manifest.json", 0.7), "manifest.json is damaged"),
    "empty manifest": (lambda s: cut(s / "manifest.json", 0.0), "manifest.json is damaged"),
    "manifest is a list": (lambda s: (s / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "manifest lacks a key": (lambda s: edit_manifest(s, lambda m: m.pop("planner")), "manifest.json is damaged"),
    "manifest of another format": (lambda s: edit_manifest(s, lambda m: m.update(format="x")), "version 1 of x"),
    "manifest of another version": (lambda s: edit_manifest(s, lambda m: m.update(version=2)), "version 2 of"),
    "manifest of another tokenizer": (lambda s: edit_manifest(s, lambda m: m.update(tokenizer=78)), "tokenizer"),
    "epoch is no number": (lambda s: edit_manifest(s, lambda m: m.update(epoch="3")), "epoch .* is not int"),
    "epoch beyond 64 bits": (lambda s: edit_manifest(s, lambda m: m.update(epoch=1 << 70)), "epoch"),
    "planner without costs": (lambda s: edit_manifest(s, lambda m: m["planner"].pop("cost")), "planner"),
    "segments are numbers": (lambda s: edit_manifest(s, lambda m: m.update(segments=[1])), "manifest.json is damaged"),
    "segment by a path": (
        lambda s: edit_manifest(s, lambda m: m["segments"][0].update(file="../snapshot/000.segment")),
        "segment named '../snapshot/000.segment'",
    ),
    "segment is the parent": (lambda s: edit_manifest(s, lambda m: m["segments"][0].update(file="..")), "snapshot"),
    "segment is a number": (lambda s: edit_manifest(s, lambda m: m["segments"][0].update(file=0)), "named 0"),
    "segments changed places": (
        lambda s: edit_manifest(s, lambda m: m["segments"][0].update(file="001.segment")),
        "001.segment is not the segment that manifest.json lists",
    ),
    "segment missing": (lambda s: (s / "001.segment").unlink(), "001.segment: No such file"),
    "segment empty": (lambda s: cut(s / "001.segment", 0.0), "001.segment: too short"),
    "segment cut": (lambda s: cut(s / "001.segment", 0.9), r"001.segment: truncated: \d+ of \d+ bytes"),
    "segment longer": (lambda s: (s / "001.segment").open("ab").write(b"x"), "001.segment: truncated"),
    "segment magic": (lambda s: relabel(s / "001.segment", magic=b"RLSUFFIY"), "wrong magic"),
    "segment version": (lambda s: relabel(s / "001.segment", version=9), "format version 9, this build reads 1"),
    "segment byte order": (lambda s: relabel(s / "001.segment", byte_order=0x04030201), "format version"),
    "segment of another tokenizer": (lambda s: relabel(s / "001.segment", tokenizer=78), "another tokenizer"),
    "segment of another epoch": (lambda s: relabel(s / "001.segment", epoch=9), "not the segment"),
    "scoring missing": (lambda s: (s / "scoring.npy").unlink(), "scoring.npy"),
    "scoring empty": (lambda s: cut(s / "scoring.npy", 0.0), "scoring.npy is damaged"),
    "scoring cut": (lambda s: cut(s / "scoring.npy", 0.5), "scoring.npy is damaged"),
    "scoring of another size": (lambda s: np.save(s / "scoring.npy", np.zeros(7, np.float32)), "another size"),
    "scoring of two dimensions": (lambda s: np.save(s / "scoring.npy", np.zeros((7, 2), np.float32)), "scoring"),
    "scoring of texts": (lambda s: np.save(s / "scoring.npy", np.array(["x", "y"])), "scoring"),
    "scoring impossible": (
        lambda s: np.save(s / "scoring.npy", np.full_like(np.load(s / "scoring.npy"), -1)),
        "counts out of range",
    ),
    "scoring not a number": (
        lambda s: np.save(s / "scoring.npy", np.full_like(np.load(s / "scoring.npy"), np.nan)),
        "counts out of range",
    ),
    "scoring pickled": (lambda s: (s / "scoring.npy").write_bytes(pickle.dumps(Bomb())), "scoring.npy is damaged"),
    "scoring of pickled objects": (
        lambda s: np.save(s / "scoring.npy", np.array([Bomb()], object), allow_pickle=True),
        "scoring.npy is damaged",
    ),
    "scoring zipped": (lambda s: (s / "scoring.npy").write_bytes(b"PK\x03\x04" + bytes(60)), "scoring.npy is damaged"),
    "scoring an archive": (lambda s: archive(s / "scoring.npy"), "scoring"),
}


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return (os.abort, ())


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_snapshot_is_refused_and_says_why(history, snapshot, name) -> None:
    damage, says = DAMAGE[name]
    damage(snapshot)
    with pytest.raises(DraftError, match=says) as error:
        history.open(snapshot)
    assert "snapshot" in str(error.value) or "planner" in str(error.value) or "scoring" in str(error.value)


def test_another_tokenizer_is_refused(history, saved) -> None:
    with pytest.raises(DraftError, match="another tokenizer"):
        history.open(saved, tokenizer=0)


def test_every_flipped_bit_of_a_segment_is_refused(history, snapshot, tmp_path) -> None:
    """All bits of the header, and 400 bits elsewhere, the last ones among them."""
    data = bytearray((snapshot / "000.segment").read_bytes())
    inside = range(HEADER.size * 8, len(data) * 8)
    bits = [*range(HEADER.size * 8), *random.Random(0).sample(inside, 400), *inside[-8:]]
    path, index = tmp_path / "flipped", SuffixIndex(tokenizer=history.TOKENIZER)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(DraftError, match="flipped"):
            index.open_segment(str(path))
        data[bit // 8] ^= 1 << bit % 8
    assert index.segments() == []
    path.write_bytes(data)
    index.open_segment(str(path))


@pytest.mark.parametrize("name", ["manifest.json", "scoring.npy"])
def test_a_changed_byte_elsewhere_is_refused_or_harmless(history, snapshot, name) -> None:
    """These files carry no checksum: whatever their bytes say, the answer is a DraftError or a working drafter."""
    data, rng, refused = (snapshot / name).read_bytes(), random.Random(1), 0
    header = range(min(len(data), 400))
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.choice(header) if rng.random() < 0.5 else rng.randrange(len(data))] = rng.randrange(256)
        (snapshot / name).write_bytes(changed)
        try:
            drafter = history.open(snapshot)
        except DraftError:
            refused += 1
        else:
            history.read_through(drafter, "a", [0, 1, 2])
    assert refused > 50


# Structure, behind the checksum.


def mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def checksum(data: bytes) -> int:
    lanes = [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63]
    whole = len(data) - len(data) % 32
    words = [(i // 8 % 4, int.from_bytes(data[i : i + 8], "little")) for i in range(0, whole, 8)]
    for lane, word in [*words, *((i & 3, data[i]) for i in range(whole, len(data)))]:
        lanes[lane] = ((lanes[lane] ^ word) * 0x9FB21C651E98DF25 + 1) & MASK
    mixed = mix(lanes[0])
    for lane in lanes[1:]:
        mixed = mix(mixed ^ lane)
    return mixed ^ len(data)


def seal(data: bytes | bytearray, size: bool = False) -> bytes:
    """Write the checksum, and with `size` the size, that belong to the content."""
    data = bytearray(data)
    if size:
        struct.pack_into("<Q", data, SIZE_AT, len(data))
    struct.pack_into("<Q", data, CHECKSUM_AT, 0)
    value = mix(checksum(bytes(data[: HEADER.size]))) ^ checksum(bytes(data[HEADER.size :]))
    struct.pack_into("<Q", data, CHECKSUM_AT, value)
    return bytes(data)


@pytest.fixture(scope="module")
def segment(tmp_path_factory) -> bytes:
    """A small segment of three problems, one of them with 60 rollouts of equal beginnings."""
    index, rng = SuffixIndex(cross_tokens=0), random.Random(0)
    for problem, rollouts in ((5, 1), (6, 12), (1 << 62, 2)):
        for _ in range(rollouts):
            handle = index.begin(problem, [])
            feed(index, handle, [7, 7, *(rng.randrange(3) for _ in range(rng.randrange(9)))])
            index.end(handle, True)
    index.close_epoch(0)
    path = tmp_path_factory.mktemp("segment") / "s"
    index.write_segment(0, str(path))
    return path.read_bytes()


def feed(index: SuffixIndex, handle: int, tokens: list[int], cap: int = 0) -> list[int]:
    ones = np.array([cap], np.uint32)
    offsets = np.array([0, len(tokens)], np.uint32)
    return index.propose_batch(np.array([handle]), np.array(tokens, np.int32), offsets, ones, np.zeros(1, np.float32))[
        0
    ].tolist()


def test_the_checksum_of_this_test_is_the_one_of_the_format(segment) -> None:
    assert seal(segment, size=True) == segment


def open_bytes(data: bytes, path: Path) -> bool:
    """Open a segment of these bytes; if it is taken, use it thoroughly. Returns whether it was taken."""
    path.write_bytes(data)
    index = SuffixIndex(cross_tokens=0, min_probability=1e-6)
    try:
        index.open_segment(str(path))
    except DraftError:
        return False
    index.check_integrity()
    keys = [
        ENTRY.unpack_from(data, HEADER.size + i * ENTRY.size)[0] for i in range(min(HEADER.unpack_from(data)[8], 9))
    ]
    for key in {5, 6, 1 << 62, *keys}:
        handle, draft = index.begin(key, [3]), []
        for token in (7, 7, 0, 1, 2, 0, 7, 7, 9):
            draft = feed(index, handle, [token, *draft[:2]], cap=16)
            assert all(t >= 0 for t in draft)
        index.end(handle, True)
    index.close_epoch(1)
    index.check_integrity()
    return True


SPECIAL_WORDS = [0, 1, 2, 7, 12, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF]
EDITS = st.lists(st.tuples(st.integers(0, 400), st.sampled_from(SPECIAL_WORDS) | st.integers(0, 300)), max_size=3)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, length=st.none() | st.integers(80, 1200), keep=st.integers(2, 19))
def test_structure_is_checked_behind_the_checksum(segment, tmp_path, edits, length, keep) -> None:
    """A sealed file of any content is refused, or is sound and can be drafted from."""
    data = bytearray(segment if length is None else segment[:length].ljust(length, b"\1"))
    for at, word in edits:
        at = at if at >= 8 else 8 + keep  # headers with a wrong magic are dull
        if 4 * at + 4 <= len(data):
            struct.pack_into("<I", data, 4 * at, word)
    open_bytes(seal(data, size=True), tmp_path / "s")


def test_single_wrong_words_are_refused(segment, tmp_path) -> None:
    """Every word of table, text and order set to -1 in turn: none of these is a segment."""
    taken = []
    for at in range(HEADER.size, len(segment), 4):
        data = bytearray(segment)
        if data[at : at + 4] == b"\xff\xff\xff\xff":
            continue
        struct.pack_into("<I", data, at, 0xFFFFFFFF)
        if open_bytes(seal(data), tmp_path / "s"):
            taken.append(at)
    # A key may be any number, as long as keys rise: both halves of the last one, and the lower half of the others.
    keys = {HEADER.size + i * ENTRY.size + half for i in range(3) for half in (0, 4)}
    texts = {at for at in taken if at not in keys}
    assert len(texts) == 0, f"words {sorted(texts)}"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_no_segment(tmp_path, data, headed) -> None:
    if headed:
        data = HEADER.pack(b"RLSUFFIX", 1, 0x01020304, 0, 0, 0, 0, 0, data[0] if data else 0, 1, 1) + data
        open_bytes(seal(data, size=True), tmp_path / "s")
    else:
        assert not open_bytes(data, tmp_path / "s")
