"""The plug-in: quick, re-entrant, silent when not asked, loud when it cannot deliver; and its counter."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rl_accel.errors import ConfigError, NotLiveError
from rl_accel.hosts.verl.worker_extension import AcceleratedWorkerExtension
from rl_accel.hosts.vllm import plugin
from rl_accel.hosts.vllm.spec_stats import SpecDecodeCounter


def test_register_imports_nothing_heavy_and_hooks_once():
    code = """
import sys
from rl_accel.hosts.vllm.plugin import register
register(); register()
assert not {"torch", "vllm", "transformers"} & set(sys.modules), "register() imported a host"
import wrapt
from vllm.v1.worker import cpu_model_runner, gpu_model_runner
from vllm.v1.worker.gpu import model_runner as v2
register()
for load_model in (gpu_model_runner.GPUModelRunner.__dict__["load_model"],
                   cpu_model_runner.CPUModelRunner.__dict__["load_model"], v2.GPUModelRunner.__dict__["load_model"]):
    assert isinstance(load_model, wrapt.FunctionWrapper)
    assert not isinstance(load_model.__wrapped__, wrapt.FunctionWrapper), "wrapped twice"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def bare_runner() -> SimpleNamespace:
    """What `install` looks at on a runner that neither speculates nor pools."""
    config = SimpleNamespace(speculative_config=None, additional_config={})
    return SimpleNamespace(vllm_config=config, speculative_config=None, is_pooling_model=False)


@pytest.mark.parametrize("additional", [{}, {"rl_accel": None}, {"other": {}}, None])
def test_without_settings_only_the_model_is_loaded(additional, monkeypatch):
    monkeypatch.setattr(plugin, "install", lambda *_: pytest.fail("installed unasked"))
    runner = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional))
    for hook in map(plugin._install_then_load, ("V1", "V2")):
        assert hook(lambda *args, **kwargs: (args, kwargs), runner, (1,), {"a": 2}) == ((1,), {"a": 2})
    assert not hasattr(runner, "rl_accel_live")


@pytest.mark.parametrize(
    ("settings", "speculative_config"),
    [({"sampling": {"exact": True}}, None), ({"draft": {"method": "ngram"}}, None), ({}, object())],
)
def test_the_v2_runner_is_refused(settings, speculative_config):
    config = SimpleNamespace(additional_config={"rl_accel": settings}, speculative_config=speculative_config)
    with pytest.raises(NotLiveError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        plugin._install_then_load("V2")(lambda: None, SimpleNamespace(vllm_config=config), (), {})


def test_the_v2_runner_runs_where_nothing_of_ours_needs_v1():
    """And says that it is one; verl's questions to the engine get an answer."""
    config = SimpleNamespace(additional_config={"rl_accel": {"sampling": {"exact": False}}}, speculative_config=None)
    runner = SimpleNamespace(vllm_config=config)
    assert plugin._install_then_load("V2")(lambda: "loaded", runner, (), {}) == "loaded"
    assert runner.rl_accel_live["model_runner"] == "V2"
    assert runner.rl_accel_live["features"] == {"sync": True}
    worker = AcceleratedWorkerExtension()
    worker.model_runner = runner
    assert worker.rl_accel_live() == runner.rl_accel_live
    assert worker.rl_accel_drain() == {"counts": {"malformed_identities": 0}, "features": {"sync": {}}}
    assert worker.rl_accel_call("sync", "last_sync", ()) == {}
    with pytest.raises(NotLiveError, match="feature draft is not on in this engine; on are sync"):
        worker.rl_accel_call("draft", "take_segment", ())


def test_a_draft_method_without_speculation_is_refused():
    with pytest.raises(NotLiveError, match="without speculative_config"):
        plugin.install(bare_runner(), {"draft": {"method": "suffix"}})


@pytest.mark.parametrize(
    "settings", [{"sampling": {"exact": "yes"}}, {"sampling": {"seed": True}}, {"draft": {"method": 3}}]
)
def test_settings_of_a_wrong_type_are_refused(settings):
    with pytest.raises(ConfigError, match="must be"):
        plugin.install(bare_runner(), settings)


def test_settings_that_ask_for_nothing_install_nothing():
    runner = bare_runner()
    before = set(vars(runner))
    plugin.install(runner, {"sampling": {"exact": False}, "draft": {"method": "none"}, "sync": {}})
    ours = {"rl_accel", "rl_accel_live", "rl_accel_spec_stats", "rl_accel_faults"}
    assert set(vars(runner)) == before | ours
    assert runner.rl_accel_spec_stats is None and list(runner.rl_accel) == ["sync"]


def test_counter_counts_and_drains():
    """Rows: 2 of 3 drafts accepted; no draft; all 2 accepted; rejected at once; a prefill that vLLM discards."""
    output = torch.tensor(
        [[5, 6, 7, -1], [8, -1, -1, -1], [1, 2, 3, -1], [4, -1, -1, -1], [9, -1, -1, -1]], dtype=torch.int32
    )
    counter = SpecDecodeCounter(torch.device("cpu"))
    with torch.inference_mode():
        for _ in range(2):
            counter.observe(output, [3, 0, 2, 1, 0], np.array([False, False, False, False, True]), 10)
    want = {"num_drafts": 6, "num_draft_tokens": 12, "num_accepted_tokens": 8, "num_emitted_tokens": 16}
    assert counter.drain() == want
    assert counter.drain() == dict.fromkeys(want, 0)


def test_counter_ignores_ids_outside_the_vocabulary():
    """vLLM's `parse_output` drops them as padding."""
    counter = SpecDecodeCounter(torch.device("cpu"))
    counter.observe(torch.tensor([[3, 10, -1]]), [2], np.array([False]), 10)
    assert counter.drain()["num_emitted_tokens"] == 1


@pytest.mark.parametrize("root", [logging.ERROR, logging.WARNING, logging.INFO])
def test_our_warnings_are_heard_where_the_root_logger_keeps_errors_only(monkeypatch, root) -> None:
    """Importing vLLM's command `serve` raises the root logger's level to ERROR; what the user set lower stays."""
    ours = logging.getLogger("rl_accel")
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    monkeypatch.setattr(logging.root, "level", root)
    logging.root.manager._clear_cache()
    plugin.keep_warnings()
    assert ours.isEnabledFor(logging.WARNING)
    assert ours.getEffectiveLevel() == min(root, logging.WARNING)
    logging.root.manager._clear_cache()
