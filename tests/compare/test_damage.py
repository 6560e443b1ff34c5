"""Damaged files of every kind: a reader answers with what it read or one CompareError, soon and in little memory.

Files are mutated as bytes (flips, cuts, insertions, swaps, splices of two files) and, where a checksum or a syntax
would stop that at the door, inside: values of JSON records, payloads of a wandb file, arrays of a token file. A
mutant is made from its number alone: the number in a failure brings it back. `RL_ACCEL_SOAK=34` makes it 10,200 of
each kind.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from rl_accel.compare import report
from rl_accel.compare.plot import plot_runs
from rl_accel.compare.reading import parse_metrics_line
from rl_accel.compare.reuse import check_same_settings, is_finished, read_config
from rl_accel.compare.runs import Run, load_run
from rl_accel.compare.tokens import compare_tokens, load_tokens, save_tokens
from rl_accel.compare.verdict import Criteria, compare_arms
from rl_accel.errors import CompareError

FACTOR = int(os.environ.get("RL_ACCEL_SOAK", "1"))
MUTANTS = 300 * FACTOR
SECONDS, BYTES = 5.0, 64 * 2**20
"""What reading a file of a few KB may cost: time of the processor, and memory."""

NASTY_BYTES = (b"\x00" * 40, b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\xff\xfe", b"\n", b'"', b"NaN", b"&a *a")
NASTY_VALUES = (
    None, True, -1, 0, 10**400, 2**63, 2**31, 1e308, -1e308, 5e-324, 0.5, "", "NaN", "Infinity", "$\\frac{$", "\ud800",
    "a\nb|c", "\u202e", [], {}, [[]], {"a": {"b": None}},
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of file: two valid ones, who reads it, and how to change it behind its checksums."""

    name: str
    """Where in the run folder it lies."""
    valid: Callable[[], list[bytes]]
    read: Callable[[Path], None]
    inside: Callable[[bytes, random.Random], bytes]


def mutated(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """One to four changes that disks, crashes and bad copies make."""
    for _ in range(dice.randint(1, 4)):
        at, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        head, block, tail = data[:at], data[at:end], data[end:]
        change = dice.randrange(10)
        if change == 0:
            data = head + dice.randbytes(1) + data[at + 1 :]
        elif change == 1:
            data = head + bytes(byte ^ 1 << dice.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]
        elif change == 2:
            data = head
        elif change == 3:
            data = head + tail
        elif change == 4:
            data = head + dice.randbytes(dice.randint(1, 9)) + block + tail
        elif change == 5:
            data = head + dice.choice(NASTY_BYTES) + block + tail
        elif change == 6:
            data = head + block * 2 + tail
        elif change == 7:
            data = tail + block + head
        elif change == 8:
            data = head + other[dice.randrange(len(other) + 1) :]
        else:
            data = head + bytes(len(block)) + tail
    return data


def metrics_file(seed: int) -> bytes:
    draws = np.random.default_rng(seed)
    lines = []
    for step in range(1, 13):
        data = {"critic/score/mean": draws.random(), "response_length/mean": 90 + draws.random(), "actor/lr": None}
        data |= {"timing_s/gen": 3 + draws.random(), "timing_s/step": 7 + draws.random(), "val-core/x/acc/mean@1": 0.5}
        lines.append(json.dumps({"step": step, "data": data}, separators=(",", ":")) + "\n")
    return "".join(lines).encode()


def info_file(seed: int) -> bytes:
    command = ["python", "-m", "rl_accel.train", "recipe=r", f"rl_accel.seed={seed}"]
    info = {"command": command, "recipe": "r", "arm": "none", "seed": seed, "versions": {"vllm": "0"}, "finished": True}
    return json.dumps(info, indent=1).encode()


def changed_value(value, dice: random.Random):
    """A JSON value with one of its parts replaced, dropped or renamed."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        changed = {**value, key: changed_value(value[key], dice)}
        if dice.random() < 0.2:
            changed.pop(key)
        if dice.random() < 0.2:
            changed[str(dice.choice(NASTY_VALUES))] = changed.pop(key, 1.0)
        return changed
    if isinstance(value, list) and value and dice.random() < 0.9:
        at = dice.randrange(len(value))
        return [*value[:at], changed_value(value[at], dice), *value[at + 1 :]]
    return dice.choice(NASTY_VALUES)


def change_lines(data: bytes, dice: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    lines[at] = change_json(lines[at], dice) + b"\n"
    return b"".join(lines)


def change_json(data: bytes, dice: random.Random) -> bytes:
    return json.dumps(changed_value(json.loads(data), dice)).encode()


@functools.cache
def sound_run(folder: Path, arm: str) -> Run:
    return load_run(folder, arm)


def read_folder(folder: Path) -> None:
    """All that `compare` does with a run, but drawing, which is slow and comes last."""
    run = load_run(folder)
    arms = {
        "sound": [sound_run(folder.parent / f"sound{i}", "sound") for i in range(2)],
        "damaged": [replace(run, arm="damaged"), sound_run(folder.parent / "sound2", "damaged")],
    }
    comparison = compare_arms(arms["sound"], arms["damaged"], Criteria())
    report.markdown(arms, [comparison], Criteria()).encode("utf-8", "backslashreplace")
    json.dumps(report.as_json(arms, [comparison], Criteria()), allow_nan=False)
    for line in (folder / "metrics.jsonl").read_bytes().split(b"\n"):
        try:
            parse_metrics_line(line, "a line")
        except CompareError:
            continue


def read_info(folder: Path) -> None:
    read_folder(folder)
    is_finished(folder)
    check_same_settings(folder, ["recipe=r", "rl_accel.seed=7"])


def token_file(seed: int) -> bytes:
    path = Path(os.environ["PYTEST_DAMAGE_FOLDER"]) / f"valid{seed}" / "1.npz"
    draws = np.random.default_rng(seed)
    save_tokens(path, list("ppqq"), [0, 1, 0, 1], [5] * 4, [draws.integers(0, 999, 8).tolist() for _ in range(4)])
    return path.read_bytes()


def change_arrays(data: bytes, dice: random.Random) -> bytes:
    """Mutate one array or its header and pack it again, with checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice(list(members))
    member = members[name]
    if dice.random() < 0.5:
        shape = dice.choice((b"(10**12,)", b"(999999999999,)", b"(0,)", b"(4, 1)", b"()", b"(-1,)", b"(True,)", b"4"))
        descr = dice.choice((b"<i4", b"<i8", b"|O", b"<U0", b"<U999999999", b">i4", b"|V8", b"<f8", b"|S4", b"<M8[s]"))
        header = b"{'descr': '%b', 'fortran_order': False, 'shape': %b, }" % (descr, shape)
        header = header.ljust(117) + b"\n"
        member = member[:8] + struct.pack("<H", len(header)) + header + member[128:]
    members[name] = mutated(member, dice.choice(list(members.values())), dice) if dice.random() < 0.7 else member
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", dice.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return packed.getvalue()


def read_tokens(folder: Path) -> None:
    compare_tokens(folder / "tokens", folder.parent / "sound0" / "tokens")


def wandb_file(seed: int) -> bytes:
    from wandb.proto import wandb_internal_pb2 as messages

    run = messages.Record()
    run.run.display_name = f"none-seed{seed}"
    history = []
    for line in metrics_file(seed).splitlines():
        record, row = json.loads(line), messages.Record()
        for key, value in {**record["data"], "_step": record["step"]}.items():
            row.history.item.add(key=key, value_json=json.dumps(value))
        history.append(row)
    end = messages.Record()
    end.exit.exit_code = 0
    return framed([record.SerializeToString() for record in (run, *history, end)])


def framed(payloads: list[bytes]) -> bytes:
    """LevelDB's log: whole records, and what crosses a block of 32 KiB in pieces."""
    out = bytearray(struct.pack("<4sHB", b":W&B", 0xBEE1, 0))
    for payload in payloads:
        first = True
        while first or payload:
            room = 32768 - len(out) % 32768
            if room < 7:
                out += bytes(room)
                continue
            piece, payload = payload[: room - 7], payload[room - 7 :]
            kind = (1 if first else 4) if not payload else (2 if first else 3)
            out += struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece
            first = False
    return bytes(out)


def change_payloads(data: bytes, dice: random.Random) -> bytes:
    """Mutate records, as bytes or in the values of an item, behind checksums that fit."""
    from wandb.proto import wandb_internal_pb2 as messages

    at, payloads = 7, []
    while at < len(data):
        (length,) = struct.unpack_from("<H", data, at + 4)
        payloads.append(data[at + 7 : at + 7 + length])
        at += 7 + length
    i = dice.randrange(len(payloads))
    record = messages.Record.FromString(payloads[i])
    if record.history.item and dice.random() < 0.6:
        item = dice.choice(record.history.item)
        item.value_json = dice.choice((json.dumps(dice.choice(NASTY_VALUES)), "[" * 50_000, "", "9" * 5000, "-"))
        item.key = dice.choice((item.key, "_step", "", "critic/score/mean"))
        payloads[i] = record.SerializeToString()
    else:
        payloads[i] = mutated(payloads[i], dice.choice(payloads), dice)
    return framed(payloads)


def read_wandb(folder: Path) -> None:
    load_run(folder / "run-x.wandb")


def config_file(seed: int) -> bytes:
    import yaml

    settings = {"trainer": {"device": "cpu", "logger": ["file"], "steps": 4}, "data": {"source": "gsm8k", "path": None}}
    return yaml.safe_dump({**settings, "rl_accel": {"seed": seed, "lr": 1e-6, "arm": "none"}}).encode()


def change_config(data: bytes, dice: random.Random) -> bytes:
    import yaml

    return yaml.safe_dump(changed_value(yaml.safe_load(data), dice), allow_unicode=dice.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


KINDS = (
    Kind("metrics.jsonl", lambda: [metrics_file(7), metrics_file(8)], read_folder, change_lines),
    Kind("run.json", lambda: [info_file(7), info_file(7)], read_info, change_json),
    Kind("tokens/1.npz", lambda: [token_file(7), token_file(8)], read_tokens, change_arrays),
    Kind("run-x.wandb", lambda: [wandb_file(7), wandb_file(8)], read_wandb, change_payloads),
    Kind(
        "config.yaml",
        lambda: [config_file(7), config_file(8)],
        lambda folder: repr(read_config(folder / "config.yaml")),
        change_config,
    ),
)


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Three sound runs, and `damaged`, a fourth one whose files are replaced by mutants."""
    monkeypatch.setenv("PYTEST_DAMAGE_FOLDER", str(tmp_path))
    for i, name in enumerate(("sound0", "sound1", "sound2", "damaged")):
        (tmp_path / name / "tokens").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_bytes(metrics_file(i))
        (tmp_path / name / "run.json").write_bytes(info_file(i))
    (tmp_path / "sound0" / "tokens" / "1.npz").write_bytes(token_file(7))
    return tmp_path


@pytest.mark.timeout(900 * FACTOR)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_damage_escapes(kind, folders):
    valid = kind.valid()
    target = folders / "damaged" / kind.name
    target.write_bytes(valid[0])
    kind.read(folders / "damaged")  # what is not damaged is read
    refused, slowest, largest = 0, 0.0, 0
    tracemalloc.start()
    try:
        for number in range(MUTANTS):
            dice = random.Random(f"{kind.name} {number}")
            data = valid[number % 2]
            inside = number % 3 == 0
            target.write_bytes(kind.inside(data, dice) if inside else mutated(data, valid[1 - number % 2], dice))
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                kind.read(folders / "damaged")
            except CompareError:
                refused += 1
            except BaseException as error:
                raise AssertionError(f"mutant {number} of {kind.name} escapes: {error!r}") from error
            slowest = max(slowest, time.process_time() - started)
            largest = max(largest, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    print(f"{kind.name}: {MUTANTS} mutants, {refused} refused, slowest {slowest:.2f} s, {largest / 2**20:.1f} MiB")
    assert 0.05 * MUTANTS < refused < MUTANTS
    assert slowest < SECONDS
    assert largest < BYTES


def test_weird_numbers_and_names_are_drawn(folders):
    """The plot comes after all else and must not fail either: mutants that were read are drawn."""
    drawn = 0
    for number in range(100 * FACTOR):
        if drawn == 3 * FACTOR:
            break
        dice = random.Random(f"drawn {number}")
        (folders / "damaged" / "metrics.jsonl").write_bytes(change_lines(metrics_file(number), dice))
        (folders / "damaged" / "run.json").write_bytes(change_json(info_file(number), dice))
        try:
            run = load_run(folders / "damaged")
        except CompareError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that the font lacks
            plot_runs([run, load_run(folders / "sound0")], folders / "x.png", f"{run.arm} $\\bad$ {run.name}")
        drawn += 1
    assert drawn == 3 * FACTOR


def peak_of(read: Callable[[], object]) -> int:
    """Most bytes that a read which is refused holds at a time."""
    tracemalloc.start()
    try:
        with pytest.raises(CompareError, match="damaged"):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_announced_size_is_not_believed(folders):
    """A header of 10^12 elements, a directory that announces 3 GB, and one that announces 256 B for 50 MB."""
    whole, path = token_file(7), folders / "1.npz"
    path.write_bytes(change_member(whole, "token_ids.npy", lambda data: data.replace(b"(32,)", b"(10**12,)")))
    assert peak_of(lambda: load_tokens(path)) < 2**21
    path.write_bytes(
        change_member(whole, "token_ids.npy", lambda data: data.replace(b"(32,), }    ", b"(999999999999,), }"))
    )
    assert peak_of(lambda: load_tokens(path)) < 2**21
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        size = archive.getinfo("token_ids.npy").file_size
    path.write_bytes(whole.replace(struct.pack("<I", size), struct.pack("<I", 3 * 10**9)))
    assert peak_of(lambda: load_tokens(path)) < 2**21
    bomb = change_member(whole, "token_ids.npy", lambda data: data + bytes(50 * 2**20))
    with zipfile.ZipFile(io.BytesIO(bomb)) as archive:
        large = archive.getinfo("token_ids.npy").file_size
    path.write_bytes(bomb.replace(struct.pack("<I", large), struct.pack("<I", size)))
    assert peak_of(lambda: load_tokens(path)) < 2**21


def change_member(data: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as changed:
        for member in archive.namelist():
            content = archive.read(member)
            changed.writestr(member, change(content) if member == name else content)
    return packed.getvalue()


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 1, "data": {"a": ' + b"1" * 5000 + b"}}",
        b'{"step": 1, "data": {"a": ' + b"1" * 400 + b"}}",
        b'{"step": 1e400, "data": {}}',
        b'{"step": ' + b"1" * 300 + b', "data": {}}',
        b'{"step": -1, "data": {}}',
        b'{"step": true, "data": {}}',
        b'{"step": 1.5, "data": {}}',
        b'{"step": 1, "data": ' + b"[" * 100_000 + b"}",
        b'{"step": 1, "data": {"\\ud800": 1}}',
        b'{"step": 1, "data": {"\xe9": 1}}',
        b'{"step": 1, "data": [1]}',
        b"[]",
        b"\x00" * 50,
        json.dumps({"step": 1, "data": {}}).encode("utf-16"),
    ],
    ids=lambda line: repr(line[:40]),
)
def test_damaged_metrics_lines_are_named(folders, line):
    path = folders / "damaged" / "metrics.jsonl"
    path.write_bytes(metrics_file(0) + line + b"\n" + metrics_file(1))
    with pytest.raises(CompareError, match=r"metrics\.jsonl, line 13 is not a metrics record, or is damaged"):
        load_run(folders / "damaged")


def test_a_few_bytes_of_yaml_do_not_become_gigabytes(folders):
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    (folders / "config.yaml").write_text("a0: &a0 [lol]\n" + levels)
    with pytest.raises(CompareError, match="aliases"):
        read_config(folders / "config.yaml")
    (folders / "config.yaml").write_text("a: " + "[" * 101)
    with pytest.raises(CompareError, match="more than 100 brackets are open"):
        read_config(folders / "config.yaml")
    for text in (
        "[" * 100_000,
        "a: " * 100_000,
        "- " * 100_000,
        "&a [*a]",
        "!!python/object:os.system {}",
        "\x00",
        "5",
    ):
        (folders / "config.yaml").write_text(text)
        with pytest.raises(CompareError, match=r"config\.yaml is not a configuration"):
            read_config(folders / "config.yaml")


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "tokens/1.npz", "config.yaml"])
def test_a_folder_in_place_of_a_file_is_a_plain_error(folders, name):
    damaged = folders / "damaged"
    (damaged / name).unlink(missing_ok=True)
    (damaged / name).mkdir()
    with pytest.raises(CompareError):
        load_run(damaged)
        compare_tokens(damaged / "tokens", folders / "sound0" / "tokens")
        check_same_settings(damaged, [])
