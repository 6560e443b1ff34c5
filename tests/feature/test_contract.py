"""The contract between the spine and the features: who may name whom, and a feature that nobody here knows.

What the toy does in a training is asserted in `tests/hosts/verl/test_training.py`, whose run has it on.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import rl_accel
from rl_accel import feature, flags
from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError

PACKAGE = Path(rl_accel.__file__).parent
TOY = Path(__file__).parent / "toy"
HOSTS = ("verl", "vllm", "deepspeed", "transfer_queue")
SPINE = [
    *(PACKAGE / name for name in ("train.py", "doctor.py", "config.py", "feature.py", "patching.py", "probing.py")),
    *(PACKAGE / "hosts").rglob("*.py"),
]
FOLDERS = {name: loaded.split(".")[1] for name, loaded in zip(feature.features(), feature.BUILT_IN, strict=False)}
"""Feature -> its folder."""


@pytest.fixture
def toy(monkeypatch):
    """The toy is installed in this process."""
    monkeypatch.syspath_prepend(str(TOY))
    feature.features.cache_clear()
    yield
    feature.features.cache_clear()
    for name in [name for name in sys.modules if name.startswith("toy_feature")]:
        del sys.modules[name]


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize("path", SPINE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_spine_names_no_feature(path):
    """Neither imports one, nor reads the settings or the metrics of one; the registry's own lines are left out."""
    named = [module for module in imports(path) if module.split(".")[:2] in [["rl_accel", f] for f in FOLDERS.values()]]
    assert not named
    text = path.read_text().replace("\n".join(f'    "{line}",' for line in feature.BUILT_IN), "")
    for name, folder in FOLDERS.items():
        pattern = rf"rl_accel[./]({name}|{folder})\b|accel\.{name}\b|settings\[.{name}.\]"
        assert not re.search(pattern, text), f"{path.name} names {name}: {re.search(pattern, text)}"


def test_only_glue_imports_a_host():
    for path in PACKAGE.rglob("*.py"):
        # A reward function of a recipe is what verl itself loads and calls.
        if "hosts" in path.relative_to(PACKAGE).parts or path == PACKAGE / "quickstart" / "reward.py":
            continue
        found = {module.split(".")[0] for module in imports(path)} & set(HOSTS)
        assert not found, f"{path.relative_to(PACKAGE)} imports {found}"


def test_no_core_of_a_feature_imports_that_of_another():
    for name in FOLDERS.values():
        others = {f"rl_accel.{other}" for other in FOLDERS.values() if other != name}
        for path in (PACKAGE / name).rglob("*.py"):
            if "hosts" not in path.relative_to(PACKAGE).parts:
                found = {module for module in imports(path) if ".".join(module.split(".")[:2]) in others}
                assert not found, f"{path.relative_to(PACKAGE)} imports {found}"


def test_every_feature_keeps_the_contract():
    for name, found in feature.features().items():
        settings = found.config()
        assert isinstance(settings.enabled, bool)
        assert len({line.name for line in found.metrics}) == len(found.metrics)
        assert all(line.reduction in ("sum", "max", "mean") and line.unit and line.meaning for line in found.metrics)
        for kind, base in feature.ROLES.items():
            if kind in ("driver", "probe", "trainer", "agent_loop"):
                assert issubclass(found.role(kind), base), (name, kind)


def test_a_feature_from_elsewhere_has_settings(toy):
    accel = AccelConfig.from_mapping({"toy": {"enable": True, "size": 7}})
    accel.check()
    assert accel.toy.size == 7 and "toy" in [found.name for found in accel.enabled()]
    with pytest.raises(ConfigError, match=r"rl_accel\.toy\.size must be at least 1"):
        AccelConfig.from_mapping({"toy": {"size": 0}})
    with pytest.raises(ConfigError, match="Did you mean 'size'"):
        AccelConfig.from_mapping({"toy": {"sizes": 0}})


def test_two_features_of_one_name_are_refused(toy, monkeypatch):
    monkeypatch.setattr(feature, "BUILT_IN", (*feature.BUILT_IN, "toy_feature:FEATURE"))
    with pytest.raises(ConfigError, match="another feature named 'toy'"):
        feature.features()


def test_two_features_that_claim_one_position_are_refused_by_name(toy):
    accel = AccelConfig.from_mapping(
        {"toy": {"enable": True, "claim": "vllm.speculative_config"}, "draft": {"method": "ngram"}}
    )
    with pytest.raises(ConfigError, match=r"rl_accel\.draft and rl_accel\.toy both need vllm\.speculative_config"):
        accel.check()


def test_a_lossy_feature_has_to_be_permitted():
    with pytest.raises(ConfigError, match=r"rl_accel\.comm .*lossy.*rl_accel\.allow_lossy=true"):
        AccelConfig.from_mapping({"comm": {"enable": True}}).check()
    AccelConfig.from_mapping({"comm": {"enable": True}, "allow_lossy": True}).check()


def test_the_page_of_metrics_is_that_of_the_tables():
    """`python scripts/make_docs.py` writes it."""
    sys.path.insert(0, str(PACKAGE.parent / "scripts"))
    try:
        import make_docs
    finally:
        sys.path.pop(0)
    assert make_docs.TARGET.read_text() == make_docs.metrics_page()


def test_help_lists_every_setting_with_its_default_and_meaning():
    found = {name: (default, meaning) for name, default, meaning in flags.flags()}
    for name, described in feature.features().items():
        for setting in fields(described.config):
            assert found[f"rl_accel.{name}.{setting.name}"][1], f"rl_accel.{name}.{setting.name} has no text under it"
    assert found["rl_accel.seed"][0] == "0" and found["rl_accel.comm.weight_bits"] == ("4", "4, 8 or 16.")
    assert (
        found["rl_accel.fast_path.enable"][0] == "true" and found["rl_accel.draft.num_speculative_tokens"][0] == "null"
    )
    assert "rl_accel.draft.window=8\n" in flags.page()
