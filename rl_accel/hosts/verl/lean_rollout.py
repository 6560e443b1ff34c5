"""Cheaper plumbing between verl's agent loop and the engine: the same rollouts, sooner, with every drafting method.

What stock verl 0.9.1 spends on every request of a single-turn rollout, measured on 2 CPU cores with 128 requests a step
(seconds of rollout; tiny policy), and what is done here instead:
- output of every token to the front end, detokenised: only the final output, token ids only    (with `uni`: 4.9 -> 3.1)
- `hydra.utils.instantiate` of the agent loop, 4 ms a request: the class is looked up and called  \
- a TransferQueue write per response: those of a burst together                                    } 3.1 -> 2.3
- the built-in rule-based reward through another Ray process: called in place                      |
- the load balancer asked for every request although there is one engine: asked once              /
- a chat-template builder per request, each encoding its boundary tokens anew: one for all        \
- the built-in reward by a batch of one, with position ids and masks: on the response itself       } 2.3 -> 2.0
- the replay buffer asked 20 times a second whether all are done: not while they cannot be        /

Named patches, each with the host symbol that it relies on (`target`), applied in the processes of a run that asked for
rl_accel. `final_output_only` and `LocalReward` are used by our own agent-loop worker, `PatientPolls` by our trainer.
"""

from __future__ import annotations

import asyncio
import time
from types import ModuleType, SimpleNamespace
from typing import Any

OUR_REWARD = "pkg://rl_accel.quickstart.reward"
COALESCE_S, QUIET_S = 0.06, 0.015
"""A write waits for others so long at most, and so long for the next one."""
POLL_INTERVAL_S = 0.05
PATIENCE = 0.6
"""Share of the shortest of the last rollouts within which nobody asks whether this one is done."""


class InstantiateDirectly:
    """`hydra.utils.instantiate` resolves and copies a configuration that here is `{"_target_": class}` only."""

    target = "verl.experimental.agent_loop.agent_loop:hydra"

    @classmethod
    def apply(cls, module: ModuleType) -> None:
        from hydra.utils import get_class, instantiate

        def direct(config: Any, **kwargs: Any) -> Any:
            if set(config) == {"_target_"}:
                return get_class(config["_target_"])(**kwargs)
            return instantiate(config=config, **kwargs)

        module.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=direct))

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return isinstance(module.hydra, SimpleNamespace)


class ReuseTokenBuilder:
    """Every request makes a `ContinuousTokenBuilder`, and the ones for text keep nothing of a request."""

    target = "verl.experimental.agent_loop.agent_loop:create_continuous_token_builder"

    @classmethod
    def apply(cls, module: ModuleType) -> None:
        create = module.create_continuous_token_builder
        made: list[tuple[Any, dict[str, Any], Any]] = []

        def reuse(tokenizer: Any, **kwargs: Any) -> Any:
            if kwargs.get("processor") is not None:
                return create(tokenizer, **kwargs)
            for of_tokenizer, of_kwargs, builder in made:
                if of_tokenizer is tokenizer and of_kwargs == kwargs:
                    return builder
            builder = create(tokenizer, **kwargs)
            made.append((tokenizer, kwargs, builder))
            return builder

        reuse.__module__ = __name__
        module.create_continuous_token_builder = reuse

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return module.create_continuous_token_builder.__module__ == __name__


class CoalescePuts:
    """`_agent_loop_postprocess` writes each response to TransferQueue by itself; writes of a moment go together."""

    target = "verl.trainer.ppo.v1.agent_loop_tq:tq"

    @classmethod
    def apply(cls, module: ModuleType) -> None:
        module.tq = _CoalescingQueue(module.tq, module.list_of_dict_to_tensordict)
        module.list_of_dict_to_tensordict = lambda fields: fields

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return isinstance(module.tq, _CoalescingQueue)


class AcquireOnce:
    """`LLMServerClient._acquire_server` asks the load balancer for every request; one engine needs one answer."""

    target = "verl.workers.rollout.llm_server:LLMServerClient._acquire_server"

    @classmethod
    def apply(cls, module: ModuleType) -> None:
        acquire, release = module.LLMServerClient._acquire_server, module.LLMServerClient._release_server

        def of_one_engine(self):
            if "_rl_accel_one_engine" not in self.__dict__:
                self._rl_accel_one_engine = has_one_engine(self.config)
            return self._rl_accel_one_engine

        async def acquire_server(self, request_id, **fields):
            if not of_one_engine(self):
                return await acquire(self, request_id, **fields)
            answer = self.__dict__.get("_rl_accel_answer")
            if answer is None or (answer.done() and (answer.cancelled() or answer.exception())):
                answer = self._rl_accel_answer = asyncio.ensure_future(acquire(self, request_id, **fields))
            return await asyncio.shield(answer)  # a request that is cancelled leaves the answer to the others

        def release_server(self, server_id, request_id=None):
            if not of_one_engine(self):
                release(self, server_id, request_id)

        module.LLMServerClient._acquire_server = acquire_server
        module.LLMServerClient._release_server = release_server

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return module.LLMServerClient._acquire_server.__module__ == __name__


PATCHES = (InstantiateDirectly, ReuseTokenBuilder, CoalescePuts, AcquireOnce)


def has_one_engine(config: Any) -> bool:
    """Whether the run has a single rollout engine."""
    rollout = config.actor_rollout_ref.rollout
    parts = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
    per_engine = 1
    for name in parts:
        per_engine *= int(rollout.get(name, 1) or 1)
    return config.trainer.nnodes * config.trainer.n_gpus_per_node == per_engine


def final_output_only(sampling_params: dict[str, Any]) -> dict[str, Any]:
    """Ask the engine for one output a request, without text; stop strings need text and leave it as it is."""
    if sampling_params.get("stop") or sampling_params.get("detokenize"):
        return sampling_params
    from vllm.sampling_params import RequestOutputKind

    return {**sampling_params, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}


class LocalReward:
    """The built-in reward as verl's `naive` reward manager computes it, in the process that has the response.

    It takes microseconds; a batch of one for another Ray process takes milliseconds.
    """

    def __init__(self, config: Any, tokenizer: Any):
        self.tokenizer = tokenizer
        reward = config.reward
        self.applies = (
            reward.custom_reward_function.path == OUR_REWARD
            and reward.reward_manager.source == "register"
            and reward.reward_manager.name == "naive"
            and not reward.reward_model.enable
        )

    def score(self, output: Any, sample: dict[str, Any]) -> None:
        """Set `reward_score` and `reward_extra_info` of an `AgentLoopOutput`; `sample` is its row of the data set."""
        from rl_accel.quickstart.reward import compute_score

        started = time.perf_counter()
        text = self.tokenizer.decode(output.response_ids, skip_special_tokens=True)
        result = compute_score(sample["data_source"], text, sample["reward_model"]["ground_truth"])
        output.reward_score = result["score"]
        output.extra_fields["reward_extra_info"] = result
        output.metrics.compute_score = time.perf_counter() - started


class PatientPolls:
    """Polls of the replay buffer: none until a rollout can be done by the last ones' times, then every 50 ms.

    A poll that replaces groups (`filter_groups`, `sync_refill_failed_groups`) starts rollouts, and a sampler of the
    user's own may do anything: these keep verl's interval.
    """

    def __init__(self, replay_buffer: Any):
        self._recent: dict[str, list[float]] = {}
        self._started: float | None = None
        if only_collects(replay_buffer):
            self._install(replay_buffer)

    def _install(self, replay_buffer: Any) -> None:
        sample, wait = replay_buffer.sample, replay_buffer._wait_for_next_poll

        def timed_sample(global_steps: int, partition_id: str, batch_size: int) -> Any:
            self._started = time.monotonic()
            found = sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
            recent = self._recent.setdefault(partition_id, [])
            recent.append(time.monotonic() - self._started)
            del recent[:-8]
            return found

        def patient_wait(partition_id: str, last_debug_time: float) -> float:
            replay_buffer.poll_interval = self.interval(partition_id, time.monotonic() - (self._started or 0.0))
            return wait(partition_id, last_debug_time)

        replay_buffer.sample, replay_buffer._wait_for_next_poll = timed_sample, patient_wait

    def interval(self, partition_id: str, elapsed_s: float) -> float:
        """Return the seconds to the next poll of a rollout that began `elapsed_s` ago."""
        recent = self._recent.get(partition_id, [])
        if len(recent) < 3:  # the first of a run takes several times as long
            return POLL_INTERVAL_S
        return max(POLL_INTERVAL_S, PATIENCE * min(recent) - elapsed_s)


def only_collects(replay_buffer: Any) -> bool:
    """Whether a poll of this replay buffer does nothing but look what is finished."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    if type(replay_buffer) is not ReplayBuffer:
        return False
    return replay_buffer.filter_groups_metric is None and not replay_buffer.sync_refill_failed_groups


class _CoalescingQueue:
    """TransferQueue's module with an `async_kv_batch_put` that gathers what arrives in a burst.

    Only what has one partition and fields of the same names and types goes together: a TensorDict has the fields of its
    first row. The writer is a task of its own, so a caller that is cancelled takes nobody else's rows with it.
    """

    def __init__(self, queue: Any, to_tensordict: Any):
        self._queue, self._to_tensordict = queue, to_tensordict
        self._waiting: dict[tuple[str, frozenset], list[tuple[list, list, list, asyncio.Future]]] = {}
        self._writer: asyncio.Task | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def async_kv_batch_put(self, keys: list, fields: list, tags: list, partition_id: str) -> None:
        written = asyncio.get_running_loop().create_future()
        kind = frozenset((name, type(value)) for name, value in fields[0].items())
        self._waiting.setdefault((partition_id, kind), []).append((keys, fields, tags, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        until, seen = time.monotonic() + COALESCE_S, 0
        while (arrived := sum(map(len, self._waiting.values()))) > seen and time.monotonic() < until:
            seen = arrived
            await asyncio.sleep(QUIET_S)
        while self._waiting:
            (partition_id, _), items = self._waiting.popitem()
            await self._flush(partition_id, items)

    async def _flush(self, partition_id: str, items: list[tuple[list, list, list, asyncio.Future]]) -> None:
        try:
            await self._queue.async_kv_batch_put(
                keys=[key for item in items for key in item[0]],
                fields=self._to_tensordict([field for item in items for field in item[1]]),
                tags=[tag for item in items for tag in item[2]],
                partition_id=partition_id,
            )
        except BaseException as error:
            for *_, written in items:
                if not written.done():
                    written.set_exception(error)
            return
        for *_, written in items:
            if not written.done():
                written.set_result(None)
