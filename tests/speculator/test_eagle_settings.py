"""`rl_accel.speculator.head=eagle3` before anything starts: what follows from it, what it writes, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import rl_accel
from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError, NotLiveError
from rl_accel.hosts.verl.prepare import engine_args, engine_settings
from rl_accel.speculator import export
from rl_accel.speculator.config import SpeculatorConfig
from rl_accel.speculator.eagle import first_weights
from rl_accel.speculator.feature import FEATURE
from rl_accel.speculator.hosts import draft_folder, launch
from rl_accel.speculator.hosts.driver import SpeculatorDriver
from rl_accel.speculator.kinds import KINDS

POLICY = Path(rl_accel.__file__).parent / "quickstart" / "policy"
POLICY_CONFIG = json.loads((POLICY / "config.json").read_text())
EAGLE = {"sampling": {"exact": True}, "speculator": {"head": "eagle3", "enable": True}}


def test_settings_and_table_know_the_same_kinds() -> None:
    assert tuple(KINDS) == ("recurrent", "eagle3")
    for kind in KINDS:
        assert SpeculatorConfig(head=kind).head == kind
    with pytest.raises(ConfigError, match="Did you mean 'eagle3'"):
        SpeculatorConfig(head="eagle")
    with pytest.raises(ConfigError, match="drafts all tokens"):
        SpeculatorConfig(draft_vocab=100)


def test_vllm_is_told_to_draft_from_a_folder_that_is_there(tmp_path) -> None:
    accel = AccelConfig.from_mapping(EAGLE)
    assert accel.settings["draft"].method == "head"
    (name, (value, feature)) = next(iter(engine_args(accel, POLICY_CONFIG, tmp_path).items()))
    assert (name, feature) == ("speculative_config", "speculator")
    assert value["method"] == "eagle3" and value["num_speculative_tokens"] == 3
    assert value["disable_padded_drafter_batch"] and value["draft_load_config"] == {"load_format": "safetensors"}
    shape = draft_folder.read_shape(value["model"])
    assert shape == draft_folder.shape_for(POLICY_CONFIG, accel.settings["speculator"])
    assert (shape.hidden_size, shape.vocab_size) == (POLICY_CONFIG["hidden_size"], POLICY_CONFIG["vocab_size"])
    weights = load_file(Path(value["model"]) / export.WEIGHTS)
    expected = export.tensors(shape, first_weights(shape, 0))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in weights)
    assert AccelConfig.from_mapping(engine_settings(accel)).settings["speculator"].head == "eagle3"


def test_other_heads_write_nothing(tmp_path) -> None:
    accel = AccelConfig.from_mapping({"draft": {"method": "auto"}})
    (value, feature) = engine_args(accel, POLICY_CONFIG, tmp_path / "files")["speculative_config"]
    assert feature == "draft" and "DASProposer" in value["model"] and not (tmp_path / "files").exists()


def test_lengths_and_widths_are_the_users(tmp_path) -> None:
    values = {**EAGLE, "draft": {"num_speculative_tokens": 5}}
    accel = AccelConfig.from_mapping({**values, "speculator": {**EAGLE["speculator"], "width": 24}})
    (value, _) = engine_args(accel, POLICY_CONFIG, tmp_path)["speculative_config"]
    assert value["num_speculative_tokens"] == 5 and draft_folder.read_shape(value["model"]).width == 24


def test_a_policys_own_heads_and_rope_are_taken() -> None:
    policy = {
        "vocab_size": 1000, "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "max_position_embeddings": 40960,
    }  # fmt: skip
    shape = draft_folder.shape_for(policy, SpeculatorConfig())
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rope_theta) == (16, 8, 256, 1e6)
    assert shape.layers == (7, 21, 28) and shape.width == 512 and shape.max_positions == 40960
    plain = draft_folder.shape_for(
        {**policy, "head_dim": None, "rope_parameters": None, "rope_theta": 5e5}, SpeculatorConfig()
    )
    assert (plain.head_dim, plain.rope_theta) == (128, 5e5)


def test_a_reduced_vocabulary_keeps_the_first_tokens_and_those_that_end_texts() -> None:
    policy = {**POLICY_CONFIG, "vocab_size": 400, "bos_token_id": 3, "eos_token_id": [380, 5, 390]}
    shape = draft_folder.shape_for(policy, SpeculatorConfig(head="eagle3", draft_vocab=100))
    assert (shape.draft_vocab_size, shape.extra_tokens) == (100, (380, 390))
    assert shape.draft_ids().tolist() == [*range(98), 380, 390]
    edge = {**policy, "eos_token_id": [98, 99, 390]}
    assert draft_folder.shape_for(edge, SpeculatorConfig(head="eagle3", draft_vocab=100)).draft_ids().tolist() == [
        *range(97),
        98,
        99,
        390,
    ]
    for whole in (0, 400, 500):
        shape = draft_folder.shape_for(policy, SpeculatorConfig(head="eagle3", draft_vocab=whole))
        assert shape.draft_ids() is None and shape.extra_tokens == ()
    with pytest.raises(ConfigError, match="leaves no token"):
        draft_folder.shape_for(policy, SpeculatorConfig(head="eagle3", draft_vocab=2))


@pytest.mark.parametrize("policy", [{}, {"vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 2}])
def test_a_policy_that_is_not_here_is_said(policy, tmp_path) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads cannot be read"):
        engine_args(AccelConfig.from_mapping(EAGLE), policy, tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path) -> None:
    (tmp_path / "speculator").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written"):
        engine_args(AccelConfig.from_mapping(EAGLE), POLICY_CONFIG, tmp_path)


def test_a_folder_of_another_maker_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"], "vocab_size": 5}')
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(NotLiveError, match=r"no draft of rl_accel\.speculator"):
            draft_folder.read_shape(str(folder))


@pytest.mark.parametrize(
    ("settings", "rollout", "reason"),
    [
        ({"draft": {"method": "auto"}}, {}, "set rl_accel.draft.method=head"),
        ({}, {"tensor_model_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({}, {"pipeline_model_parallel_size": 2}, "pipeline_parallel_size 2"),
    ],
    ids=["auto", "tensor", "pipeline"],
)
def test_what_it_cannot_do_is_refused(settings, rollout, reason) -> None:
    accel = AccelConfig.from_mapping({**EAGLE, **settings})
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, **rollout}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": sizes, "actor": {"strategy": "fsdp2"}}})
    driver = SpeculatorDriver(FEATURE, accel.settings["speculator"], accel)
    with pytest.raises(ConfigError, match=reason):
        driver.check(config)
    recurrent = replace(accel.settings["speculator"], head="recurrent")
    SpeculatorDriver(FEATURE, recurrent, accel).check(config)


def test_a_server_refuses_the_same() -> None:
    eagle = "rl_accel.speculator.head=eagle3"
    ours, _, _ = launch.split([str(POLICY), eagle])
    assert launch.settings(ours).settings["draft"].method == "head"
    ours, _, _ = launch.split([str(POLICY), eagle, "rl_accel.draft.method=auto"])
    with pytest.raises(ConfigError, match=r"set rl_accel\.draft\.method=head"):
        launch.settings(ours)
    for option in (["--tensor-parallel-size", "2"], ["--tensor-parallel-size=2"], ["-tp", "2"], ["-pp=2"]):
        ours, model, theirs = launch.split(["--model", str(POLICY), eagle, *option])
        with pytest.raises(ConfigError, match="engines of one device"):
            launch.check(launch.settings(ours), model, theirs)


def test_a_server_drafts_for_the_policy_that_it_serves(tmp_path) -> None:
    """Named in either way, or by a file of options, which may also ask for what cannot be."""
    accel = launch.settings(launch.split(["rl_accel.speculator.head=eagle3"])[0])
    options = tmp_path / "options.yaml"
    options.write_text(f"model: {POLICY}\n")
    shape = draft_folder.shape_for(POLICY_CONFIG, accel.settings["speculator"])
    for model, theirs in ((str(POLICY), []), ("", [str(POLICY)]), ("", ["--config", str(options)])):
        args = launch.vllm_args(accel, model, [*theirs, "--dtype", "float32"], tmp_path / "files")
        assert draft_folder.read_shape(args.speculative_config["model"]) == shape
    options.write_text(f"model: {POLICY}\ntensor-parallel-size: 2\n")
    with pytest.raises(ConfigError, match="engines of one device"):
        launch.vllm_args(accel, "", ["--config", str(options)], tmp_path / "files")
