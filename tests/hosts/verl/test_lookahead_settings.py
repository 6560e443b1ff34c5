"""What is refused before a run starts, each in one line."""

from __future__ import annotations

import json

import pytest

from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError
from rl_accel.feature import features
from rl_accel.hosts.verl.prepare import drivers, preflight
from rl_accel.quickstart.deep import POLICY

from .test_preflight import composed

LOOK = "rl_accel.lookahead"
URL = f"{LOOK}.draft=http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((URL, f"{LOOK}.phases=testing"), "lookahead.phases"),
        ((URL, f"{LOOK}.verifier=exakt"), "exact"),
        ((URL, f"{LOOK}.verifier=numbers"), "allow_lossy"),
        ((URL, f"{LOOK}.verifier=judge", "rl_accel.allow_lossy=true"), "verifier_url"),
        ((URL, f"{LOOK}.depth=0"), "depth must be at least 1"),
        ((URL, f"{LOOK}.width=0"), "width must be at least 1"),
        ((URL, f"{LOOK}.step_tokens=0"), "step_tokens must be at least 1"),
        ((URL, f"{LOOK}.delimiter=''"), "delimiter is empty"),
        ((URL, f"{LOOK}.draft_gpus=-1"), "must not be negative"),
        ((URL, f"{LOOK}.draft_args='--x \"'"), "No closing quotation"),
        ((URL, f"{LOOK}.hint=true"), "draft.method=das, head, auto, ahead; it is none"),
        ((f"{LOOK}.draft='ftp://host'",), "no http URL"),
        ((f"{LOOK}.draft='http://'",), "no http URL"),
        ((URL, "actor_rollout_ref.model.lora_rank=8"), "LoRA"),
        ((URL, "actor_rollout_ref.rollout.enable_rollout_routing_replay=true"), "routed experts"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(composed(*overrides))


def test_a_draft_that_is_not_there_or_has_another_vocabulary_is_refused(tmp_path) -> None:
    def check(draft) -> None:
        config = composed(f"{LOOK}.draft={draft}")
        (driver,) = (driver for driver in drivers(preflight(config)) if driver.feature.name == "lookahead")
        driver.check_run(config)

    with pytest.raises(ConfigError, match=r"config.json is missing"):
        check(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 7}))
    with pytest.raises(ConfigError, match="has 7 tokens and the policy"):
        check(tmp_path)
    check(POLICY)
    check("quickstart")


def test_exact_is_lossless_and_others_are_not() -> None:
    feature = features()["lookahead"]
    for verifier, lossy in (("exact", False), ("numbers", True), ("always", True)):
        settings = AccelConfig.from_mapping({"lookahead": {"draft": "x", "verifier": verifier}}).lookahead
        assert feature.is_lossy(settings) is lossy
    off = AccelConfig.from_mapping({"lookahead": {"verifier": "always"}})
    assert not off.lookahead.enabled and not feature.is_lossy(off.lookahead)
    off.check()


@pytest.mark.parametrize(("phases", "served"), [("validation", [True]), ("training", [False]), ("all", [True, False])])
def test_phases(phases, served) -> None:
    settings = AccelConfig.from_mapping({"lookahead": {"draft": "x", "phases": phases}}).lookahead
    assert [validate for validate in (True, False) if settings.serves(validate)] == served


def test_hints_ask_for_a_drafter_that_takes_them() -> None:
    assert AccelConfig.from_mapping({"lookahead": {"draft": "x", "hint": True}}).draft.method == "das"
    assert AccelConfig.from_mapping({"lookahead": {"draft": "x"}}).draft.method == "none"
