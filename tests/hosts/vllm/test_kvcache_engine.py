"""The quantized KV cache in a real vLLM engine: pages as asked for, and the same bits however a text comes about.

The engines: `kvcache_engine.py`, on a random 2-layer Qwen2: layer 0 in 8 bits, layer 1 in 4.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .tiny_qwen import build_model

ENGINE = Path(__file__).with_name("kvcache_engine.py")
SAME = ("das", "draft_model", "chunks", "preempt")
MODES = ("stock", "plain", *SAME[:-1], "all4", "options", "bf16", "bf16_ngram", "moved", "unasked", "wide",
         "stock_wide", "stock_after", "tp2")  # fmt: skip


@pytest.fixture(scope="module")
def engines(run_ranks, tmp_path_factory):
    """Results by mode, each engine started once, all in one process but that with another number of threads."""
    folder = tmp_path_factory.mktemp("kvcache")
    build_model(folder / "model")
    build_model(folder / "model-moved", seed=1, outlier=40.0)
    build_model(folder / "model-wide", head_dim=128)
    (results,) = run_ranks(ENGINE, 1, str(folder / "model"), *MODES, timeout=500)
    (one_thread,) = run_ranks(ENGINE, 1, str(folder / "model"), "preempt", timeout=100)
    return results | one_thread


def log_prob_differences(a: dict, b: dict) -> torch.Tensor:
    return (torch.tensor(a["logprobs"], dtype=torch.float64) - torch.tensor(b["logprobs"], dtype=torch.float64)).abs()


@pytest.mark.parametrize("mode", SAME)
def test_tokens_and_log_probs_are_the_same_bits(engines, mode) -> None:
    """With drafts, also by a model on such pages; in chunks of 16 tokens and larger blocks, without prefix caching;
    with preemptions and one thread."""
    assert engines[mode]["tokens"] == engines["plain"]["tokens"]
    assert engines[mode]["logprobs"] == engines["plain"]["logprobs"]


def test_what_was_varied_took_place(engines) -> None:
    """Else the comparison above would say nothing."""
    counts = engines["das"]["after"]["counts"]
    assert counts["num_draft_tokens"] > counts["num_accepted_tokens"] > 50
    drafter = engines["draft_model"]["after"]
    assert drafter["impls"] == ["KVInt4Impl"] * 4 and drafter["counts"]["num_accepted_tokens"] > 50
    assert engines["preempt"]["preemptions"] > 0 == engines["plain"]["preemptions"]
    assert (engines["preempt"]["threads"], engines["plain"]["threads"]) == (1, 2)
    assert engines["plain"]["cached"] > 500 and engines["chunks"]["cached"] == 0


def test_drafts_change_nothing_in_bfloat16_either(engines) -> None:
    assert engines["bf16_ngram"]["tokens"] == engines["bf16"]["tokens"] != engines["plain"]["tokens"]
    assert engines["bf16_ngram"]["logprobs"] == engines["bf16"]["logprobs"]
    assert engines["bf16_ngram"]["after"]["counts"]["num_accepted_tokens"] > 50


def test_layers_hold_what_was_asked_for(engines) -> None:
    """Pages of d + 8 and 2 d + 8 bytes a token and head; blocks counted by the engine accordingly."""
    plain, stock, all4 = (engines[mode]["state"] for mode in ("plain", "stock", "all4"))
    assert plain["impls"] == ["KVInt4Impl"] * 2 and stock["impls"] == ["CPUAttentionBackendImpl"] * 2
    assert [(dtype, shape[1:]) for dtype, shape in plain["caches"]] == [
        (torch.uint8, (2, 32, 2 * 32 + 8)), (torch.uint8, (2, 32, 32 + 8))
    ]  # fmt: skip
    assert [shape[1:] for _, shape in all4["caches"]] == [(2, 32, 32 + 8)] * 2
    live = plain["live"]["features"]["kvcache"]
    assert (live["int4_layers"], live["int8_layers"]) == (1, 1)
    assert plain["blocks"] / stock["blocks"] == pytest.approx(2 * 8 * 32 / (40 + 72), rel=0.01)
    assert all4["blocks"] / stock["blocks"] == pytest.approx(8 * 32 / 40, rel=0.01)
    assert plain["metrics"]["tokens"] == 32 * plain["blocks"]
    assert plain["metrics"]["bytes_per_token"] == 2 * (40 + 72)
    wide, stock_wide = engines["wide"]["state"], engines["stock_wide"]["state"]
    assert wide["blocks"] / stock_wide["blocks"] >= 3.7, "head size 128 against bfloat16"


def test_the_error_is_there_and_small(engines) -> None:
    """Four bits are in force: a little off, less with the first layer in eight."""
    stock = engines["stock"]
    same = [i for i, tokens in enumerate(stock["tokens"]) if all(
        engines[mode]["tokens"][i] == tokens for mode in ("plain", "all4"))]  # fmt: skip
    assert len(same) > 3
    mixed, all4 = (log_prob_differences(engines[mode], stock)[same].mean() for mode in ("plain", "all4"))
    assert 1e-6 < mixed < all4 < 0.1


def test_an_engine_without_the_feature_is_stock_again(engines) -> None:
    for what in ("tokens", "logprobs"):
        assert engines["stock_after"][what] == engines["stock"][what]
    assert engines["stock_after"]["state"]["impls"] == engines["stock"]["state"]["impls"]


def test_new_weights_are_measured_and_sampled_as_by_a_fresh_engine(engines) -> None:
    """The last layer of the new weights has outliers in K, which are balanced from the next requests on."""
    synced, fresh = engines["plain"]["moved"], engines["moved"]
    assert synced["tokens"] == fresh["tokens"] != engines["plain"]["tokens"]
    assert synced["logprobs"] == fresh["logprobs"]
    before, after = (engines[mode]["state"]["live"]["features"]["kvcache"] for mode in ("plain", "moved"))
    assert (before["balanced_layers"], after["balanced_layers"]) == (0, 1)
    assert synced["state"]["metrics"]["balanced_layers"] == 1.0
    assert synced["state"]["metrics"]["order"] == sum(after["orders"]) / 2
    assert synced["state"]["metrics"]["measure_ms"] > 0


def test_rotated_v_and_a_shift_of_k_change_roundings_only(engines) -> None:
    options, plain = engines["options"], engines["plain"]
    assert options["state"]["live"]["features"]["kvcache"]["orders"] == [8, 8]
    same = [i for i, tokens in enumerate(plain["tokens"]) if options["tokens"][i] == tokens]
    assert len(same) > 3
    assert 0 < log_prob_differences(options, plain)[same].mean() < 0.05


def test_ranks_hold_their_own_heads(engines) -> None:
    """Tensor parallelism: a KV head a rank; what is left of a difference are sums over ranks in another order."""
    tp2, plain = engines["tp2"], engines["plain"]
    for state in tp2["states"]:
        assert [shape[1:] for _, shape in state["caches"]] == [(1, 32, 2 * 32 + 8), (1, 32, 32 + 8)]
        assert state["impls"] == ["KVInt4Impl"] * 2
    same = [i for i, tokens in enumerate(plain["tokens"]) if tp2["tokens"][i] == tokens]
    assert len(same) > len(plain["tokens"]) // 2
    assert log_prob_differences(tp2, plain)[same].mean() < 1e-3


def test_vllm_must_have_been_asked_for_the_pages(engines) -> None:
    assert "needs vLLM's kv_cache_dtype=int4_per_token_head" in engines["unasked"]["refused"]
