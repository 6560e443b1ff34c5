"""Attaching 4-bit communication: what is refused, and that a refusal changes nothing on any rank."""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import deepspeed.runtime.zero.stage_1_and_2 as stage12_module
import pytest
import torch
import torch.distributed as dist
from engines import ENGINES, assert_untouched, ds_config, four_bit, make_engine, train, weights_of

from rl_accel.comm import attach, initialize
from rl_accel.errors import CommError, ConfigError, NotLiveError, VersionError
from rl_accel.quickstart.tiny_gpt import TinyGPT


def case_refusals() -> None:
    """What cannot be served is refused on every rank with the reason, and nothing is touched."""
    cases = [
        (ds_config(2, reduce_scatter=False), {}, "reduce_scatter=false"),
        (ds_config(1, use_multi_rank_bucket_allreduce=False), {}, "use_multi_rank_bucket_allreduce"),
        (ds_config(2, contiguous_gradients=False), {}, "contiguous_gradients=false"),
        (ds_config(3, zero_hpz_partition_size=dist.get_world_size()), {}, "hierarchical partitions"),
        (ds_config(3), {"gradients": False}, "gradients=false leaves nothing"),
        (ds_config(3), {"check_every": 5}, "check_every needs replicas"),
        (ds_config(0, "fp32"), {}, "ZeRO stages 1 to 3"),
    ]
    for config, changes, words in cases:
        if "hierarchical" in words and dist.get_world_size() == 1:
            continue
        engine = make_engine(config)
        with pytest.raises(CommError, match=re.escape(words)):
            attach(engine, four_bit(**changes))
        assert_untouched(engine)

    engine = make_engine(ENGINES["stage1"])
    for attribute, value, words in (
        ("has_moe_layers", True, "mixture-of-experts"),
        ("sequence_parallel_size", 2, "sequence parallelism"),
    ):
        original = getattr(engine, attribute)
        setattr(engine, attribute, value)
        with pytest.raises(CommError, match=re.escape(words)):
            attach(engine, four_bit())
        setattr(engine, attribute, original)
        assert_untouched(engine)
    for key, value, words in (
        ("zero_quantized_gradients", True, "zero_quantized_gradients"),
        ("offload_optimizer", type("Offload", (), {"device": "cpu"})(), "offload_optimizer"),
    ):
        zero = engine._config.zero_config
        original = getattr(zero, key)
        object.__setattr__(zero, key, value)
        zero.__dict__[key] = value
        with pytest.raises(CommError, match=re.escape(words)):
            attach(engine, four_bit())
        zero.__dict__[key] = original
    assert_untouched(engine)

    handle = attach(engine, four_bit())
    with pytest.raises(CommError, match=re.escape("twice")):
        attach(engine, four_bit())
    handle.detach()


def case_gradients_that_go_elsewhere_stop_the_run() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage2"])
    handle = attach(engine, four_bit())
    train(engine, 1)
    del engine.optimizer.allreduce_and_scatter
    with pytest.raises(NotLiveError, match=re.escape("reduced none")):
        train(engine, 1, first=1)
    engine.optimizer.allreduce_and_scatter = None
    handle.detach()


def case_ranks_that_disagree() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage1"])
    with pytest.raises(CommError, match=re.escape("disagree")):
        attach(engine, four_bit(seed=dist.get_rank()))
    assert_untouched(engine)


def case_a_failed_attach_changes_nothing() -> None:
    """Replicas that differ, and a host on one rank that is not what it should be: an error on all ranks, engines as
    they were, and the next attach works."""
    if dist.get_world_size() == 1:
        return
    for name in ("stage2", "bf16_optimizer"):
        engine = make_engine(ENGINES[name])
        weight = next(engine.module.parameters()).data.view(-1)
        if dist.get_rank() == 0:
            weight[3] += 1.0
        with pytest.raises(CommError, match="different weights"):
            attach(engine, four_bit())
        assert_untouched(engine)
        if dist.get_rank() == 0:
            weight[3] -= 1.0
        before = weights_of(engine)
        dist.broadcast(before, 0)  # 1.0 in bfloat16 takes the last bits along
        weight.copy_(before[: weight.numel()])

        groups = "parallel_partitioned_bit16_groups" if name == "stage2" else "bf16_partitioned_groups"
        kept = vars(engine.optimizer)[groups]
        if dist.get_rank() == 1:
            delattr(engine.optimizer, groups)
        with pytest.raises(CommError, match=groups):
            attach(engine, four_bit())
        setattr(engine.optimizer, groups, kept)
        assert_untouched(engine)
        handle = attach(engine, four_bit())
        train(engine, 1)
        handle.detach()


def case_a_codec_that_is_not_built_on_one_rank_is_refused_on_all() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage1"])
    package, name = "rl_accel.kernels.codec", "rl_accel.kernels.codec.cpp"
    backend = importlib.import_module(name)
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        del vars(sys.modules[package])["cpp"]
        sys.modules[name] = None  # what an import of it finds where it was not built
    where = "" if dist.get_rank() == last else rf" \(found on rank {last}\)"
    with pytest.raises(NotLiveError, match=f"codec backend cpp does not load.*{where}$"):
        attach(engine, four_bit(backend="cpp"))
    sys.modules[name] = sys.modules[package].cpp = backend
    assert_untouched(engine)
    attach(engine, four_bit(backend="cpp")).detach()


def case_a_changed_host_symbol_is_refused() -> None:
    """On one rank DeepSpeed looks different: all ranks refuse."""
    engine = make_engine(ENGINES["stage1"])
    kept = stage12_module.DeepSpeedZeroOptimizer.allreduce_and_scatter
    if dist.get_rank() == 0:
        stage12_module.DeepSpeedZeroOptimizer.allreduce_and_scatter = lambda self, bucket: None
    try:
        with pytest.raises(VersionError, match=re.escape("allreduce_and_scatter takes (self, bucket)")):
            attach(engine, four_bit())
    finally:
        stage12_module.DeepSpeedZeroOptimizer.allreduce_and_scatter = kept
    assert_untouched(engine)


def case_initialize_with_a_block() -> None:
    """In every form in which `deepspeed.initialize` takes a configuration; the caller's objects stay as they are."""
    config = {**ENGINES["stage2"], "sdp4bit": {"bypass": "never", "seed": 3}}
    path = Path(tempfile.mkdtemp()) / "ds.json"
    path.write_text(json.dumps(config))
    text = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    options = argparse.Namespace(deepspeed_config=str(path), local_rank=int(os.environ["LOCAL_RANK"]))
    forms = {
        "config": lambda model, optimizer: initialize(model=model, optimizer=optimizer, config=config),
        "path": lambda model, optimizer: initialize(model=model, optimizer=optimizer, config=str(path)),
        "base64": lambda model, optimizer: initialize(model=model, optimizer=optimizer, config=text),
        "config_params": lambda model, optimizer: initialize(model=model, optimizer=optimizer, config_params=config),
        "args": lambda model, optimizer: initialize(args=options, model=model, optimizer=optimizer),
        "positions": lambda model, optimizer: initialize(options, model, optimizer),
    }
    for name, build in forms.items():
        torch.manual_seed(0)
        model = TinyGPT(width=32, layers=1, length=32)
        engine, *rest = build(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        assert len(rest) == 3, name
        handle = engine.optimizer.sdp4bit_handle
        assert handle.config.seed == 3, name
        handle.detach()
    assert config["sdp4bit"] == {"bypass": "never", "seed": 3}
    assert options.deepspeed_config == str(path)
    train(engine, 1)

    path.write_text(json.dumps(ENGINES["stage2"]))
    assert_untouched(make_engine(str(path), build=initialize))
    assert_untouched(initialize(options, TinyGPT(width=32, layers=1, length=32), torch.optim.AdamW)[0])
    with pytest.raises(ConfigError, match=re.escape("Did you mean 'hadamard'")):
        make_engine({**ENGINES["stage2"], "sdp4bit": {"hadamrd": True}}, build=initialize)
