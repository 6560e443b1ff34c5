"""K balanced against its queries: scores stay what they are, and outliers that queries mirror are gone."""

from __future__ import annotations

import pytest
import torch

from rl_accel.errors import KVCacheError
from rl_accel.kvcache.orders import order_errors
from rl_accel.kvcache.rotation import MAX_EXPONENT, Rotation, choose_exponents, choose_rotation

TOKENS, KV_HEADS, HEADS, SIZE = 200, 2, 6, 64


def text(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(TOKENS, KV_HEADS, SIZE, generator=generator),
        torch.randn(TOKENS, HEADS, SIZE, generator=generator),
    )


def scores(k: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nkgc,mkc->kgnm", q.double().unflatten(1, (KV_HEADS, -1)), k.double())


def test_outliers_that_queries_mirror_are_taken_back() -> None:
    """Dims 5 and 37 of head 1 times 16, their queries by 16 less: the error is that without them."""
    k, q = text()
    without = min(order_errors(k, (16, 32, 64)).values())
    plain = choose_rotation(k, q, 4)
    assert plain.exponents_KC is None, "nothing to gain"
    k[:, 1, [5, 37]] *= 16.0
    q[:, 3:, [5, 37]] /= 16.0
    found = choose_rotation(k, q, 4)
    expected = torch.zeros(KV_HEADS, SIZE, dtype=torch.int32)
    expected[1, [5, 37]] = 4
    assert torch.equal(found.exponents_KC, expected)
    assert found.k_error == pytest.approx(plain.k_error, rel=0.05)
    assert min(order_errors(k, (16, 32, 64)).values()) > 2.0 * without, "which a rotation alone leaves"


def test_factors_leave_scores_as_they_are_in_every_dtype() -> None:
    k, q = text(1)
    rotation = Rotation(16, exponents_KC=torch.randint(-MAX_EXPONENT, MAX_EXPONENT + 1, (KV_HEADS, SIZE)).int())
    for dtype in (torch.float32, torch.bfloat16):
        k_d, q_d = k.to(dtype), q.to(dtype)
        k_b, q_b = k_d * rotation.key_factors(dtype), q_d * rotation.query_factors(HEADS, dtype)
        assert k_b.dtype == q_b.dtype == dtype
        assert torch.equal((k_b.double() * 2.0**rotation.exponents_KC), k_d.double()), "exact"
        assert (scores(k_b, q_b) - scores(k_d, q_d)).abs().max() < 1e-9
    assert Rotation(16).key_factors(torch.float32) is None is Rotation(16).query_factors(HEADS, torch.float32)


@pytest.mark.parametrize("mirrored", [0.0, 0.5, 1.0])
def test_the_error_of_scores_is_what_is_made_small(mirrored: float) -> None:
    """Measured on other tokens, never more than a little above that without balancing."""
    errors = {}
    for balance in (False, True):
        k, q = text(2)
        for x, sign in ((k, 1.0), (q.unflatten(1, (KV_HEADS, -1)), -mirrored)):
            x[..., 3] *= 24.0**sign
        rotation = choose_rotation(k[:100], q[:100], 4, balance=balance)
        factors = rotation.key_factors(torch.float32), rotation.query_factors(HEADS, torch.float32)
        k_b, q_b = (x if f is None else x * f for x, f in zip((k[100:], q[100:]), factors, strict=True))
        energy = float(q_b.double().square().mean())
        errors[balance] = order_errors(k_b, [rotation.order])[rotation.order] * energy
    assert errors[True] <= 1.02 * errors[False]
    if mirrored == 1.0:
        assert errors[True] < 0.3 * errors[False]


def test_a_given_order_a_shift_and_dims_without_energy() -> None:
    k, q = text(3)
    k[..., 0] = 0.0
    q[..., 1] = 0.0
    k += 4.0 * torch.arange(SIZE).lt(2)
    found = choose_rotation(k, q, 4, order=32, shift=True)
    assert found.order == 32 and found.shift_KC.shape == (KV_HEADS, SIZE)
    exponents = choose_exponents(k, q)
    assert 8 < exponents[0, 1] <= MAX_EXPONENT and exponents[:, 2:].abs().max() <= 1
    with pytest.raises(KVCacheError, match="not finite"):
        choose_rotation(k * torch.inf, q, 4)
