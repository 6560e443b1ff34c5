"""The replay counts what can be counted by hand, and its ngram drafts are vLLM's."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rl_accel.draft.record import Rollout, append_rollouts
from rl_accel.draft.replay import Arctic, Das, Ngram, replay
from rl_accel.errors import DraftError

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench_draft.py"
HAS_ARCTIC = importlib.util.find_spec("arctic_inference") is not None


def rollout(tokens, epoch=0, problem="p", sample=0, prompt=()) -> Rollout:
    return Rollout(epoch, epoch, problem, sample, tuple(prompt), tuple(tokens))


def rollouts_of_siblings(seed: int, epochs: int = 3) -> list[Rollout]:
    """Three problems with four samples, made of each problem's phrases; lengths differ, one is empty."""
    rng = random.Random(seed)
    phrases = {p: [[rng.randrange(50) for _ in range(rng.randrange(3, 9))] for _ in range(5)] for p in "abc"}
    out = []
    for epoch in range(epochs):
        for problem in "abc":
            for sample in range(4):
                text = [token for _ in range(rng.randrange(1, 8)) for token in rng.choice(phrases[problem])]
                out.append(rollout(text, epoch, problem, sample, phrases[problem][0]))
    return [*out, rollout([], epochs - 1, "a", 4)]


def test_ngram_counts_by_hand():
    # Text ends by [1, 2] after six tokens: [3, 4] is drafted and right, the target adds 1; then [2, 3] and 4.
    counts = replay([rollout([1, 2, 3, 4] * 3)], Ngram(max_draft=2, min_n=2, max_n=4)).total
    assert (counts.request_steps, counts.drafted, counts.accepted, counts.emitted) == (7, 4, 4, 12)
    assert counts.engine_steps == 8


def test_ngram_wrong_draft_is_cut_at_the_first_error():
    # Behind [1, 2, 3, 9, 1, 2], [3, 9, 1] is drafted; 3 is right, 8 comes instead of 9.
    counts = replay([rollout([1, 2, 3, 9, 1, 2, 3, 8])], Ngram(max_draft=3, min_n=2, max_n=4)).total
    assert (counts.request_steps, counts.drafted, counts.accepted, counts.emitted) == (6, 3, 1, 8)


def test_ngram_reads_the_prompt():
    counts = replay([rollout([1, 2, 3, 4, 5], prompt=[7, 1, 2, 3, 4, 5])], Ngram(3, min_n=1, max_n=3)).total
    # The first token comes from the prompt's step; then [2, 3, 4] and 5.
    assert (counts.request_steps, counts.accepted, counts.emitted) == (1, 3, 5)


@pytest.mark.parametrize("length", [2, 10, 11, 41])
@pytest.mark.parametrize("cap", [1, 4])
def test_das_repeats_the_last_epoch(length, cap):
    tokens = range(100, 100 + length)
    result = replay([rollout(tokens, 0), rollout(tokens, 1)], Das(max_draft=cap))
    first, second = result.epochs[0], result.epochs[1]
    assert (first.request_steps, first.drafted, first.accepted) == (length - 1, 0, 0)
    # One token is the prompt step's; every step then emits the whole draft and one token of the target's own.
    assert second.request_steps == -(-(length - 1) // (cap + 1))
    assert second.accepted == (length - 1) - (length - 1) // (cap + 1)
    assert first.emitted == second.emitted == length


def test_das_reads_a_sibling_that_is_ahead():
    tokens = range(100, 121)
    counts = replay([rollout(tokens, sample=i) for i in range(2)], Das(max_draft=4), concurrency=1).total
    assert (counts.request_steps, counts.accepted, counts.emitted) == (20 + 4, 16, 42)


def test_das_threshold_shortens_drafts():
    data = rollouts_of_siblings(0)
    drafted = [replay(data, Das(8, threshold)).total.drafted for threshold in (0.0, 0.3, 1.1)]
    assert drafted[0] > drafted[1] > drafted[2] == 0


def test_das_by_source_adds_up():
    das = Das(max_draft=6)
    counts = replay(rollouts_of_siblings(1), das).total
    cells = das.by_source()
    drafts, drafted, accepted = sum(cells.values())
    assert (drafted, accepted) == (counts.drafted, counts.accepted)
    assert 0 < drafts <= counts.request_steps
    assert {"self", "sibling", "epoch_1", "epoch_2"} <= {source for source, _ in cells}


@pytest.mark.parametrize("kind", [Das, Ngram, *([Arctic] if HAS_ARCTIC else [])])
def test_emitted_tokens_do_not_depend_on_drafter_or_concurrency(kind):
    data = rollouts_of_siblings(2)
    recorded = sum(len(r.token_ids) for r in data)
    for concurrency in (1, 3, None):
        counts = replay(data, kind(5), concurrency).total
        assert counts.emitted == recorded
        assert counts.accepted <= counts.drafted <= 5 * counts.request_steps
        # A step emits what it accepted and one token more, unless the text ends with a draft token.
        num_texts = sum(1 for r in data if r.token_ids)
        assert recorded <= counts.request_steps + counts.accepted + num_texts <= recorded + num_texts


def test_refuses_epochs_out_of_order_and_concurrency_of_none():
    with pytest.raises(DraftError, match="epoch 0 comes up again"):
        replay([rollout([1], 0), rollout([1], 1), rollout([1], 0)], Ngram(2))
    with pytest.raises(DraftError, match="at least 1"):
        replay([rollout([1])], Ngram(2), concurrency=0)


@pytest.mark.parametrize(("min_n", "max_n"), [(1, 1), (2, 4), (3, 5)])
def test_ngram_drafts_are_those_of_vllm(min_n, max_n):
    from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find

    rng = random.Random(0)
    for alphabet in (2, 4, 30):
        text = [rng.randrange(alphabet) for _ in range(120)]
        ngram = Ngram(5, min_n, max_n)
        ngram.begin("r", "p", text[:7])
        for i in range(7, len(text)):
            [draft] = ngram.propose(["r"], [text[i : i + 1]])
            assert draft == find(np.array(text[: i + 1], np.int32), min_n, max_n, 1 << 20, 5).tolist()


def test_bench_draft_writes_its_rows(tmp_path):
    append_rollouts(tmp_path / "tiny.jsonl", rollouts_of_siblings(3, epochs=2))
    command = [sys.executable, BENCH, "--rollouts", tmp_path / "tiny.jsonl", "--max-draft", "4"]
    done = subprocess.run([*command, "--json", tmp_path / "out.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())}
    suffixes = ["", ".ngram"] if HAS_ARCTIC else [".ngram"]
    assert set(rows) == {f"draft.accepted_per_request_step.tiny.{b}4{s}" for b in ("cap", "equal") for s in suffixes}
    for row in rows.values():
        assert set(row) == {"name", "value", "unit", "incumbent", "ratio", "bound"}
        assert 0 < row["value"] <= row["bound"] <= 4
        assert row["ratio"] == pytest.approx(row["value"] / row["incumbent"])
    assert HAS_ARCTIC or "install_arctic.sh" in done.stdout


def test_bench_draft_names_the_bad_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"epoch": 0, "problem": "p", "token_ids": [1, 2]}\n{"epoch": 0}\n')
    done = subprocess.run([sys.executable, BENCH, "--rollouts", tmp_path / "bad.jsonl"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "bad.jsonl, line 2 is not a recorded rollout" in done.stderr
