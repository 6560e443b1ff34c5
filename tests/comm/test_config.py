"""Settings of 4-bit communication."""

from __future__ import annotations

import pytest

from rl_accel.comm import SDP4BitConfig, attach
from rl_accel.errors import CommError, ConfigError


@pytest.mark.parametrize(
    "wrong,words",
    [
        ({"weight_bits": 5}, "4, 8 or 16"),
        ({"intra_bits": 2}, "4, 8 or 16"),
        ({"gradient_group_size": 100}, "power of two"),
        ({"gradient_rounding": "up"}, "nearest, stochastic"),
        ({"bypass": "maybe"}, "auto, never"),
        ({"backend": "cuda"}, "auto, torch"),
        ({"local_size": 0}, "at least 1"),
        ({"start_step": -1}, "negative"),
        ({"weights": False, "gradients": False}, "nothing is left"),
    ],
)
def test_bad_values_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        SDP4BitConfig(**wrong)


def test_presets():
    assert SDP4BitConfig.paper().weight_group_size == 2048
    assert not SDP4BitConfig.zeropp().weight_difference


def test_attach_needs_a_process_group():
    with pytest.raises(CommError, match="initialize"):
        attach(object())
