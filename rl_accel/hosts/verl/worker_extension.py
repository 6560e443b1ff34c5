"""vLLM worker extension for verl: receives weights, proves that they are used, answers rl_accel's questions.

`engine_kwargs.vllm.worker_extension_cls` names it. On a GPU verl's own receive path runs unchanged. On the CPU build of
vLLM 0.28.0 it cannot: linear layers are repacked for oneDNN and lose their plain weight, so vLLM's layer-wise reload
wraps the stream; and a tied LM head, which receives no tensor of its own, keeps its stale repacked copy unless it is
processed again.

Host symbols: `vLLMColocateWorkerExtension.update_weights_from_ipc`, `BucketedWeightReceiver`,
`initialize_layerwise_reload`, `finalize_layerwise_reload`.
"""

from __future__ import annotations

import time

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from rl_accel.errors import WeightSyncError
from rl_accel.hosts.vllm.readback import SentSample, readback_error

READBACK_TOLERANCE = 1e-5
"""Largest difference in float32 between a weight as sent and as used by the CPU kernels."""


class AcceleratedWorkerExtension(vLLMColocateWorkerExtension):
    """Mixed into vLLM's worker class; methods named `rl_accel_*` are called through `collective_rpc`."""

    def rl_accel_live(self) -> dict:
        """Return which features run in this worker."""
        return dict(getattr(self.model_runner, "rl_accel_live", {}))

    def rl_accel_drain_spec_stats(self) -> dict[str, int] | None:
        """Return and reset the speculation counters; beside them the faults since the start, which are not reset.

        None on a runner where rl_accel did nothing: vLLM's V2.
        """
        stats = getattr(self.model_runner, "rl_accel_spec_stats", None)
        faults = getattr(self.model_runner, "rl_accel_faults", None)
        if faults is None:
            return None
        return {**(stats.drain() if stats is not None else {}), **faults.counts}

    def rl_accel_draft_metrics(self) -> dict[str, float]:
        """Return and reset the drafter's numbers; empty on ranks that do not draft."""
        return self.model_runner.drafter.drain_metrics()

    def rl_accel_draft_close_epoch(self, epoch: int, policy_version: int, share: bool) -> dict:
        """Close an epoch of drafting history; with `share` its segments will be asked for."""
        return self.model_runner.drafter.close_epoch(epoch, policy_version, share)

    def rl_accel_draft_take_segment(self) -> bytes:
        """Return a segment that other engines have not been given yet, b"" if there is none."""
        return self.model_runner.drafter.take_segment()

    def rl_accel_draft_add_segment(self, segment: bytes) -> bool:
        """Take a segment of another engine."""
        return self.model_runner.drafter.add_segment(segment)

    def rl_accel_draft_save(self, path: str) -> dict:
        """Write a snapshot of the drafting history, or say why not."""
        return self.model_runner.drafter.save(path)

    def rl_accel_draft_open(self, path: str) -> dict:
        """Replace the drafting history by a snapshot's, or say why not."""
        return self.model_runner.drafter.open(path)

    def rl_accel_sync_report(self) -> dict[str, float]:
        """Return seconds, bytes and read-back error of the last weight sync."""
        return dict(getattr(self, "_rl_accel_sync_report", {}))

    def update_weights_from_ipc(self, peft_config=None, base_sync_done=False, use_shm=False):
        started = time.perf_counter()
        if self.model_runner.device.type == "cpu":
            report = self._receive_on_cpu(use_shm)
        else:
            super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
            report = {}
        kept = getattr(self, "_rl_accel_sync_report", {})  # the read-back error of an earlier sync stays visible
        self._rl_accel_sync_report = {**kept, "seconds": time.perf_counter() - started, **report}

    def _receive_on_cpu(self, use_shm: bool) -> dict[str, float]:
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        if self.device is None:
            self.device = torch.device("cpu")
        model, config = self.model_runner.model, self.model_runner.vllm_config
        sent = SentSample() if self._wants_readback(config) else None
        num_bytes = 0
        started = False

        def on_bucket(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            nonlocal num_bytes, started
            if not started:  # here, not before: an error in here reaches the sender, see patches.DrainFailedReceive
                initialize_layerwise_reload(model)
                started = True
            weights = [(name, tensor.clone()) for name, tensor in weights]  # the buffer is reused
            num_bytes += sum(tensor.nbytes for _, tensor in weights)
            if sent is not None:
                sent.add(weights)
            model.load_weights(weights)

        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        with set_current_vllm_config(config), torch.no_grad():
            receiver.receive_weights(on_bucket_received=on_bucket)
            finalize_layerwise_reload(model, config.model_config)
            for module in model.modules():
                if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)
        report = {"bytes": float(num_bytes)}
        if sent is not None:
            error, name = readback_error(model, sent)
            report["readback_max_abs_err"] = error
            if not error <= READBACK_TOLERANCE:
                raise WeightSyncError(
                    f"weight {name} as the engine's kernel uses it differs by {error:.3g} from what was sent"
                )
        return report

    def _wants_readback(self, config) -> bool:
        settings = (config.additional_config or {}).get("rl_accel", {})
        when = settings.get("sync", {}).get("readback", "first")
        return when == "every" or (when == "first" and "readback_max_abs_err" not in self.rl_accel_sync_report())
