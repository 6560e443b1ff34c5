"""vLLM worker extension for verl: receives weights, and passes the trainer's calls to the features of the engine.

`engine_kwargs.vllm.worker_extension_cls` names it. On a GPU verl's own receive path runs unchanged, unless a feature
keeps weights in a form of its own (`Engine.layerwise_sync`): then, and on the CPU build of vLLM 0.28.0, where linear
layers are repacked for oneDNN and lose their plain weight, vLLM's layer-wise reload wraps the stream. A tied LM head on
a CPU receives no tensor of its own and keeps its stale repacked copy unless it is processed again.

Host symbols: `vLLMColocateWorkerExtension.{update_weights_from_ipc, _update_weights}`, `BucketedWeightReceiver`,
`initialize_layerwise_reload`, `finalize_layerwise_reload`.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from rl_accel.errors import NotLiveError
from rl_accel.hosts.vllm import packing, weight_names
from rl_accel.hosts.vllm.faults import MALFORMED


class AcceleratedWorkerExtension(vLLMColocateWorkerExtension):
    """Mixed into vLLM's worker class; methods named `rl_accel_*` are called through `collective_rpc`."""

    model_runner: Any
    device: Any

    def rl_accel_live(self) -> dict:
        """Return which features run in this worker."""
        return dict(getattr(self.model_runner, "rl_accel_live", {}))

    def rl_accel_drain(self) -> dict[str, dict]:
        """Return what happened since the last call.

        Returns:
            `counts`: of speculation, and of malformed identities since the start; `features`: feature -> its metrics.
            {} on a runner where rl_accel did nothing.
        """
        runner = self.model_runner
        if not hasattr(runner, "rl_accel_live"):
            return {}
        stats = runner.rl_accel_spec_stats
        counts = {**(stats.drain() if stats is not None else {}), MALFORMED: runner.rl_accel_faults.counts[MALFORMED]}
        return {"counts": counts, "features": {name: role.drain() for name, role in runner.rl_accel.items()}}

    def rl_accel_call(self, feature: str, method: str, args: tuple) -> Any:
        """Call a method of a feature's `Engine`."""
        roles = getattr(self.model_runner, "rl_accel", {})
        if feature not in roles:
            raise NotLiveError(f"feature {feature} is not on in this engine; on are {', '.join(roles) or 'none'}")
        return getattr(roles[feature], method)(*args)

    def update_weights_from_ipc(self, peft_config=None, base_sync_done=False, use_shm=False):
        started = time.perf_counter()
        layerwise = any(role.layerwise_sync for role in self._rl_accel_roles())
        if self.model_runner.device.type == "cpu" or layerwise:
            if peft_config:
                raise NotLiveError("rl_accel loads whole weights here, layer by layer; adapters cannot be sent")
            self._receive_layerwise(use_shm)
        else:
            super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
        for role in self._rl_accel_roles():
            role.on_weights(self.model_runner, time.perf_counter() - started)

    def _update_weights(self, weights, peft_config, base_sync_done):
        """Of verl, for every bucket on a GPU; an adapter's names are peft's."""
        if not (peft_config and base_sync_done):
            weights = weight_names.for_engine(self.model_runner.model, weights)
        super()._update_weights(weights, peft_config, base_sync_done)

    def _rl_accel_roles(self) -> list:
        return list(getattr(self.model_runner, "rl_accel", {}).values())

    def _receive_layerwise(self, use_shm: bool) -> None:
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        if self.device is None:
            self.device = self.model_runner.device
        model, config = self.model_runner.model, self.model_runner.vllm_config
        started = False

        def on_bucket(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            nonlocal started
            if not started:  # here, not before: an error in here reaches the sender, see patches.DrainFailedReceive
                initialize_layerwise_reload(model)
                started = True
            weights = [(name, tensor.clone()) for name, tensor in weights]  # the buffer is reused
            weights = weight_names.for_engine(model, weights)
            for role in self._rl_accel_roles():
                role.on_bucket(weights)
            model.load_weights(weights)

        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        with set_current_vllm_config(config), torch.no_grad(), packing.threads_of_load(self.model_runner):
            receiver.receive_weights(on_bucket_received=on_bucket)
            finalize_layerwise_reload(model, config.model_config)
            for module in model.modules():
                if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)
