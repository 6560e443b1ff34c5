"""A Ray cluster that exists already: what is asked of it, and where the run's own process starts."""

from __future__ import annotations

from typing import ClassVar

import pytest

from rl_accel import recipes
from rl_accel.errors import ConfigError
from rl_accel.hosts.verl import cluster
from rl_accel.hosts.verl.prepare import preflight, prepare


def config_of(*overrides):
    return recipes.compose("gsm8k_grpo/cpu_nodes", list(overrides), has_gpu=False)


def node(address: str, gpus: float, cpus: float, alive: bool = True):
    return {"Alive": alive, "NodeManagerAddress": address, "NodeID": address, "Resources": {"GPU": gpus, "CPU": cpus}}


@pytest.mark.parametrize(
    "nodes",
    [
        [node("a", 1, 16), node("b", 1, 16)],
        [node("a", 1, 3), node("b", 2, 64)],
        [node("a", 2, 6)],  # verl's two placement groups fit on one node, too
        [node("head", 0, 0), node("a", 1, 8), node("b", 1, 8)],
    ],
)
def test_a_cluster_with_room_is_taken(nodes):
    cluster.check_nodes(config_of(), nodes)


@pytest.mark.parametrize(
    ("nodes", "room"),
    [
        ([node("10.0.0.1", 1, 16)], 1),
        ([node("10.0.0.1", 1, 16), node("10.0.0.2", 1, 16, alive=False)], 1),
        ([node("10.0.0.1", 1, 16), node("10.0.0.2", 1, 2)], 1),
        ([node("10.0.0.1", 0, 16)], 0),
        ([], 0),
    ],
)
def test_a_cluster_without_room_is_refused_with_what_it_has(nodes, room):
    with pytest.raises(ConfigError) as error:
        cluster.check_nodes(config_of(), nodes)
    message = str(error.value)
    assert f"trainer.nnodes=2: the Ray cluster has room for {room}" in message
    assert "ray start --address=HEAD:6379 --num-gpus=1" in message
    assert all(found["NodeManagerAddress"] in message for found in nodes if found["Alive"])


def test_all_ranks_of_a_node_must_fit():
    """Two nodes of three devices hold no two groups of two each on one: 3 // 2 + 3 // 2."""
    config = config_of("trainer.n_gpus_per_node=2")
    cluster.check_nodes(config, [node("a", 3, 16), node("b", 3, 16)])
    with pytest.raises(ConfigError, match="room for 1"):
        cluster.check_nodes(config, [node("a", 3, 16), node("b", 1, 16)])


@pytest.mark.parametrize("trainer", ["fsdp", "deepspeed"])
def test_a_trainer_leaves_devices_to_the_cluster(trainer):
    config = config_of(f"trainer={trainer}")
    preflight(config)
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (2, 1)
    assert config.ray_kwargs.ray_init.num_gpus is None
    assert config.actor_rollout_ref.actor.strategy == {"fsdp": "fsdp2"}.get(trainer, trainer)


def test_an_address_may_come_from_the_environment(monkeypatch):
    config = config_of("ray_kwargs.ray_init.address=null")
    with pytest.raises(ConfigError, match="no Ray cluster is given"):
        preflight(config)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    preflight(config)


def test_rays_processes_on_other_machines_get_the_drivers_variables(monkeypatch):
    """On a cluster they have the environment of `ray start`: wandb would ask for a key where the driver is offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_RESUME", "allow")
    config = config_of("rl_accel.run_dir=/nowhere")
    config.data.train_files = config.data.val_files = ["s3://somewhere"]
    prepare(config)
    given = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert (given.WANDB_MODE, given.WANDB_RESUME) == ("offline", "allow")


class Runner:
    """In the place of verl's TaskRunner, an actor class."""

    chosen: ClassVar[dict] = {}

    @classmethod
    def options(cls, **options):
        cls.chosen = options
        return cls

    @classmethod
    def remote(cls):
        return cls.chosen


def test_the_runner_starts_on_the_drivers_node():
    """It reads the data and writes metrics and tokens, whose folder other nodes may not have."""
    import ray

    ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        chosen = cluster.RunnerOnThisNode(Runner, config_of()).options(num_cpus=2).remote()
        assert chosen["num_cpus"] == 2
        assert chosen["scheduling_strategy"].node_id == ray.get_runtime_context().get_node_id()
        with pytest.raises(ConfigError, match="room for 2"):
            cluster.RunnerOnThisNode(Runner, config_of("trainer.nnodes=3")).remote()
    finally:
        ray.shutdown()
