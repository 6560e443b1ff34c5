"""Snapshots of drafting history: what is damaged is refused and says why, down to single bits of a segment.

`RL_ACCEL_SOAK=50` makes each kind of damage some 10,000 times, which takes some minutes.
"""

from __future__ import annotations

import io
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

from rl_accel.draft.history import LEARNED
from rl_accel.errors import DraftError
from rl_accel.kernels.suffix.api import SuffixIndex

HEADER, ENTRY = struct.Struct("<8sIIQQQqqQQQ"), struct.Struct("<QQQII")
SIZE_AT, CHECKSUM_AT = 16, 24
MASK = (1 << 64) - 1
SOAK = int(os.environ.get("RL_ACCEL_SOAK", "1"))


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
    "manifest of another format": (lambda s: edit_manifest(s, lambda m: m.update(format="x")), "version 2 of x"),
    "manifest of another version": (lambda s: edit_manifest(s, lambda m: m.update(version=1)), "version 1 of"),
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
    "learned missing": (lambda s: (s / LEARNED).unlink(), "learned.npz is damaged"),
    "learned empty": (lambda s: cut(s / LEARNED, 0.0), "learned.npz is damaged"),
    "learned cut": (lambda s: cut(s / LEARNED, 0.5), "learned.npz is damaged"),
    "learned a row": (lambda s: (s / LEARNED).write_bytes(as_file(np.save, np.zeros(7))), "learned.npz is damaged"),
    "learned pickled": (lambda s: (s / LEARNED).write_bytes(pickle.dumps(Bomb())), "learned.npz is damaged"),
    "learned zipped": (lambda s: (s / LEARNED).write_bytes(b"PK\x03\x04" + bytes(60)), "learned.npz is damaged"),
    "lengths missing": (lambda s: edit_learned(s, lambda a: a.pop("lengths")), "planner .*'lengths'|LengthModel"),
    "lengths of another size": (lambda s: edit_learned(s, lambda a: a.update(lengths=a["lengths"][1:])), "LengthModel"),
    "lengths negative": (lambda s: edit_learned(s, lambda a: a.update(lengths=-a["lengths"])), "LengthModel"),
    "scoring missing": (lambda s: edit_learned(s, lambda a: a.pop("scoring")), "learned.npz is damaged"),
    "scoring of another size": (lambda s: edit_learned(s, lambda a: a.update(scoring=a["scoring"][1:])), "another"),
    "scoring of two dimensions": (lambda s: edit_learned(s, lambda a: a.update(scoring=a["scoring"][None])), "scoring"),
    "scoring of texts": (lambda s: edit_learned(s, lambda a: a.update(scoring=np.array(["x", "y"]))), "scoring"),
    "scoring impossible": (lambda s: edit_learned(s, lambda a: a.update(scoring=a["scoring"] - 1)), "out of range"),
    "scoring not a number": (
        lambda s: edit_learned(s, lambda a: a.update(scoring=a["scoring"] * np.float32(np.nan))),
        "out of range",
    ),
    "scoring of pickled objects": (
        lambda s: edit_learned(s, lambda a: a.update(scoring=np.array([Bomb()], object))),
        "learned.npz is damaged",
    ),
}


def edit_learned(snapshot: Path, edit) -> None:
    with np.load(snapshot / LEARNED) as archive:
        arrays = dict(archive)
    edit(arrays)
    (snapshot / LEARNED).write_bytes(as_file(np.savez, **arrays))


def as_file(save, *args, **arrays) -> bytes:
    with io.BytesIO() as file:
        save(file, *args, **arrays)
        return file.getvalue()


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
    assert any(word in str(error.value) for word in ("snapshot", "planner", "scoring", "LengthModel"))


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


@pytest.mark.parametrize("name", ["manifest.json", LEARNED, "001.segment"])
def test_random_damage_is_refused_or_harmless(history, snapshot, name) -> None:
    """Changed, cut, repeated, moved and lengthened: the answer is a DraftError or a drafter that works."""
    data, rng, refused, tries = (snapshot / name).read_bytes(), random.Random(1), 0, 200 * SOAK
    for _ in range(tries):
        changed = damaged(data, rng)
        (snapshot / name).write_bytes(changed)
        try:
            drafter = history.open(snapshot)
        except DraftError:
            refused += 1
            continue
        assert name != "001.segment" or changed == data, "segments carry a checksum of all their bytes"
        drafter.index.check_integrity()
        history.read_through(drafter, "a", [0, 1, 2])
        if rng.random() < 0.05:
            drafter.save(snapshot.with_name("again"))
    print(f"{name}: {refused} of {tries} refused, the rest harmless")
    assert refused > tries / 3


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three changes, half of them near the beginning, where formats are decided."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        size = len(changed)
        at = rng.randrange(max(min(size, 400) if rng.random() < 0.5 else size, 1))
        length = rng.choice([1, 1, 4, 8, rng.randrange(1, 200)])
        kind = rng.randrange(6)
        if kind == 0 and size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at : at + length] = rng.choice([b"\0", b"\xff", b"9", b"["]) * length
        else:
            to = rng.randrange(max(size, 1))
            changed[to : to + length] = changed[at : at + length]
    return bytes(changed)


STRANGE = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "many digits": "9" * 5000,
    "beyond float": "1e999",
    "not a number": "NaN",
    "half a character": '"\\ud800"',
    "zero byte": '"a\\u0000b"',
    "long": '"' + "x" * 5000 + '"',
    "null": "null",
    "object": "{}",
    "negative": "-1",
    "bool": "true",
}
"""Values that Python's own parser, the file system or the extension fail on in ways of their own."""


@pytest.mark.parametrize("value", sorted(STRANGE.keys() - {"negative"}))
@pytest.mark.parametrize("key", ["format", "version", "tokenizer", "epoch", "window", "planner", "segments"])
def test_strange_values_in_a_manifest_are_refused_or_harmless(history, snapshot, key, value) -> None:
    manifest = json.loads((snapshot / "manifest.json").read_text())
    manifest[key] = "HERE"
    (snapshot / "manifest.json").write_text(json.dumps(manifest).replace('"HERE"', STRANGE[value]))
    with pytest.raises(DraftError):
        history.open(snapshot)


@pytest.mark.parametrize("value", STRANGE)
@pytest.mark.parametrize("key", ["file", "num_tokens", "epoch", "foreign", "shared"])
def test_strange_values_about_a_segment_are_refused_or_harmless(history, snapshot, key, value) -> None:
    manifest = json.loads((snapshot / "manifest.json").read_text())
    manifest["segments"][0][key] = "HERE"
    (snapshot / "manifest.json").write_text(json.dumps(manifest).replace('"HERE"', STRANGE[value]))
    try:
        history.open(snapshot)
    except DraftError:
        return
    assert key in ("foreign", "shared") and value not in ("deep", "many digits")


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


@settings(max_examples=500 * SOAK, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=200 * SOAK, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_no_segment(tmp_path, data, headed) -> None:
    if headed:
        data = HEADER.pack(b"RLSUFFIX", 1, 0x01020304, 0, 0, 0, 0, 0, data[0] if data else 0, 1, 1) + data
        open_bytes(seal(data, size=True), tmp_path / "s")
    else:
        assert not open_bytes(data, tmp_path / "s")
