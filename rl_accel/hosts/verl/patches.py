"""Named patches of verl 0.9.1 that every run with rl_accel has, one class each.

`apply(module)` runs once in a process, right after verl imported the module. `tests/hosts/verl/test_patches.py` fails
when a symbol moves.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TextIO

from rl_accel.hosts.verl import RUN_ENV
from rl_accel.patching import HostPatch

logger = logging.getLogger(__name__)


class AppendFileLogger(HostPatch):
    """`verl.utils.tracking.FileLogger.__init__` opens its file for writing: a resumed run loses its metrics."""

    target = "verl.utils.tracking:FileLogger.__init__"
    parameters = ("self", "project_name", "experiment_name")

    @classmethod
    def replace(cls, module: Any) -> None:
        original = module.FileLogger.__init__

        @functools.wraps(original)
        def init(self, project_name: str, experiment_name: str) -> None:
            path = os.environ.get("VERL_FILE_LOGGER_PATH")
            if not path or not os.path.exists(path):
                original(self, project_name, experiment_name)
                return
            with open(path, "rb") as file:
                kept = file.read()
            # Under another name until it is whole: a run that is killed here must not lose its metrics.
            os.environ["VERL_FILE_LOGGER_PATH"] = f"{path}.resumed"
            try:
                original(self, project_name, experiment_name)
            finally:
                os.environ["VERL_FILE_LOGGER_PATH"] = path
            # A killed run may leave half a line; whole lines only are carried over.
            self.fp.write(kept[: kept.rfind(b"\n") + 1])
            self.fp.flush()
            os.replace(f"{path}.resumed", path)
            self.filepath = path

        module.FileLogger.__init__ = init


class CheckpointTracker(HostPatch):
    """`PPOTrainer._save_checkpoint` truncates `latest_checkpointed_iteration.txt` and then writes it: a run that is
    killed or finds its disk full in between leaves an empty file, with which verl does not resume. And it does so
    before the step's metrics are logged: a run that is killed in between never logs that step.

    Written beside instead, by an `open` of the module's own; the trainer calls `complete` when the step is logged.
    """

    target = "verl.trainer.ppo.v1.trainer_base:PPOTrainer._save_checkpoint"
    parameters = ("self",)
    file_name = "latest_checkpointed_iteration.txt"

    @classmethod
    def replace(cls, module: Any) -> None:
        @contextlib.contextmanager
        def replacing(path: str) -> Iterator[TextIO]:
            with open(f"{path}.pending", "w") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())

        def open_whole(path, mode="r", *args, **kwargs):
            if mode == "w" and os.path.basename(path) == cls.file_name:
                return replacing(path)
            return open(path, mode, *args, **kwargs)

        module.open = open_whole

    @classmethod
    def complete(cls, folder: str) -> None:
        """Name the checkpoint that was saved last in `folder` the latest one."""
        path = os.path.join(folder, cls.file_name)
        if os.path.exists(f"{path}.pending"):  # not with `checkpoint.async_save`, which has trackers of its own
            os.replace(f"{path}.pending", path)

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return getattr(module, "open", open).__module__ == __name__


class ReturnCollectiveRpc(HostPatch):
    """`vLLMHttpServer.collective_rpc` awaits the workers' answers and drops them; the caller gets None."""

    target = "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.collective_rpc"
    parameters = ("self", "method", "timeout", "args", "kwargs")

    @classmethod
    def replace(cls, module: Any) -> None:
        async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
            return await self.engine.collective_rpc(method=method, timeout=timeout, args=args, kwargs=kwargs)

        module.vLLMHttpServer.collective_rpc = collective_rpc


class DrainFailedReceive(HostPatch):
    """`BucketedWeightReceiver.receive_weights` leaves its sender waiting for ever when a bucket cannot be loaded.

    The receiver drops the socket on an exception, and the sender's `recv` has no timeout. With the patch the remaining
    buckets are taken and thrown away, so that the sender finishes, and then the first exception is raised.
    """

    target = "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver.receive_weights"
    parameters = ("self", "on_bucket_received")

    @classmethod
    def replace(cls, module: Any) -> None:
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


class SocketOfThisRun(HostPatch):
    """Sender and receiver of weights meet at a path in /tmp that names the Ray job, and the first job of every Ray
    cluster has the same id: of two trainings on a machine one is left waiting for ever, or loads the other's weights.

    The path gets a part that `prepare.py` draws for every run. The host's own mend was the job id.
    """

    target = "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightSender.__init__"
    issue = "https://github.com/verl-project/verl/issues/6233"
    parameters = ("self", "zmq_handle")
    prefix, suffix = "ipc:///tmp/rl-colocate-zmq-", ".sock"

    @classmethod
    def replace(cls, module: Any) -> None:
        for name in ("BucketedWeightSender", "BucketedWeightReceiver"):
            owner = getattr(module, name)
            owner.__init__ = cls._with_own_path(owner.__init__)

    @classmethod
    def _with_own_path(cls, original: Callable) -> Callable:
        @functools.wraps(original)
        def init(self, zmq_handle: str, *args, **kwargs) -> None:
            run = os.environ.get(RUN_ENV)
            if run and zmq_handle.startswith(cls.prefix) and zmq_handle.endswith(cls.suffix):
                zmq_handle = f"{zmq_handle.removesuffix(cls.suffix)}-{run}{cls.suffix}"
            original(self, zmq_handle, *args, **kwargs)

        return init


PATCHES = (AppendFileLogger, ReturnCollectiveRpc, DrainFailedReceive, CheckpointTracker, SocketOfThisRun)
