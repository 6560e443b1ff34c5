"""Entry point of the group `verl.plugins`: verl loads this module in every process that imports verl.

verl calls nothing here, it only imports, so this module installs its hooks on import. Each hook is a callback that
waits for a verl module to be imported and costs nothing until then:
- always: `validate_config`, where a drop-in command's settings are read in the driver (`prepare.py`), and `run_ppo`,
  where entries of verl that do not validate are told that they are not served;
- always: the engines of `strategy=deepspeed`, registered beside verl's own; DeepSpeed is imported when one is built;
- `VERL_PLATFORM=cpu`: what verl lacks to run without an accelerator (`cpu.py`);
- `RL_ACCEL_ACTIVE=1`, which `prepare.py` sets for the Ray processes of a run that asked for rl_accel: trainer,
  file logger, engine server, weight receiver, 4-bit communication of FSDP2 (`fsdp2_comm.py`), and the plumbing of the
  agent loop (`lean_rollout.py`).
verl swallows exceptions of plug-ins at debug level; the run then stops at the unknown trainer name `rl_accel_sync`.
"""

import os

from wrapt import register_post_import_hook

ACTIVE_ENV = "RL_ACCEL_ACTIVE"


def _hook_validate_config(module) -> None:
    from rl_accel.hosts.verl import prepare

    prepare.hook_validate_config(module)


def _hook_run_ppo(module) -> None:
    from rl_accel.hosts.verl import prepare

    prepare.hook_run_ppo(module)


def _register_deepspeed_engines(module) -> None:
    from verl.workers.engine.base import EngineRegistry

    from rl_accel.hosts.verl import deepspeed_engine as ours

    for model_type, engine in (
        ("language_model", ours.DeepSpeedEngineWithLMHead),
        ("value_model", ours.DeepSpeedEngineWithValueHead),
    ):
        EngineRegistry.register(model_type=model_type, backend="deepspeed", device=["cuda", "npu", "cpu"])(engine)


def _register_trainer(module) -> None:
    import rl_accel.hosts.verl.trainer  # noqa: F401


def _patch(name: str):
    def apply(module) -> None:
        from rl_accel.hosts.verl import patches

        getattr(patches, name).apply(module)

    return apply


def _attach_to_fsdp2(module) -> None:
    from rl_accel.hosts.verl.fsdp2_comm import AttachToFSDP2

    AttachToFSDP2.apply(module)


def _lean(name: str):
    def apply(module) -> None:
        from rl_accel.hosts.verl import lean_rollout

        getattr(lean_rollout, name).apply(module)

    return apply


register_post_import_hook(_hook_validate_config, "verl.utils.config")
register_post_import_hook(_hook_run_ppo, "verl.trainer.main_ppo")
register_post_import_hook(_register_deepspeed_engines, "verl.workers.engine.fsdp.transformer_impl")

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from rl_accel.hosts.verl import cpu

    cpu.install()

if os.environ.get(ACTIVE_ENV) == "1":
    register_post_import_hook(_register_trainer, "verl.trainer.ppo.v1.trainer_sync")
    register_post_import_hook(_attach_to_fsdp2, "verl.workers.engine.fsdp.transformer_impl")
    register_post_import_hook(_patch("AppendFileLogger"), "verl.utils.tracking")
    register_post_import_hook(_patch("CheckpointTracker"), "verl.trainer.ppo.v1.trainer_base")
    register_post_import_hook(_patch("ReturnCollectiveRpc"), "verl.workers.rollout.vllm_rollout.vllm_async_server")
    register_post_import_hook(
        _patch("DrainFailedReceive"), "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer"
    )
    register_post_import_hook(_patch("SocketOfThisRun"), "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")
    register_post_import_hook(_lean("InstantiateDirectly"), "verl.experimental.agent_loop.agent_loop")
    register_post_import_hook(_lean("ReuseTokenBuilder"), "verl.experimental.agent_loop.agent_loop")
    register_post_import_hook(_lean("CoalescePuts"), "verl.trainer.ppo.v1.agent_loop_tq")
    register_post_import_hook(_lean("AcquireOnce"), "verl.workers.rollout.llm_server")
