"""Settings: unknown keys and bad values are one clear error that offers the nearest name."""

import pickle

import pytest

from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError, RLAccelError


def test_defaults_ask_for_nothing():
    config = AccelConfig.from_mapping(None)
    assert config.draft.method == "none"
    assert config.sampling.exact is False
    assert config.trace.tokens is False


def test_nested_values_arrive():
    config = AccelConfig.from_mapping({"draft": {"method": "ngram", "num_speculative_tokens": 3}, "seed": 7})
    assert (config.draft.method, config.draft.num_speculative_tokens, config.seed) == ("ngram", 3, 7)


def test_an_int_is_a_float_but_a_bool_is_no_int():
    assert AccelConfig.from_mapping({"sync": {"timeout_s": 5}}).sync.timeout_s == 5.0
    with pytest.raises(ConfigError, match=r"rl_accel\.seed must be int"):
        AccelConfig.from_mapping({"seed": True})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"draft": {"metod": "ngram"}}, "rl_accel.draft: unknown setting 'metod'. Did you mean 'method'?"),
        ({"drafts": {}}, "rl_accel: unknown setting 'drafts'. Did you mean 'draft'?"),
        ({"draft": {"method": "ngrm"}}, "rl_accel.draft.method: unknown value 'ngrm'. Did you mean 'ngram'?"),
        ({"draft": {"num_speculative_tokens": 0}}, "num_speculative_tokens is 0; vLLM takes 1 to 128"),
        ({"draft": {"prompt_lookup_min": 5}}, "1 <= min <= max; got 5 and 4"),
        ({"draft": "ngram"}, "rl_accel.draft must be a group of settings; got 'ngram'"),
        ({"sampling": {"exact": "yes"}}, "rl_accel.sampling.exact must be bool; got 'yes'"),
        ({"sync": {"timeout_s": -1}}, "timeout_s must be more than 0 s"),
        ({"sync": {"readback": "always"}}, "rl_accel.sync.readback: unknown value 'always'"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ConfigError) as error:
        AccelConfig.from_mapping(values)
    assert message in str(error.value)


def test_every_error_crosses_process_borders():
    def children(cls):
        return [cls, *(grandchild for child in cls.__subclasses__() for grandchild in children(child))]

    for cls in children(RLAccelError):
        copy = pickle.loads(pickle.dumps(cls("what to do")))
        assert type(copy) is cls
        assert str(copy) == "what to do"


@pytest.mark.parametrize(("method", "longest"), [("none", 1), ("ngram", 5), ("suffix", 24), ("das", 16)])
def test_the_longest_draft_follows_the_method_unless_it_is_set(method, longest):
    assert AccelConfig.from_mapping({"draft": {"method": method}}).draft.max_draft == longest
    config = AccelConfig.from_mapping({"draft": {"method": method, "num_speculative_tokens": 128}})
    assert config.draft.max_draft == 128
    assert AccelConfig.from_mapping({"draft": {"num_speculative_tokens": None}}).draft.num_speculative_tokens is None


@pytest.mark.parametrize("window", [1, 8])
def test_draft_settings_arrive(window):
    values = {
        "method": "das",
        "policy": "classes",
        "window": window,
        "history_gib": 1,
        "cross_problems": False,
        "learn_from_validation": True,
        "record": True,
    }
    draft = AccelConfig.from_mapping({"draft": values}).draft
    assert {name: getattr(draft, name) for name in values} == values
    assert type(draft.history_gib) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "class"}, "rl_accel.draft.policy: unknown value 'class'. Did you mean 'classes'?"),
        ({"policy": "x"}, "rl_accel.draft.policy: unknown value 'x'. Known: budget, classes, fixed"),
        ({"windw": 2}, "rl_accel.draft: unknown setting 'windw'. Did you mean 'window'?"),
        ({"window": 0}, "rl_accel.draft.window must be 1 to 8 epochs; got 0"),
        ({"window": 9}, "rl_accel.draft.window must be 1 to 8 epochs; got 9"),
        ({"window": True}, "rl_accel.draft.window must be int; got True"),
        ({"window": 2.0}, "rl_accel.draft.window must be int; got 2.0"),
        ({"num_speculative_tokens": True}, "rl_accel.draft.num_speculative_tokens must be int; got True"),
        ({"num_speculative_tokens": 129}, "num_speculative_tokens is 129; vLLM takes 1 to 128"),
        ({"history_gib": True}, "rl_accel.draft.history_gib must be float; got True"),
        ({"history_gib": 0}, "rl_accel.draft.history_gib must be positive and finite; got 0"),
        ({"history_gib": float("nan")}, "rl_accel.draft.history_gib must be positive and finite; got nan"),
        ({"cross_problems": 1}, "rl_accel.draft.cross_problems must be bool; got 1"),
        ({"learn_from_validation": "no"}, "rl_accel.draft.learn_from_validation must be bool; got 'no'"),
    ],
)
def test_bad_draft_settings_are_named(values, message):
    with pytest.raises(ConfigError) as error:
        AccelConfig.from_mapping({"draft": values})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "method", "speculator"),
    [
        ({}, "none", False),
        ({"speculator": {"enable": True}}, "auto", True),
        ({"draft": {"method": "head"}}, "head", True),
        ({"draft": {"method": "head"}, "speculator": {"enable": True}}, "head", True),
        ({"draft": {"method": "das"}}, "das", False),
    ],
)
def test_the_head_and_its_drafting_imply_each_other(given, method: str, speculator: bool) -> None:
    accel = AccelConfig.from_mapping(given)
    assert (accel.draft.method, accel.speculator.enable) == (method, speculator)


@pytest.mark.parametrize(
    "given",
    [
        {"draft": {"method": "das"}, "speculator": {"enable": True}},
        {"draft": {"method": "auto"}, "speculator": {"enable": False}},
    ],
)
def test_a_head_that_nobody_asks_is_refused(given) -> None:
    from rl_accel.speculator.feature import FEATURE

    accel = AccelConfig.from_mapping(given)
    with pytest.raises(ConfigError, match="auto"):
        FEATURE.role("driver")(FEATURE, accel.speculator, accel).check(None)


@pytest.mark.parametrize("given", [{"method": "model"}, {"method": "das", "model": "folder"}])
def test_drafting_by_a_model_names_one(given) -> None:
    with pytest.raises(ConfigError, match=r"draft\.model"):
        AccelConfig.from_mapping({"draft": given})


@pytest.mark.parametrize(
    ("name", "value"),
    [("history", 9), ("depth", 0), ("learning_rate", 0.0), ("max_share", 0.0), ("max_trace_share", 1.5), ("nice", 20),
     ("rejected_weight", -0.5), ("publish_s", float("inf"))],
)  # fmt: skip
def test_ranges_of_the_speculator(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"speculator.{name}"):
        AccelConfig.from_mapping({"speculator": {name: value}})
