"""Runs on a Ray cluster that exists already, of one node or several.

What verl 0.9.1 does not do there: it waits for ever, or says so when minutes have passed, where the cluster has too few
nodes; and it lets Ray choose the node of the `TaskRunner`, which reads the data and writes metrics, token ids and the
driver's part of checkpoints, so that a run folder that only the driver's node has is looked for on another.

Host symbols: `run_ppo` calls `task_runner_class.remote()`, or `.options(...).remote()`, right after `ray.init`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rl_accel.errors import ConfigError

logger = logging.getLogger(__name__)

CPUS_PER_RANK = 3
"""Logical processors that verl reserves beside each device (`ResourcePoolManager.max_colocate_count`)."""


def address(config: DictConfig) -> str | None:
    """Return where the Ray cluster of a configuration is, None if the run starts Ray itself."""
    found = OmegaConf.select(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS")
    return None if found == "local" else found


def check_settings(config: DictConfig) -> None:
    """Raise ConfigError for settings with which Ray or verl could not start on several nodes."""
    trainer, ray_init = config.trainer, config.ray_kwargs.ray_init
    where = address(config)
    if where is None:
        if trainer.nnodes > 1 and not _is_connected():
            raise ConfigError(
                f"trainer.nnodes={trainer.nnodes}: no Ray cluster is given, and the one that this run would start has "
                "one node. Run `ray start --head` on this machine, `ray start --address=THIS_MACHINE:6379` on the "
                "others, and set ray_kwargs.ray_init.address=auto"
            )
        return
    for name in ("num_cpus", "num_gpus"):
        if ray_init.get(name) is not None:
            raise ConfigError(
                f"ray_kwargs.ray_init.{name}={ray_init[name]}: the Ray cluster at {where} was started with its own; "
                f"set ray_kwargs.ray_init.{name}=null and give --{name.replace('_', '-')} to `ray start`"
            )


def check_nodes(config: DictConfig, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError if a cluster cannot hold the ranks.

    Args:
        nodes: as `ray.nodes()` lists them.
    """
    wanted, ranks = config.trainer.nnodes, config.trainer.n_gpus_per_node
    device = "NPU" if config.trainer.device == "npu" else "GPU"
    alive = [node for node in nodes if node["Alive"]]
    places, seen = 0, []
    for node in alive:
        devices, cpus = (int(node["Resources"].get(name, 0)) for name in (device, "CPU"))
        places += min(devices // ranks, cpus // (CPUS_PER_RANK * ranks))
        seen.append(f"{node['NodeManagerAddress']} with {devices} {device}, {cpus} CPU")
    if places < wanted:
        raise ConfigError(
            f"trainer.nnodes={wanted}: the Ray cluster has room for {places}. A node needs {ranks} {device} "
            f"(trainer.n_gpus_per_node) and {CPUS_PER_RANK * ranks} CPU; there are {len(alive)} nodes: "
            f"{'; '.join(seen) or 'none'}. Join machines by `ray start --address=HEAD:6379"
            + (f" --num-gpus={ranks}` (logical ones)" if config.trainer.device == "cpu" else "`")
            + ", or lower trainer.nnodes"
        )


class RunnerOnThisNode:
    """Stands for verl's `TaskRunner` class: checks the cluster, and starts the runner on the driver's node."""

    def __init__(self, task_runner_class: Any, config: DictConfig, options: Mapping[str, Any] | None = None):
        self._class, self._config, self._options = task_runner_class, config, dict(options or {})

    def options(self, **options: Any) -> RunnerOnThisNode:
        return RunnerOnThisNode(self._class, self._config, {**self._options, **options})

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            ConfigError: if the cluster cannot hold the ranks.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes, here = ray.nodes(), ray.get_runtime_context().get_node_id()
        check_nodes(self._config, nodes)
        own = next(node for node in nodes if node["NodeID"] == here)
        if own["Resources"].get("CPU", 0) < 1:
            logger.warning(
                "Ray has no processors on this node (%s), so another one reads the data and writes metrics, tokens and "
                "checkpoints: all nodes must see their folders",
                own["NodeManagerAddress"],
            )
        strategy = NodeAffinitySchedulingStrategy(node_id=here, soft=True)
        return self._class.options(**{"scheduling_strategy": strategy, **self._options}).remote(*args, **kwargs)


def _is_connected() -> bool:
    """Whether the caller has connected to Ray by itself, which verl leaves as it is."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()
