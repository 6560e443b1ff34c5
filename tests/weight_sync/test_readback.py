"""What is kept of a weight sync for the read-back, and the names under which engines load what trainers send."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rl_accel.hosts.vllm.weight_names import for_engine
from rl_accel.weight_sync.experts import sent_experts
from rl_accel.weight_sync.readback import SentSample

E, H, I = 3, 4, 5  # noqa: E741


def weights(block: str = "mlp", names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"), fused: bool = False):
    """Two layers as a trainer sends them: embedding, attention, router, experts."""
    generator = torch.Generator().manual_seed(0)
    gate, up, down = names
    sent = [("model.embed_tokens.weight", torch.zeros(100, H))]
    for layer in ("model.layers.0", "model.layers.1"):
        sent += [
            (f"{layer}.self_attn.o_proj.weight", torch.zeros(H, H)),
            (f"{layer}.{block}.gate.weight", torch.zeros(E, H)),
        ]
        w13 = torch.randn(E, 2 * I, H, generator=generator)
        w2 = torch.randn(E, H, I, generator=generator)
        experts = f"{layer}.{block}.experts"
        if fused:
            sent += [(f"{experts}.{'w13' if gate == 'w1' else 'gate_up_proj'}", w13), (f"{experts}.{down}", w2)]
            continue
        for e in range(E):
            sent += [(f"{experts}.{e}.{gate}.weight", w13[e, :I]), (f"{experts}.{e}.{up}.weight", w13[e, I:])]
            sent += [(f"{experts}.{e}.{down}.weight", w2[e])]
    return sent


@pytest.mark.parametrize("fused", [False, True])
def test_router_and_experts_of_the_first_layer_are_kept_whatever_the_budget(fused) -> None:
    sent = weights(fused=fused)
    sample = SentSample(budget_bytes=4 * H * H)
    for weight in sent:
        sample.add([weight])
    first = {name for name, _ in sent if name.startswith("model.layers.0.mlp.")}
    assert set(sample.tensors) == first | {"model.layers.0.self_attn.o_proj.weight"}


def test_a_budget_that_is_large_enough_keeps_all_in_order() -> None:
    sent = weights()
    sample = SentSample()
    sample.add(sent)
    assert list(sample.tensors) == [name for name, _ in sent]


def layer(block: str, names: tuple[str, str, str]) -> SimpleNamespace:
    """What `sent_experts` looks at on a layer of vLLM."""
    gate, up, down = names
    return SimpleNamespace(
        layer_name=f"model.layers.1.{block}.experts",
        ckpt_gate_proj_name=gate,
        ckpt_up_proj_name=up,
        ckpt_down_proj_name=down,
        is_fused_checkpoint_transposed=False,
        global_num_experts=E,
    )


@pytest.mark.parametrize(
    ("block", "names"),
    [("mlp", ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2"))],
)
def test_experts_sent_one_by_one_and_fused_are_the_same(block, names) -> None:
    one_by_one, fused = (sent_experts(layer(block, names), dict(weights(block, names, form))) for form in (False, True))
    assert one_by_one["w13"].shape == (E, 2 * I, H) and one_by_one["w2"].shape == (E, H, I)
    assert all(torch.equal(one_by_one[which], fused[which]) for which in ("w13", "w2"))


def test_a_layer_of_which_one_expert_was_not_kept_is_left_out() -> None:
    names = ("gate_proj", "up_proj", "down_proj")
    sent = dict(weights())
    del sent["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert sent_experts(layer("mlp", names), sent) is None


class Mixtral(torch.nn.Module):
    """Of the shape that matters here: vLLM's names of its blocks."""

    def __init__(self, block: str):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        setattr(self.layers[0], block, torch.nn.Module())


@pytest.mark.parametrize("fused", [False, True])
def test_mixtrals_weights_get_the_names_of_its_checkpoints(fused) -> None:
    names = ("w1", "w3", "w2")
    sent, wanted = weights(fused=fused), weights("block_sparse_moe", names, fused)
    assert [name for name, _ in for_engine(Mixtral("block_sparse_moe"), sent)] == [name for name, _ in wanted]
    assert for_engine(Mixtral("block_sparse_moe"), wanted) == wanted, "such names stay"
    assert for_engine(Mixtral("mlp"), sent) is sent
