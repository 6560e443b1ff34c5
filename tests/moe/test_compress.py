"""Codes with compensators: that each step lowers the error, and that results depend on the weights alone."""

import itertools

import pytest
import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3 import api
from rl_accel.moe.bases import BASES
from rl_accel.moe.compress import Method, compress, unpack_factors
from rl_accel.moe.low_rank import low_rank

PLAIN = Method(unbiased=False)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int) -> torch.Tensor:
    """Heavy tails on a low-rank part, with some columns that are larger."""
    ratio = gaussian(*shape, seed=1) / gaussian(*shape, seed=2).abs().clamp(min=0.3)
    low = gaussian(*shape[:2], 4, seed=3) @ gaussian(shape[0], 4, shape[2], seed=4)
    w = ratio + low
    w[..., ::37] *= 3
    return w


MATRICES = {"gaussian": gaussian(3, 192, 128), "heavy": heavy(3, 192, 128)}


def relative(w: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return (w - found).flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1)


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_lowers_the_error_of_every_matrix(kind, bits):
    w = MATRICES[kind]
    errors = [
        compress(w, bits, 64, [0] * 3, Method(base=base, unbiased=False)).errors_E for base in ("rtn", "hqq", "ls")
    ]
    errors.append(compress(w, bits, 64, [8] * 3, PLAIN).errors_E)
    for worse, better in itertools.pairwise(errors):
        assert (better < worse).all()


@pytest.mark.parametrize("kind", MATRICES)
def test_ours_is_a_tenth_below_the_released_algorithm(kind):
    """The released one: HQQ in ten rounds of randomized SVD, factors quantized to 3 bits afterwards."""
    w, rank = MATRICES[kind], 8
    u = v = None
    for _ in range(10):
        target = w if u is None else w - u @ v
        residual = w - api.dequantize(BASES["hqq"](target.contiguous(), 3, 64))
        u, v = low_rank(residual, rank, "randomized")

    def to_3_bits(x):
        groups = x.flatten().unflatten(0, (-1, 64))
        scale = groups.amax(-1, keepdim=True).abs()
        codes = (groups * 3.5 / scale).round().add(4).clamp(0, 7)
        return ((codes - 4) * scale / 3.5).reshape(x.shape)

    released = relative(w, w - residual + to_3_bits(u) @ to_3_bits(v))
    ours = compress(w, 3, 64, [rank] * 3, PLAIN)
    assert (ours.errors_E < 0.9 * released).all()


def test_errors_are_those_of_what_is_stored():
    w = MATRICES["heavy"]
    for method in (PLAIN, Method()):
        found = compress(w, 3, 64, [4, 0, 9], method)
        torch.testing.assert_close(found.errors_E, relative(w, found.weight()), rtol=1e-4, atol=0)
        found.matrix.check_integrity()
        found.factors.check_integrity(found.matrix)
    assert found.factors.starts.tolist() == [0, 4, 4, 13]


def test_bytes_are_those_of_the_tensors_that_are_kept():
    found = compress(gaussian(2, 128, 256), 3, 64, [4, 4])
    per_rank = (256 + 128) * 4 / 8 + (256 + 128) / 64 * 2
    assert found.memory_bytes() == 2 * (128 * 256 * 3.5 / 8 + 4 * per_rank) + 3 * 4
    assert found.bits_per_weight() == pytest.approx(3.70, abs=0.005)


def test_a_matrix_has_the_same_codes_alone_and_stacked_with_others():
    w = MATRICES["heavy"]
    together = compress(w, 3, 64, [4, 0, 9])
    alone = compress(w[2:], 3, 64, [9])
    assert torch.equal(together.matrix.codes[2], alone.matrix.codes[0])
    assert torch.equal(together.factors.v_codes[4:], alone.factors.v_codes)


def test_the_number_of_threads_changes_no_code():
    """A run may go on with another one."""
    w, found = gaussian(2, 512, 128, seed=5), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compress(w, 2, 64, [8, 3], Method(alternations=6)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.matrix.codes, found[0].matrix.codes)
        assert torch.equal(other.factors.u_codes, found[0].factors.u_codes)


def test_rows_stacked_on_each_other_have_the_codes_of_each():
    """So q, k, v or gate and up may be fused or not; without a compensator, which belongs to the whole matrix."""
    for base in BASES:
        w = gaussian(1, 128, 64) * torch.tensor([1.0, 30.0]).repeat_interleave(64)[:, None]
        whole = BASES[base](w, 3, 64)
        parts = [BASES[base](part.contiguous(), 3, 64) for part in w.chunk(2, 1)]
        assert torch.equal(whole.codes, torch.cat([part.codes for part in parts], 1)), base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_code(dtype):
    """vLLM loads under the model's dtype and reloads under float32."""
    w = MATRICES["heavy"]
    expected = compress(w, 3, 64, [4, 0, 9])
    torch.set_default_dtype(dtype)
    try:
        found = compress(w, 3, 64, [4, 0, 9])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.matrix.codes, expected.matrix.codes)
    assert torch.equal(found.factors.u_codes, expected.factors.u_codes)
    assert torch.equal(found.matrix.scales, expected.matrix.scales)


def test_the_loop_ends_when_the_mean_of_three_errors_stands_still():
    easy = gaussian(1, 192, 4) @ gaussian(1, 4, 128)  # of rank 4: a compensator takes it all
    w = torch.cat([easy, MATRICES["gaussian"][:1]])
    loose = compress(w, 3, 64, [8, 8], Method(tolerance=0.02))
    tight = compress(w, 3, 64, [8, 8], Method(tolerance=1e-5))
    assert (loose.alternations_E < 20).all() and (loose.alternations_E >= 4).all()
    assert (tight.alternations_E >= loose.alternations_E).all()
    assert (tight.errors_E <= loose.errors_E * 1.001).all()
    assert compress(w, 3, 64, [0, 8]).alternations_E[0] == 1


def test_unbiased_rows_have_the_length_of_the_weights():
    w = MATRICES["gaussian"]
    found = compress(w, 2, 64, [4] * 3)
    projection = (found.weight() * w).sum(-1) / (w * w).sum(-1)
    shrunk = compress(w, 2, 64, [4] * 3, PLAIN)
    assert (projection - 1).abs().max() < 2e-3
    assert ((shrunk.weight() * w).sum(-1) / (w * w).sum(-1)).mean() < 0.95


def test_a_start_saves_alternations_after_a_small_update():
    w = MATRICES["heavy"]
    first = compress(w, 3, 64, [8] * 3)
    moved = w + 1e-3 * gaussian(*w.shape, seed=9)
    once = Method(alternations=1)
    assert (
        compress(moved, 3, 64, [8] * 3, once, first).errors_E < compress(moved, 3, 64, [8] * 3, once).errors_E
    ).all()
    with pytest.raises(MoEError, match="other ranks"):
        compress(moved, 3, 64, [8, 8, 4], once, first)


@pytest.mark.parametrize("shape", [(2, 96, 160), (2, 160, 96)])
def test_low_rank_parts_agree_with_a_full_decomposition(shape):
    residual = heavy(*shape)
    best = torch.linalg.svdvals(residual)[:, 8:].pow(2).sum(-1).sqrt()
    for method, bound in (("exact", 1.0005), ("randomized", 1.05)):
        u, v = low_rank(residual, 8, method)
        assert ((residual - u @ v).flatten(1).norm(dim=1) <= bound * best).all(), method
    near = low_rank(residual + 0.01 * gaussian(*shape), 8, "exact")[1]
    u, v = low_rank(residual, 8, near_ERK=near)
    assert ((residual - u @ v).flatten(1).norm(dim=1) <= 1.002 * best).all()


def test_weights_that_are_not_finite_stay_visible():
    w = gaussian(2, 64, 64)
    w[1, 3, 5] = torch.nan
    found = compress(w, 3, 64, [0, 0], PLAIN).weight()
    assert torch.isnan(found[1, 3]).all() and torch.isfinite(found[0]).all()


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({"bits": 5}, "2, 3, 4 bits"),
        ({"group_size": 128}, "32 or 64"),
        ({"columns": 96}, "a group size of 32 would"),
        ({"columns": 72}, "none of"),
        ({"ranks": [4, 4]}, "rank of 0 to"),
        ({"ranks": [4, 4, 300]}, "rank of 0 to"),
    ],
)
def test_what_cannot_be_served_is_named(width, message):
    w = gaussian(3, 64, width.get("columns", 64))
    with pytest.raises(MoEError, match=message):
        compress(w, width.get("bits", 3), width.get("group_size", 64), width.get("ranks", [4] * 3))


def test_factors_unpack_to_rows_of_both_sides():
    found = compress(gaussian(2, 96, 160), 4, 32, [3, 5])
    u, v = unpack_factors(found.factors, found.matrix)
    assert u.shape == (8, 96) and v.shape == (8, 160)
