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
        ({"sync": {"timeout_s": -1}}, "timeout_s must be positive"),
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
