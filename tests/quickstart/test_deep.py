"""The grown policy computes what the shipped one does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl_accel.quickstart.deep import MOE_POLICY, POLICY, deep_policy, grow, shipped_policy


@pytest.mark.parametrize("layers", [4, 7, 24])
def test_logits_are_the_same_to_the_bit(layers: int, tmp_path) -> None:
    grow(POLICY, tmp_path / "grown", layers)
    old = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    assert new.config.num_hidden_layers == layers == len(new.model.layers)
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(old(ids).logits, new(ids).logits)
    assert (tmp_path / "grown" / "tokenizer.json").is_file()


def test_fewer_layers_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="4 layers already"):
        grow(POLICY, tmp_path / "grown", 3)


def test_it_is_made_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = deep_policy(5)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert deep_policy(5) == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "rl_accel").iterdir()] == [folder.name], "nothing unfinished is left"


def test_only_shipped_names_are_replaced() -> None:
    assert shipped_policy("quickstart") == str(POLICY)
    assert shipped_policy("quickstart_moe") == str(MOE_POLICY)
    assert shipped_policy("some/model") == "some/model"
