"""What kernels share: the Hadamard transform against the matrix of its definition, rounding noise against integers,
exp and SiLU against float64."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard as matrix

from rl_accel.kernels.common.exp import MIN_EXPONENT, exp_neg, silu
from rl_accel.kernels.common.hadamard import hadamard
from rl_accel.kernels.common.noise import fold_key, rounding_noise

WORD = 0xFFFFFFFF


@pytest.mark.parametrize("order", [1, 2, 16, 32, 128, 256])
def test_transform_is_the_product_with_its_matrix(order):
    """On integers, where no rounding hides a wrong sign."""
    x = torch.randint(-50, 50, (3, 5, 2 * order), generator=torch.Generator().manual_seed(order))
    expected = x.view(3, 5, 2, order) @ torch.from_numpy(matrix(order)).long()
    assert torch.equal(hadamard(x.float(), order).long(), expected.view_as(x))


def test_twice_is_the_order():
    x = torch.randn(4, 64, dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(x, 64), 64), 64 * x)
    assert torch.equal(hadamard(x[:0], 64), x[:0])


@pytest.mark.parametrize(("shape", "order", "message"), [((48,), 12, "power of two"), ((40,), 16, "multiple of 16")])
def test_what_cannot_be_transformed(shape, order, message):
    with pytest.raises(ValueError, match=message):
        hadamard(torch.zeros(shape), order)


def noise_of(key: int, index: int) -> float:
    def mix(word):
        word = ((word ^ word >> 16) * 0x7FEB352D) & WORD
        word = ((word ^ word >> 15) * 0x846CA68B) & WORD
        return word ^ word >> 16

    word = (index * 0x9E3779B9 + key) & WORD
    word = ((word ^ word >> 16) * 0x7FEB352D) & WORD
    word ^= mix(index >> 32 ^ key >> 32)
    word = ((word ^ word >> 15) * 0x846CA68B) & WORD
    word ^= word >> 16
    return (word >> 8) * 2.0**-24 - 0.5


@pytest.mark.parametrize("index", [0, 5, 2**32 - 2, 2**40 + 7])
def test_noise_is_a_function_of_key_and_index(index):
    key = fold_key(3, index) & (2**63 - 1)
    drawn = rounding_noise(key, index, 4)
    assert drawn.tolist() == [noise_of(key, index + i) for i in range(4)]
    assert torch.equal(rounding_noise(key, index + 2, 2), drawn[2:])


def test_keys_differ_in_every_word():
    assert len({fold_key(*words) for words in ((0,), (1,), (0, 0), (0, 1), (1, 0), (-1, 0))}) == 6


def test_exp_is_that_of_float64_within_two_units() -> None:
    x = -torch.linspace(0, 90, 20001)
    found, exact = exp_neg(x), x.double().exp()
    normal = x >= MIN_EXPONENT
    assert ((found.double() - exact).abs() <= 2 * 2.0**-23 * exact)[normal].all()
    assert not found[~normal].any() and found[0] == 1.0
    assert exp_neg(torch.tensor([-torch.inf]))[0] == 0.0 and exp_neg(torch.tensor([torch.nan])).isnan()


def test_silu_is_that_of_float64_within_four_units() -> None:
    x = torch.linspace(-80, 80, 20001)
    exact = torch.nn.functional.silu(x.double())
    assert ((silu(x).double() - exact).abs() <= 4 * 2.0**-23 * exact.abs()).all()
    assert silu(torch.tensor([0.0, -1e30, torch.inf])).tolist() == [0.0, 0.0, torch.inf]
    assert silu(torch.tensor([torch.nan])).isnan()
