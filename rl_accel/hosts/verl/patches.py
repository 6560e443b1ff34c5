"""Named patches of verl 0.9.1, one class each: the symbol, why it must change, and what replaces it.

`apply(module)` runs once in a process, right after verl imported the module. `tests/hosts/verl/test_patches.py` fails
when a symbol moves.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType

logger = logging.getLogger(__name__)


class AppendFileLogger:
    """`verl.utils.tracking.FileLogger.__init__` opens its file for writing: a resumed run loses its metrics."""

    target = "verl.utils.tracking:FileLogger.__init__"

    @classmethod
    def apply(cls, module: ModuleType) -> None:
        original = module.FileLogger.__init__

        @functools.wraps(original)
        def init(self, project_name: str, experiment_name: str) -> None:
            path = os.environ.get("VERL_FILE_LOGGER_PATH")
            kept = b""
            if path and os.path.exists(path):
                with open(path, "rb") as file:
                    kept = file.read()
            original(self, project_name, experiment_name)
            # A killed run may leave half a line; whole lines only are carried over.
            self.fp.write(kept[: kept.rfind(b"\n") + 1])

        module.FileLogger.__init__ = init


class ReturnCollectiveRpc:
    """`vLLMHttpServer.collective_rpc` awaits the workers' answers and drops them; the caller gets None."""

    target = "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.collective_rpc"

    @classmethod
    def apply(cls, module: ModuleType) -> None:
        async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
            return await self.engine.collective_rpc(method=method, timeout=timeout, args=args, kwargs=kwargs)

        module.vLLMHttpServer.collective_rpc = collective_rpc


class DrainFailedReceive:
    """`BucketedWeightReceiver.receive_weights` leaves its sender waiting for ever when a bucket cannot be loaded.

    The receiver drops the socket on an exception, and the sender's `recv` has no timeout. With the patch the remaining
    buckets are taken and thrown away, so that the sender finishes, and then the first exception is raised.
    """

    target = "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver.receive_weights"

    @classmethod
    def apply(cls, module: ModuleType) -> None:
        original = module.BucketedWeightReceiver.receive_weights

        @functools.wraps(original)
        def receive_weights(self, on_bucket_received) -> None:
            failures: list[Exception] = []

            def guarded(weights, is_last: bool) -> None:
                if failures:
                    return
                try:
                    on_bucket_received(weights, is_last)
                except Exception as error:
                    logger.exception("loading a bucket of weights failed")
                    # The traceback holds the bucket's tensors, and shared memory with views on it cannot be closed.
                    failures.append(error.with_traceback(None))

            original(self, on_bucket_received=guarded)
            if failures:
                raise failures[0]

        module.BucketedWeightReceiver.receive_weights = receive_weights


ALL = (AppendFileLogger, ReturnCollectiveRpc, DrainFailedReceive)
