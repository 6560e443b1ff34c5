"""Snapshots of drafting history: what is saved comes back, what is damaged is refused, a killed save harms nothing."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_accel.draft import DraftConfig, SuffixDrafter
from rl_accel.draft.index import SuffixIndex
from rl_accel.errors import DraftError

CONFIG = DraftConfig(method="das", policy="fixed", cross_problems=False)
TOKENIZER = 77
HEADER, ENTRY = struct.Struct("<8sIIQQQqqQQQ"), struct.Struct("<QQQII")
SIZE_AT, CHECKSUM_AT = 16, 24
MASK = (1 << 64) - 1


def teach(drafter: SuffixDrafter, problem: str, text: list[int]) -> None:
    drafter.begin("teacher", problem, [1])
    for at in range(0, len(text), 50):
        drafter.propose(["teacher"], [text[at : at + 50]], 0)
    drafter.end("teacher")


def read_through(drafter: SuffixDrafter, problem: str, text: list[int]) -> list[list[int]]:
    """Return the drafts of a request that samples `text`, a token a pass."""
    drafter.begin("reader", problem, [1])
    drafts = [drafter.propose(["reader"], [[token]], 8)[0] for token in text]
    drafter.end("reader", keep=False)
    return drafts


def taught(epochs: int = 3, seed: int = 0) -> SuffixDrafter:
    drafter, rng = SuffixDrafter(CONFIG, tokenizer=TOKENIZER), random.Random(seed)
    for epoch in range(epochs):
        for problem in "ab":
            text = [rng.randrange(6) for _ in range(200)]
            teach(drafter, problem, text)
            read_through(drafter, problem, text[:50])
        for _ in range(100):
            drafter.observe_pass(rng.uniform(0.01, 0.02), rng.randint(1, 9), rng.randint(0, 9))
        drafter.close_epoch(epoch, policy_version=10 * epoch)
    return drafter


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("history") / "snapshot"
    taught().save(path)
    return path


@pytest.fixture
def snapshot(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "snapshot"))


def open_it(path: Path, tokenizer: int = TOKENIZER) -> SuffixDrafter:
    return SuffixDrafter.open(path, CONFIG, tokenizer=tokenizer)


# What is saved comes back.


@pytest.mark.parametrize("pending", [True, False], ids=["rollouts that wait for the close", "all closed"])
def test_a_reopened_drafter_drafts_as_the_saved_one(tmp_path, pending) -> None:
    """Also the ages of epochs are the same, by which predictions are weighed; an empty close at the save moved them."""
    drafter, rng = taught(), random.Random(9)
    if pending:
        teach(drafter, "a", [rng.randrange(6) for _ in range(100)])
    drafter.save(tmp_path / "s")
    copy = open_it(tmp_path / "s")
    copy.index.check_integrity()
    assert (copy.epoch, copy.window) == (drafter.epoch, drafter.window) == (3, 8)
    assert copy.planner.state_dict() == drafter.planner.state_dict()
    assert copy.index.segments() == drafter.index.segments()
    assert [s["policy_version"] for s in copy.index.segments() if s["epoch"] < 3] == [20, 10, 0]
    assert np.array_equal(copy.index.scoring_state(), drafter.index.scoring_state())
    drafter.take_source_stats()
    for problem in "ab":
        text = [rng.randrange(6) for _ in range(100)]
        drafts = read_through(drafter, problem, text)
        assert drafts == read_through(copy, problem, text)
        assert sum(map(len, drafts)) > 200
    found, expected = copy.take_source_stats(), drafter.take_source_stats()
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}


def test_a_snapshot_of_nothing_is_a_snapshot(tmp_path) -> None:
    SuffixDrafter(CONFIG, tokenizer=TOKENIZER).save(tmp_path / "s")
    assert open_it(tmp_path / "s").index.segments() == []


def test_saving_again_replaces_the_snapshot_whole(tmp_path) -> None:
    taught(epochs=4).save(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("*.segment"))) == 4
    taught(epochs=1, seed=1).save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path / "s")) == ["000.segment", "manifest.json", "scoring.npy"]
    assert os.listdir(tmp_path) == ["s"]
    assert open_it(tmp_path / "s").epoch == 1


def test_a_smaller_window_opens_the_newest_epochs_only(snapshot) -> None:
    config = DraftConfig(method="das", window=2)
    drafter = SuffixDrafter.open(snapshot, config, tokenizer=TOKENIZER)
    assert drafter.window == 2
    assert [s["epoch"] for s in drafter.index.segments()] == [2, 1]


@pytest.mark.parametrize(
    "kind", ["foreign file", "foreign manifest", "snapshot with a foreign file", "snapshot without manifest", "a file"]
)
def test_what_is_no_snapshot_is_not_replaced(tmp_path, kind) -> None:
    target = tmp_path / "s"
    if kind == "a file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind.startswith("snapshot"):
            taught(epochs=1).save(target)
        if kind == "snapshot without manifest":
            (target / "manifest.json").unlink()
        name = {"foreign manifest": "manifest.json", "snapshot without manifest": "x.segment"}.get(kind, "thesis.tex")
        (target / name).write_text('{"name": "precious"}')
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(DraftError, match="not a snapshot"):
        taught(epochs=1).save(target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DraftError, match="file/s"):
        taught(epochs=1).save(tmp_path / "file" / "s")
    with pytest.raises(DraftError, match="file/s"):
        open_it(tmp_path / "file" / "s")


def test_a_mapped_segment_outlives_its_file(snapshot) -> None:
    drafter, expected = open_it(snapshot), taught()
    expected.save(snapshot.with_name("other"))
    text = [0, 1, 2, 3] * 5
    shutil.rmtree(snapshot)
    assert read_through(drafter, "a", text) == read_through(expected, "a", text)
    drafter.index.check_integrity()
    drafter.save(snapshot)
    assert open_it(snapshot).index.segments() == drafter.index.segments()


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
def test_a_damaged_snapshot_is_refused_and_says_why(snapshot, name) -> None:
    damage, says = DAMAGE[name]
    damage(snapshot)
    with pytest.raises(DraftError, match=says) as error:
        open_it(snapshot)
    assert "snapshot" in str(error.value) or "planner" in str(error.value) or "scoring" in str(error.value)


def test_another_tokenizer_is_refused(saved) -> None:
    with pytest.raises(DraftError, match="another tokenizer"):
        open_it(saved, tokenizer=0)


def test_every_flipped_bit_of_a_segment_is_refused(snapshot, tmp_path) -> None:
    """All bits of the header, and 400 bits elsewhere, the last ones among them."""
    data = bytearray((snapshot / "000.segment").read_bytes())
    inside = range(HEADER.size * 8, len(data) * 8)
    bits = [*range(HEADER.size * 8), *random.Random(0).sample(inside, 400), *inside[-8:]]
    path, index = tmp_path / "flipped", SuffixIndex(tokenizer=TOKENIZER)
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
def test_a_changed_byte_elsewhere_is_refused_or_harmless(snapshot, name) -> None:
    """These files carry no checksum: whatever their bytes say, the answer is a DraftError or a working drafter."""
    data, rng, refused = (snapshot / name).read_bytes(), random.Random(1), 0
    header = range(min(len(data), 400))
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.choice(header) if rng.random() < 0.5 else rng.randrange(len(data))] = rng.randrange(256)
        (snapshot / name).write_bytes(changed)
        try:
            drafter = open_it(snapshot)
        except DraftError:
            refused += 1
        else:
            read_through(drafter, "a", [0, 1, 2])
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


# A killed save harms nothing.


def heavy(marker: int) -> SuffixDrafter:
    """A drafter of some hundred kB whose whole content tells `marker`: epochs, tokens, planner."""
    drafter, rng = SuffixDrafter(CONFIG, tokenizer=TOKENIZER), np.random.default_rng(marker)
    for epoch in range(marker):
        for problem in range(20):
            teach(drafter, f"p{problem}", (rng.integers(0, 500, 900) + 1000 * marker).tolist())
        drafter.close_epoch(epoch)
    return drafter


def marker_of(path: Path) -> int:
    """Open a snapshot, check that nothing is missing or mixed, and return whose it is."""
    drafter = open_it(path)
    drafter.index.check_integrity()
    marker = drafter.epoch
    assert [s["epoch"] for s in drafter.index.segments()] == list(range(marker))[::-1]
    assert all(s["num_tokens"] == 20 * 900 for s in drafter.index.segments())
    for epoch in range(marker):
        text = first_text(marker, epoch)
        assert read_through(drafter, "p0", text[:9])[-1][:1] == [text[9]]
    return marker


def first_text(marker: int, epoch: int) -> list[int]:
    rng = np.random.default_rng(marker)
    for _ in range(20 * epoch):
        rng.integers(0, 500, 900)
    return (rng.integers(0, 500, 900) + 1000 * marker).tolist()


def forked(act) -> int:
    """Run `act` in a child; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def test_random_kills_during_saves_leave_a_whole_snapshot(tmp_path) -> None:
    """30 processes save two histories in turn and are killed within 50 ms; a save lasts some 10 ms."""
    path, drafters = tmp_path / "s", [heavy(2), heavy(3)]
    drafters[0].save(path)
    rng, seen, hit = random.Random(0), set(), 0
    for number in range(30):

        def save_for_ever(first=number) -> None:
            for turn in itertools.count(first):
                drafters[turn % 2].save(path)

        pid = forked(save_for_ever)
        while not any(name == f"s.tmp{pid}" for name in os.listdir(tmp_path)):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        hit += any(name.endswith(str(pid)) for name in os.listdir(tmp_path))
        seen.add(marker_of(path))
        assert len(os.listdir(tmp_path)) <= 6, "what killed saves leave behind must not pile up"
    assert hit >= 10 and seen == {2, 3}, (hit, seen)
    drafters[0].save(path)
    assert os.listdir(tmp_path) == ["s"]
    assert marker_of(path) == 2


CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "open", "shutil.rmtree")


def test_a_kill_before_any_change_of_the_file_system_leaves_a_whole_snapshot(tmp_path) -> None:
    """A process is killed before its k-th change, for every k; what one leaves behind is what the next one finds."""
    path, drafters = tmp_path / "s", [heavy(2), heavy(3)]
    drafters[0].save(path)
    current, kills, rng = 2, 0, random.Random(0)
    for number in range(100):
        k = number if number < 30 else rng.randrange(30)
        new = drafters[number % 2]

        def save(new=new, left=k) -> None:
            def hook(event: str, args: tuple) -> None:
                nonlocal left
                if event in CHANGES and str(args[0]).startswith((str(tmp_path), "0", "manifest", "scoring")):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            new.save(path)

        status = os.waitpid(forked(save), 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        found = marker_of(path)
        assert found == new.epoch if not os.WIFSIGNALED(status) else found in (current, new.epoch), (number, k)
        current = found
        kills += os.WIFSIGNALED(status)
    assert kills >= 50
    drafters[0].save(path)
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("newest", [0, 1])
def test_of_two_snapshots_that_killed_saves_put_away_the_newer_one_counts(tmp_path, newest) -> None:
    path, pids = tmp_path / "s", sorted(dead_pids(2), key=str)
    for marker, pid in ((3, pids[1 - newest]), (2, pids[newest])):
        heavy(marker).save(tmp_path / "elsewhere")
        shutil.copytree(tmp_path / "elsewhere", tmp_path / f"s.old{pid}")
        time.sleep(0.02)
    (tmp_path / f"s.old{pids[1 - newest]}" / "000.segment").unlink()  # its removal has begun
    assert marker_of(path) == 2


@pytest.mark.parametrize("pid", ["own", "dead"])
def test_the_only_copy_survives_until_the_new_one_has_its_name(tmp_path, pid) -> None:
    """In a container a restarted process may have the pid of the one that was killed between its renames."""
    path = tmp_path / "s"
    heavy(2).save(path)
    number = os.getpid() if pid == "own" else dead_pids(1)[0]
    path.rename(tmp_path / f"s.old{number}")
    (tmp_path / f"s.tmp{number}").mkdir()
    assert marker_of(path) == 2
    seen: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if seen is not None and active and event == "os.rename" and str(args[1]) == str(path):
            seen.append("old" if (tmp_path / f"s.old{number}" / "manifest.json").exists() else "none")

    active = True
    sys.addaudithook(hook)
    try:
        heavy(3).save(path)
    finally:
        active = False
    assert seen == ["old"]
    assert os.listdir(tmp_path) == ["s"]
    assert marker_of(path) == 3


def dead_pids(n: int) -> list[int]:
    pids = [forked(lambda: None) for _ in range(n)]
    for pid in pids:
        os.waitpid(pid, 0)
    return pids


def test_another_process_that_saves_now_is_left_alone(tmp_path) -> None:
    """Left-overs of live processes are theirs."""
    theirs = tmp_path / f"s.tmp{os.getppid()}"
    theirs.mkdir()
    (tmp_path / "s.tmpfiles").mkdir()
    (tmp_path / "s.old").write_text("mine")
    heavy(2).save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path)) == sorted(["s", "s.old", "s.tmpfiles", theirs.name])
