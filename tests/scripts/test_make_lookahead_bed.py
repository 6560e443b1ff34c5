"""The test bed of lookahead: what its parts promise; a part is made where it is missing, stale or half there."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_lookahead_bed.py"
PARTS = ("policy", "target", "draft", "problems-mix.jsonl", "problems-long.jsonl", "problems-chain.jsonl")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("make_lookahead_bed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_lookahead_bed"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bed")


@pytest.fixture(scope="module")
def bed(script, folder):
    """Made from the command line: killed when the policy is there and the target is not, and started again."""
    command = [sys.executable, str(SCRIPT), "--fast", "--out", str(folder)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (folder / "policy.made.json").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (folder / "draft.made.json").exists()
    before = (folder / "policy" / "config.json").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "making" in done.stdout and f"making {folder / 'policy'}\n" not in done.stdout
    assert (folder / "policy" / "config.json").stat().st_mtime_ns == before
    return script.Bed(folder)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_nothing_half_is_left(bed) -> None:
    assert {path.name for path in bed.folder.iterdir()} == {*PARTS, *(f"{part}.made.json" for part in PARTS), ".lock"}


@torch.inference_mode()
def test_the_target_computes_what_the_policy_does(bed, script) -> None:
    policy, target = load(bed.policy), load(bed.target)
    assert target.config.num_hidden_layers == script.FAST.layers > policy.config.num_hidden_layers
    ids = torch.randint(0, 400, (3, 70), generator=torch.Generator().manual_seed(1))
    assert torch.equal(policy(ids).logits, target(ids).logits)


def test_the_draft_agrees_better_than_an_untrained_one(bed, script) -> None:
    """Chance is 1 of 436 tokens; trained this briefly the draft knows the format, not the sums."""
    import distill_draft

    tokenizer = AutoTokenizer.from_pretrained(bed.draft)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(bed.target).get_vocab()
    problems = distill_draft.generate(40, seed=9, split="test")
    greedy = distill_draft.write(load(bed.policy), tokenizer, problems, 0.0, 0)
    torch.manual_seed(0)
    untrained = distill_draft.agreement(distill_draft.build_draft(tokenizer), tokenizer, greedy)
    trained = distill_draft.agreement(load(bed.draft), tokenizer, greedy)
    assert untrained["tokens_exact"] < 0.05 and untrained["steps_exact"] == 0
    assert trained["tokens_exact"] > 0.4
    itself = distill_draft.agreement(load(bed.policy), tokenizer, greedy)
    assert itself == {"tokens_exact": 1.0, "steps_exact": 1.0}


def test_problems_are_long_enough_and_held_out(bed, script) -> None:
    rows = {name: list(map(json.loads, bed.problems(name).open())) for name in script.STEP_WEIGHTS_OF}
    tokenizer = AutoTokenizer.from_pretrained(bed.policy)
    trained_on = {problem.question for problem in script.generate(3000, seed=30_000)}
    for found in rows.values():
        assert len(found) >= 600 == len({row["problem_id"] for row in found[:600]})
        for row in found[:50]:
            assert row["messages"][0]["content"] not in trained_on
            prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
            assert row["prompt_token_ids"] == prompt
            assert row["answer"].count("\n") == row["num_steps"]
    assert min(row["num_steps"] for row in rows["mix"]) == 1
    assert min(row["num_steps"] for row in rows["long"]) == 5
    lengths = [bed.made(bed.problems(name))["mean_answer_tokens"] for name in ("mix", "long", "chain")]
    assert lengths == sorted(lengths) and lengths[-1] > 150


def test_only_stale_parts_are_made_anew(bed, script, capsys) -> None:
    script.make_bed(bed.folder, script.FAST)
    assert capsys.readouterr().out == ""
    script.stamp_of(bed.problems("mix")).write_text("{")
    script.make_bed(bed.folder, replace(script.FAST, layers=5))
    said = capsys.readouterr().out.splitlines()  # hosts that are imported now may say something, too
    made = [line.rpartition("/")[2] for line in said if line.startswith("making ")]
    assert made == ["target", "problems-mix.jsonl"]
    assert load(bed.target).config.num_hidden_layers == 5


def test_a_part_that_fails_is_not_there(script, tmp_path) -> None:
    def fail(out: Path):
        out.mkdir()
        (out / "half").touch()
        raise KeyboardInterrupt

    part = tmp_path / "part"
    script._make(part, {"a": 1}, lambda out: out.mkdir() or {})
    script._make(part, {"a": 1}, fail)  # is there
    with pytest.raises(KeyboardInterrupt):
        script._make(part, {"a": 2}, fail)
    assert not part.exists() and not script.stamp_of(part).exists()
    script._make(part, {"a": 2}, lambda out: out.mkdir() or {"b": 3})
    assert list(part.iterdir()) == [] and json.loads(script.stamp_of(part).read_text())["b"] == 3
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
