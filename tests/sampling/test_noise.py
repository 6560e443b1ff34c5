"""Position-keyed noise: the generator against an integer twin, the distribution of samples, no effect of the batch."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.kernels.gumbel_argmax import reference
from rl_accel.kernels.gumbel_argmax.api import gumbel_argmax
from rl_accel.lossless import chi_square, count_tokens
from rl_accel.sampling.keys import request_key

MASK = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def mix_naive(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def gumbel_naive(key: int, position: int, token: int) -> float:
    stream = (mix_naive(key & MASK) + position * 0x9E3779B97F4A7C15) & MASK
    bits = mix_naive((mix_naive(stream) + (token + 1) * 0x9E3779B97F4A7C15) & MASK)
    return -math.log(-math.log(((bits >> 12) + 0.5) * 2.0**-52))


@settings(max_examples=100, deadline=None)
@given(key=INT64, position=st.integers(0, 1 << 40), vocab_size=st.integers(1, 40))
def test_noise_equals_the_integer_twin(key, position, vocab_size):
    got = reference.gumbel_noise(torch.tensor([key]), torch.tensor([position]), vocab_size)[0]
    want = torch.tensor([gumbel_naive(key, position, v) for v in range(vocab_size)], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_split_mix_reference_output():
    """First outputs of SplitMix64 seeded with 1234567, from the reference C code of S. Vigna."""
    outputs = [mix_naive((1234567 + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_extreme_uniforms_stay_finite():
    """With 53 bits and a half the largest uniform rounds to 1, whose Gumbel is infinite: one wrong token in 9e15."""
    largest = ((1 << 52) - 1 + 0.5) * 2.0**-52
    assert largest < 1.0 and math.isfinite(-math.log(-math.log(largest)))
    assert ((1 << 53) - 1 + 0.5) * 2.0**-53 == 1.0


@pytest.mark.parametrize("axis", ["positions", "keys", "small keys"])
def test_samples_follow_softmax(axis):
    """200,000 samples over 8 tokens, alpha 1e-6, along positions of one request and across requests."""
    num = 200_000
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -4.0, -torch.inf])
    keys_R, positions_R = torch.full((num,), 991), torch.arange(num)
    if axis == "keys":
        keys_R = torch.tensor([request_key(3, f"p{i}", 0, 0, False) for i in range(num)])
    if axis != "positions":
        keys_R = keys_R if axis == "keys" else torch.arange(num)
        positions_R = torch.full((num,), 17)
    tokens = gumbel_argmax(logits_V.expand(num, -1), keys_R, positions_R)
    result = chi_square(count_tokens(tokens, 8), logits_V.softmax(0))
    assert result.passed, result


def test_neighboring_positions_are_independent():
    """Pairs of tokens at positions i and i + 1: 200,000 pairs over 25 cells, alpha 1e-6."""
    num, vocab_size = 200_000, 5
    logits_V = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
    tokens = gumbel_argmax(logits_V.expand(num + 1, -1), torch.full((num + 1,), 5), torch.arange(num + 1))
    pairs = (tokens[:-1] * vocab_size + tokens[1:])[::2]
    distribution = torch.outer(logits_V.softmax(0), logits_V.softmax(0)).reshape(-1)
    assert chi_square(count_tokens(pairs, vocab_size**2), distribution).passed


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 12), vocab_size=st.integers(1, 300))
def test_tokens_do_not_depend_on_the_batch(seed, rows, vocab_size):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator)
    keys = torch.randint(-(1 << 62), 1 << 62, (rows,), generator=generator)
    positions = torch.randint(0, 5000, (rows,), generator=generator)
    together = gumbel_argmax(logits, keys, positions)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(gumbel_argmax(logits[order], keys[order], positions[order]), together[order])
    alone = [gumbel_argmax(logits[i : i + 1], keys[i : i + 1], positions[i : i + 1]) for i in range(rows)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize(("elements", "shapes"), [(257 * 4, [(4, 257)] * 12 + [(2, 257)]), (100, None), (1, None)])
def test_chunks_do_not_change_tokens_and_bound_memory(monkeypatch, elements, shapes):
    """Chunks of rows, of parts of a row, and of single logits."""
    logits = torch.randn(50, 257, generator=torch.Generator().manual_seed(0))
    logits[3], logits[4, 200:] = -torch.inf, torch.inf
    keys, positions = torch.arange(50), torch.arange(50) * 3
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", logits.numel())
    whole = reference.gumbel_argmax_reference(logits, keys, positions)
    assert whole[3] == 0 and whole[4] == 200
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", elements)
    made, make_noise = [], reference.gumbel_noise
    monkeypatch.setattr(
        reference, "gumbel_noise", lambda k, p, v, f: made.append((len(k), v)) or make_noise(k, p, v, f)
    )
    rows = 50 if elements > 1 else 6
    assert torch.equal(reference.gumbel_argmax_reference(logits[:rows], keys[:rows], positions[:rows]), whole[:rows])
    assert max(r * v for r, v in made) <= elements and sum(r * v for r, v in made) == rows * 257
    assert shapes is None or made == shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_special_values(dtype):
    inf, nan = torch.inf, torch.nan
    rows = [[-inf, nan, 0.0, -inf], [-inf] * 4, [nan] * 4, [0.0, inf, -inf, inf], [nan, -inf, nan, -5.0]]
    tokens = gumbel_argmax(torch.tensor(rows, dtype=dtype), torch.arange(5), torch.arange(5))
    assert tokens.tolist() == [2, 0, 0, 1, 3]
    assert tokens.dtype == torch.int64


def test_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    assert gumbel_argmax(torch.empty(0, 9), empty, empty).shape == (0,)


def test_request_key_is_the_same_in_every_process():
    code = "from rl_accel.sampling.keys import request_key; print(request_key(7, 'gsm8k/12', 3, 40, False))"
    keys = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": hash_seed}, text=True
        ).strip()
        for hash_seed in ("0", "1")
    }
    assert keys == {str(request_key(7, "gsm8k/12", 3, 40, False))}


def test_request_key_tells_every_argument_apart():
    base = (7, "a", 1, 2, False)
    others = [
        (8, "a", 1, 2, False),
        (7, "b", 1, 2, False),
        (7, "a", 2, 2, False),
        (7, "a", 1, 3, False),
        (7, "a", 1, 2, True),
    ]
    others += [
        (7, 'a", 1', 1, 2, False),
        (7, "\ud800é", 1, 2, False),
        (1, "a", 7, 2, False),
        (7, "a", 12, 0, False),
    ]
    keys = [request_key(*arguments) for arguments in (base, *others)]
    assert len(set(keys)) == len(keys)
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


@pytest.mark.parametrize(
    ("logits", "keys", "positions", "message"),
    [
        (torch.zeros(3), torch.arange(3), torch.arange(3), r"logits: expected a floating \[R, V\]"),
        (torch.zeros(3, 0), torch.arange(3), torch.arange(3), "V >= 1"),
        (torch.zeros(3, 2), torch.arange(2), torch.arange(3), "one entry per logits row"),
        (torch.zeros(3, 2), torch.arange(3), torch.zeros(3), "positions: expected an integer tensor"),
        (torch.zeros(3, 2), torch.arange(3).int(), torch.arange(3), "request_key"),
    ],
)
def test_wrong_arguments(logits, keys, positions, message):
    with pytest.raises(ValueError, match=message):
        gumbel_argmax(logits, keys, positions)
