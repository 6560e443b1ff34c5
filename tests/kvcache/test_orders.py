"""Orders and shifts of K that are learned: near the best in the error of scores that nobody showed them."""

from __future__ import annotations

import pytest
import torch

from rl_accel.errors import KVCacheError
from rl_accel.kernels.kv_int4.reference import rotate
from rl_accel.kvcache.formats import read_back
from rl_accel.kvcache.orders import allowed_orders, choose_order, choose_shift, order_errors

OUTLIERS = ("uniform", "pair", "four", "block")


def synthetic(kind: str, head_size: int, seed: int, num_tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """K [N, 2, C] with dims that stand out, and queries [64, 2, C] that are smaller there, as of a trained model."""
    factors_KC = torch.ones(2, head_size)
    places = torch.Generator().manual_seed(99)
    for head in range(2):
        if kind == "pair":
            first = int(torch.randint(head_size // 2, (1,), generator=places))
            factors_KC[head, [first, first + head_size // 2]] = 16.0
        elif kind == "four":
            factors_KC[head, torch.randperm(head_size, generator=places)[:4]] = 12.0
        elif kind == "block":
            factors_KC[head, :16] = 12.0
    generator = torch.Generator().manual_seed(seed)
    k_NKC = torch.randn(num_tokens, 2, head_size, generator=generator) * factors_KC
    return k_NKC, torch.randn(64, 2, head_size, generator=generator) / factors_KC


def score_error(k_NKC: torch.Tensor, q_MKC: torch.Tensor, order: int) -> float:
    """Mean square of what a 4-bit K adds to scores, less what it adds to all of a query."""
    added_MKN = torch.einsum("mkc,nkc->mkn", q_MKC, read_back(k_NKC, 4, order) - k_NKC)
    return float((added_MKN - added_MKN.mean(-1, keepdim=True)).square().mean())


@pytest.mark.parametrize(
    ("head_size", "orders"),
    [(8, (8,)), (16, (16,)), (32, (16, 32)), (80, (16,)), (96, (16, 32)), (128, (16, 32, 64, 128))],
)
def test_allowed_orders_are_powers_of_two_that_divide_the_head(head_size: int, orders: tuple[int, ...]) -> None:
    assert allowed_orders(head_size) == orders


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kind", OUTLIERS)
def test_the_order_is_near_the_best_for_other_tokens(kind: str, head_size: int) -> None:
    """Chosen by K of one batch, judged by scores of another; where orders matter, the worst is far from the best."""
    orders = allowed_orders(head_size)
    chosen = choose_order(synthetic(kind, head_size, 0)[0], orders)
    errors = {order: score_error(*synthetic(kind, head_size, 1), order) for order in orders}
    assert errors[chosen] <= 1.1 * min(errors.values()), (chosen, errors)
    if kind == "uniform":
        assert max(errors.values()) < 1.1 * min(errors.values()) and chosen == 16
    elif kind in ("pair", "block"):
        assert errors[16] > 1.4 * errors[chosen], errors


@pytest.mark.parametrize("kind", OUTLIERS)
def test_the_error_of_k_orders_the_orders_as_the_error_of_scores_does(kind: str) -> None:
    k_NKC, q_MKC = synthetic(kind, 128, 2)
    orders = allowed_orders(128)
    of_k = order_errors(k_NKC, orders)
    ratios = [score_error(k_NKC, q_MKC, order) / of_k[order] for order in orders]
    assert max(ratios) < 1.15 * min(ratios), "queries weigh all orders alike"


def test_equal_orders_give_the_smallest_whatever_their_sequence() -> None:
    zeros_NKC = torch.zeros(4, 1, 64)
    assert choose_order(zeros_NKC, (64, 16, 32)) == 16
    k_NKC, _ = synthetic("uniform", 64, 3)
    assert choose_order(k_NKC, (64, 32, 16)) == choose_order(k_NKC, (16, 32, 64)) == 16


def test_threads_do_not_move_a_choice() -> None:
    k_NKC, _ = synthetic("four", 128, 4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((choose_order(k_NKC, (16, 32, 64, 128)), choose_shift(k_NKC)))
    finally:
        torch.set_num_threads(before)
    assert len({order for order, _ in found}) == 1
    assert all(torch.equal(shift, found[0][1]) for _, shift in found)


def test_more_bits_have_a_smaller_error_and_the_error_is_that_of_what_is_read() -> None:
    k_NKC, _ = synthetic("four", 64, 5)
    errors = {bits: order_errors(k_NKC, (1, 32), bits) for bits in (4, 8)}
    assert all(0 < errors[8][order] < errors[4][order] / 100 for order in (1, 32))
    rotated = rotate(k_NKC, 32)
    by_hand = (read_back(rotated, 4, 1) - rotated).double().square().sum(-1).mean()
    assert errors[4][32] == pytest.approx(float(by_hand), rel=1e-6)


def test_a_shift_is_the_mean_and_takes_its_error_away() -> None:
    generator = torch.Generator().manual_seed(6)
    k_NKC = torch.randn(300, 2, 64, generator=generator)
    mean_KC = 10.0 * torch.randn(2, 64, generator=generator)
    shift_KC = choose_shift((k_NKC + mean_KC).bfloat16())
    assert shift_KC.dtype == torch.float32 and shift_KC.is_contiguous()
    assert (shift_KC - mean_KC).abs().max() < 0.3
    shifted = k_NKC + mean_KC - choose_shift(k_NKC + mean_KC)
    assert order_errors(shifted, (16,))[16] < 0.2 * order_errors(k_NKC + mean_KC, (16,))[16]


def test_what_cannot_be_chosen_by_is_refused() -> None:
    k_NKC = torch.randn(4, 1, 32)
    broken = k_NKC.clone()
    broken[1, 0, 5] = torch.inf
    for call, words in (
        (lambda: choose_order(k_NKC, (64,)), "power of two"),
        (lambda: choose_order(k_NKC, ()), "no orders"),
        (lambda: choose_order(k_NKC, (16,), 5), "4 or 8 bits"),
        (lambda: choose_order(k_NKC[:0], (16,)), r"must be \[tokens"),
        (lambda: choose_order(k_NKC[0], (16,)), r"must be \[tokens"),
        (lambda: choose_order(broken, (16,)), "not finite"),
        (lambda: choose_shift(broken), "not finite"),
        (lambda: choose_shift(k_NKC[:0]), r"must be \[tokens"),
    ):
        with pytest.raises(KVCacheError, match=words):
            call()
