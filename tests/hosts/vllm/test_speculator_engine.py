"""The speculator inside a real vLLM engine: the same tokens whatever is served, and no way for poison to be served.

The engines: `speculator_engine.py`.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from rl_accel.lossless import chi_square, count_tokens

from .tiny_qwen import VOCAB_SIZE, build_model

ENGINE = Path(__file__).with_name("speculator_engine.py")
TRAINER = Path(__file__).parents[1] / "verl" / "deepspeed_ranks.py"


@pytest.fixture(scope="module")
def engines(run_ranks, tmp_path_factory):
    """MODE -> result, each engine started once."""
    model = tmp_path_factory.mktemp("speculator") / "model"
    build_model(model)
    results: dict[str, dict] = {}

    def run(mode: str, steps: str = "0,1") -> dict:
        if mode not in results:
            (results[mode],) = run_ranks(ENGINE, 1, str(model), mode, steps, timeout=400)
        return results[mode]

    run.model = model
    return run


def test_tokens_do_not_depend_on_what_is_served(engines) -> None:
    """Versions swapped in flight, random ones too, with prompts prefilled in parts and two temperatures."""
    swaps = engines("swaps")
    assert swaps["tokens"] == engines("plain")["tokens"]
    assert swaps["state"]["live"]["features"] == {
        "sampling": True,
        "draft": "head",
        "speculator": "serving",
        "sync": True,
    }
    assert swaps["state"]["counts"]["num_draft_tokens"] > 100
    assert "speculator" not in engines("plain")["state"]["live"]["features"]


def test_poison_is_never_served(engines) -> None:
    """What is not finite, damaged or of another shape is refused, and the version before goes on."""
    swaps = engines("swaps")
    good = {version for kind, version in swaps["published"] if kind == "random"}
    served = [version for version, _ in swaps["served"]]
    assert set(served) <= good | {1} and len(set(served)) > 3
    assert all(total == total and abs(total) < 1e9 for _, total in swaps["served"])
    poisoned = sum(kind != "random" for kind, _ in swaps["published"])
    assert swaps["state"]["metrics"]["weights_refused"] >= poisoned - 1 > 3


def test_a_head_that_fails_is_left_out_and_nothing_else(engines) -> None:
    """The drafter stays, and the tokens are those without."""
    swaps = engines("swaps")
    assert swaps["broken"] == engines("plain")["tokens"][0]
    assert swaps["broken_state"]["metrics"]["heads_off"] == 1.0


def test_a_head_that_does_not_learn_is_saved_and_restored_too(engines) -> None:
    swaps = engines("swaps")
    assert all("error" not in answer for answer in swaps["checkpoint"])
    metrics = swaps["state"]["metrics"]
    assert metrics["train_share"] == metrics["train_steps"] == metrics["rows_traced"] == 0.0


@pytest.fixture(scope="module")
def learned(engines):
    return engines("learns")


def test_the_head_learns_while_the_engine_generates(engines, learned) -> None:
    """To 0.8 accepted tokens a draft, on problems that do not repeat; heads of random weights have next to none."""
    random, last = engines("swaps")["state"]["counts"], learned["states"][-2]["counts"]
    assert last["num_accepted_tokens"] > 0.8 * last["num_drafts"] > 100
    assert random["num_accepted_tokens"] < 0.1 * random["num_drafts"]
    metrics = learned["states"][-2]["metrics"]
    assert metrics["version"] > 2 and metrics["held_out_accept"] > 0.5 and metrics["heads_off"] == 0.0


def test_the_head_begins_with_the_policys_embeddings(learned) -> None:
    """vLLM pads the vocabulary; with its rows counted in, shapes differed and nothing was taken over."""
    policy, head = learned["embeddings"]
    assert len(policy) > len(head) == VOCAB_SIZE
    pair = torch.stack([policy[: len(head)].flatten(), head.flatten()])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.999


def test_tokens_are_those_without_it(engines, learned, run_ranks) -> None:
    """While it learned, and in the step in which its trainer was killed."""
    assert learned["tokens"] == engines("plain")["tokens"]
    (after,) = run_ranks(ENGINE, 1, str(engines.model), "plain", str(learned["last"]), timeout=400)
    assert learned["after_kill"] == after["tokens"][0]


def test_a_killed_trainer_costs_its_learning_and_nothing_else(learned) -> None:
    state = learned["states"][-1]
    assert state["metrics"]["trainers_gone"] == 1.0 and state["metrics"]["heads_off"] == 0.0
    assert state["counts"]["num_accepted_tokens"] > 0, "it goes on with the head that it has"
    assert "error" in learned["saved_without"]


def test_head_and_version_survive_a_checkpoint(learned) -> None:
    assert learned["opened"]["num_steps"] == learned["saved"]["num_steps"] > 0
    assert learned["opened"]["version"] == learned["saved"]["version"] == learned["version"]


def test_traces_are_the_policys_own_states_and_logits(engines, learned) -> None:
    """Against transformers, position by position: hidden states, logits, tokens, and what was accepted."""
    from transformers import AutoModelForCausalLM

    from .speculator_engine import prompt

    rows = learned["rows"]["rows"]
    model = AutoModelForCausalLM.from_pretrained(engines.model, dtype=torch.float32)
    texts = {}
    names = [(p, s) for p in range(12) for s in range(4)]
    for step in range(2):
        for (p, _s), tokens in zip(names, learned["tokens"][step], strict=True):
            texts[tuple(tokens)] = prompt(p) + list(tokens)
    by_request: dict[int, list[int]] = {}
    for i, request in enumerate(rows["request"].tolist()):
        by_request.setdefault(request, []).append(i)
    checked = 0
    for indices in by_request.values():
        positions = rows["position"][indices].tolist()
        newest = rows["tokens"][indices, 0].tolist()
        text = next(
            (
                t
                for t in texts.values()
                if all(p + 1 < len(t) and t[p + 1] == n for p, n in zip(positions, newest, strict=True))
            ),
            None,
        )
        if text is None or len(positions) < 10:
            continue
        with torch.inference_mode():
            out = model(torch.tensor([text]), output_hidden_states=True)
        states = torch.stack([out.hidden_states[1][0], _before_norm(model, torch.tensor([text]))], 1)[positions]
        states = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(rows["aux"][indices].float(), states.flatten(1), rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(rows["target"][indices].float(), out.logits[0, positions], rtol=5e-3, atol=2e-2)
        assert positions == list(range(positions[0], positions[0] + len(positions)))
        drafted, accepted = rows["drafted"][indices], rows["accepted"][indices]
        starts = (accepted >= 0).nonzero()[:, 0].tolist()
        for a, b in itertools.pairwise(starts):
            assert b - a == int(accepted[a]) + 1 and int(accepted[a]) <= int(drafted[a])
        checked += 1
    assert checked > 10


@pytest.fixture(scope="module")
def tapped(engines, learned, run_ranks, tmp_path_factory):
    """What the training engines, two ranks each, leave of the texts that the engine has generated."""
    from rl_accel.quickstart.deep import POLICY  # its tokenizer: verl wants one

    from .speculator_engine import NUM_PROBLEMS, NUM_SAMPLES, prompt

    folder = tmp_path_factory.mktemp("trainer")
    shutil.copytree(engines.model, folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POLICY / name, folder / "model")
    names = [(p, s) for p in range(NUM_PROBLEMS) for s in range(NUM_SAMPLES)]
    texts = [
        {"problem": f"p{k}-{p}", "sample": s, "step": k, "prompt": len(prompt(p)), "ids": prompt(p) + list(tokens)}
        for k in range(2)
        for (p, s), tokens in zip(names, learned["tokens"][k], strict=True)
    ]
    torch.save({"model": str(folder / "model"), "texts": texts}, folder / "job.pt")
    return run_ranks(TRAINER, 2, "traces", timeout=300, TRACE_JOB=str(folder / "job.pt"))[0]["traces"]


@pytest.mark.parametrize("kind", ["fsdp2", "packed", "zero1", "zero2", "zero3"])
def test_the_trainers_traces_are_the_engines(learned, tapped, kind) -> None:
    """By request and position: the same names, tokens, hidden states and logits, of FSDP2 and of ZeRO 1 to 3."""
    rows, expected = tapped[kind]["rows"], learned["rows"]["rows"]
    there = {pair: i for i, pair in enumerate(zip(expected["request"].tolist(), expected["position"].tolist()))}  # noqa: B905
    pairs = list(zip(rows["request"].tolist(), rows["position"].tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) > 2000
    mine = [i for i, pair in enumerate(pairs) if pair in there]
    assert len(mine) == len(pairs), "a row of the trainer has no counterpart in the engine"
    engine = [there[pairs[i]] for i in mine]
    for name, atol in (("tokens", 0.0), ("aux", 5e-3), ("target", 2e-2)):
        ours, theirs = torch.from_numpy(rows[name][mine]), expected[name][engine]
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=5e-3 if atol else 0.0, atol=atol)
    assert set(rows["policy"].tolist()) == {0, 1} and set(rows["temperature"].tolist()) == {0.5}
    assert set(rows["drafted"].tolist()) == set(rows["accepted"].tolist()) == {-1}


def test_the_trainers_pass_is_not_changed_by_its_tap(tapped) -> None:
    """Nor by one that fails, which is off then and says so."""
    for kind in ("fsdp2", "zero1", "zero2", "zero3"):
        assert torch.equal(tapped[kind]["log_probs"], tapped[kind]["plain"])
        metrics = tapped[kind]["metrics"]
        assert metrics["rl_accel/speculator/trainer_tap_rows"] == [len(tapped[kind]["rows"]["request"])]
        assert metrics["rl_accel/speculator/trainer_taps_off"] == [0.0]
        assert 0.0 < metrics["rl_accel/speculator/trainer_tap_share"][0] < 1.0
    assert torch.equal(tapped["failed"]["log_probs"], tapped["fsdp2"]["plain"])
    assert tapped["failed"]["metrics"]["rl_accel/speculator/trainer_taps_off"] == [1.0]


def _before_norm(model, ids: torch.Tensor) -> torch.Tensor:
    """The last layer's output, which transformers returns normalized only."""
    found = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    model(ids)
    handle.remove()
    return found[0].reshape(-1, found[0].shape[-1])


def test_a_smaller_model_drafts_the_same_tokens(engines) -> None:
    """`draft.method=model`, vLLM's own: here the policy drafts for itself; three of four requests are cold."""
    model = engines("model")
    assert model["tokens"] == engines("plain")["tokens"]
    assert model["state"]["live"]["features"]["draft"] == "model"
    counts = model["state"]["counts"]
    assert counts["num_accepted_tokens"] > 0.3 * counts["num_draft_tokens"] > 100


def test_a_model_that_drafts_ahead_changes_no_token(engines) -> None:
    """Nor when its process is killed: the requests that run go on without drafts, and it is said once."""
    found = engines("ahead")
    assert found["tokens"] == found["killed"] == engines("plain")["tokens"]
    before, after = found["states"]
    assert before["live"]["features"]["draft"] == "ahead"
    counts = before["counts"]
    # The policy drafts for itself, with its own noise, temperature and top-p.
    assert counts["num_accepted_tokens"] > 0.98 * counts["num_draft_tokens"] > 100
    assert before["metrics"]["ahead_acceptance"] > 0.95 and before["metrics"]["drafters_gone"] == 0.0
    assert after["metrics"]["drafters_gone"] == 1.0 and after["counts"].get("num_draft_tokens", 0) == 0


def test_a_smaller_model_goes_on_behind_a_hint(engines) -> None:
    """Hints are verified with the prompt, and a request that ended is not drafted for; tokens stay."""
    found = engines("hinted")
    assert found["tokens"] == engines("plain")["tokens"]
    hints = found["hints"]
    assert hints["right"] == hints["wrong"] == hints["plain"]
    # Drafts of 4 from the first engine step on, which has the prompt: at most 5 tokens a step.
    for text, counts in zip(hints["plain"], hints["steps"], strict=True):
        assert counts["num_accepted_tokens"] >= min(4, len(text) - 1)
        assert counts["num_drafts"] <= -(-len(text) // 5) + 1


def test_tensor_parallel_ranks_take_one_ranks_drafts(engines) -> None:
    tp2 = engines("tp2")
    first, second = tp2["states"][2:]
    assert first["metrics"]["num_asked"] > 0 and second["metrics"] == {}
    assert first["counts"] == second["counts"] and first["counts"]["num_draft_tokens"] > 0


def test_without_exact_sampling_the_distribution_is_the_policys(engines) -> None:
    """vLLM's own rejection sampling, 4,000 requests of one prompt, while the head learns them: 27 continuations of
    three tokens against the policy's, by chi-square at alpha 1e-6."""
    from transformers import AutoModelForCausalLM

    from .speculator_engine import prompt

    found = engines("stock", "4000")
    counts = found["state"]["counts"]
    assert counts["num_accepted_tokens"] > 1000, "there is something to test"
    policy = AutoModelForCausalLM.from_pretrained(engines.model, dtype=torch.float32)
    texts, probabilities = [prompt(0)], torch.ones(1)
    for _ in range(3):
        with torch.no_grad():
            best = policy(torch.tensor(texts)).logits[:, -1].topk(3)
        texts = [[*text, int(token)] for text, row in zip(texts, best.indices, strict=True) for token in row]
        probabilities = (probabilities[:, None] * best.values.softmax(-1)).flatten()
    names = {tuple(text[-3:]): i for i, text in enumerate(texts)}
    outcomes = torch.tensor([names[tuple(row[:3])] for row in found["tokens"].tolist()])
    result = chi_square(count_tokens(outcomes, len(texts)), probabilities, alpha=1e-6)
    assert result.passed, result
    assert not chi_square(count_tokens(outcomes, len(texts)), probabilities.flip(0), alpha=1e-6).passed
