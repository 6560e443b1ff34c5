"""The plumbing of the rollout: coalesced writes, one engine's address, final outputs, direct instantiation."""

from __future__ import annotations

import asyncio
import functools
from types import ModuleType, SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from rl_accel.fast_path.hosts.agent_loop import final_output_only
from rl_accel.fast_path.hosts.batched_put import IDLE_GAP_S, MAX_WAIT_S, BatchedPut
from rl_accel.fast_path.hosts.instantiate import InstantiateDirectly
from rl_accel.fast_path.hosts.server_acquire import CachedServerAcquire, has_one_engine


class TransferQueue:
    """Stands for the module `transfer_queue`, which needs Ray actors: records what is written, fails where told to."""

    def __init__(self):
        self.puts: list[SimpleNamespace] = []
        self.failures: list[Exception] = []
        self.latency_s = 0.0

    async def async_kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        assert fields.batch_size[0] == len(keys) == len(tags)
        await asyncio.sleep(self.latency_s)
        if self.failures:
            raise self.failures.pop()
        self.puts.append(SimpleNamespace(keys=keys, partition_id=partition_id, fields=fields, tags=tags))

    def kv_list(self, partition_id):
        return f"keys of {partition_id}"


@pytest.fixture
def transfer_queue() -> TransferQueue:
    return TransferQueue()


@pytest.fixture
def module(transfer_queue) -> ModuleType:
    """What the agent loop's module is after the patch."""
    module = ModuleType("agent_loop_tq")
    module.tq, module.list_of_dict_to_tensordict = transfer_queue, list_of_dict_to_tensordict
    BatchedPut.apply(module)
    assert BatchedPut.is_live(module)
    return module


def put(module: ModuleType, *numbers: int, partition_id: str = "train", **more):
    """Write a row per number as `_agent_loop_postprocess` does; `more` are further fields."""
    fields = [{"responses": torch.arange(number + 1), "uid": f"u{number}", **more} for number in numbers]
    return module.tq.async_kv_batch_put(
        keys=[f"k{number}" for number in numbers],
        fields=module.list_of_dict_to_tensordict(fields),
        tags=[{"seq_len": number} for number in numbers],
        partition_id=partition_id,
    )


def check_rows(queue: TransferQueue, numbers: set[int]) -> None:
    """Every row was written once, with its own fields and its own tag."""
    written = []
    for call in queue.puts:
        for key, row, tag in zip(call.keys, call.fields, call.tags, strict=True):
            number = int(key[1:])
            assert row["responses"].tolist() == list(range(number + 1))
            assert (row["uid"], tag) == (f"u{number}", {"seq_len": number})
            written.append(number)
    assert sorted(written) == sorted(numbers)


def test_concurrent_puts_become_one(module, transfer_queue) -> None:
    async def run():
        assert await asyncio.gather(put(module, 3), put(module, 5, 1), put(module, 4)) == [None] * 3

    asyncio.run(run())
    assert [call.keys for call in transfer_queue.puts] == [["k3", "k5", "k1", "k4"]]
    check_rows(transfer_queue, {3, 5, 1, 4})


def test_a_put_returns_when_its_rows_are_written_and_not_before(module, transfer_queue) -> None:
    async def run():
        waiting = asyncio.create_task(put(module, 1))
        await asyncio.sleep(IDLE_GAP_S / 4)
        joined = asyncio.create_task(put(module, 2))
        while not transfer_queue.puts:
            assert not waiting.done() and not joined.done()
            await asyncio.sleep(MAX_WAIT_S / 20)
        await asyncio.gather(waiting, joined)
        await put(module, 7)

    asyncio.run(run())
    assert [call.keys for call in transfer_queue.puts] == [["k1", "k2"], ["k7"]]


def test_partitions_are_kept_apart(module, transfer_queue) -> None:
    async def run():
        await asyncio.gather(
            put(module, 1), put(module, 2, partition_id="val"), put(module, 3), put(module, 4, partition_id="val")
        )

    asyncio.run(run())
    assert {call.partition_id: call.keys for call in transfer_queue.puts} == {
        "train": ["k1", "k3"],
        "val": ["k2", "k4"],
    }
    check_rows(transfer_queue, {1, 2, 3, 4})


@pytest.mark.parametrize("first", ["more fields", "fewer fields", "another type"])
def test_rows_keep_their_fields(module, transfer_queue, first) -> None:
    """Rows of two kinds of agent loop: together, fields of the second were lost or all writes failed."""
    kinds = {"more fields": ({"score": 1.5}, {}), "fewer fields": ({}, {"score": 1.5})}
    ours, theirs = kinds.get(first, ({"score": torch.ones(2)}, {"score": None}))

    async def run():
        await asyncio.gather(put(module, 1, **ours), put(module, 2, **theirs), put(module, 3, **ours))

    asyncio.run(run())
    assert {tuple(call.keys): "score" in call.fields.keys() for call in transfer_queue.puts} == {  # noqa: SIM118
        ("k1", "k3"): "score" in ours,
        ("k2",): "score" in theirs,
    }
    check_rows(transfer_queue, {1, 2, 3})


def test_a_failed_put_reaches_all_its_waiters_and_nobody_else(module, transfer_queue) -> None:
    async def run():
        transfer_queue.failures.append(RuntimeError("storage is gone"))
        found = await asyncio.wait_for(asyncio.gather(*(put(module, i) for i in range(3)), return_exceptions=True), 5)
        assert [str(error) for error in found] == ["storage is gone"] * 3
        assert transfer_queue.puts == []
        await asyncio.wait_for(put(module, 8), 5)

    asyncio.run(run())
    check_rows(transfer_queue, {8})


def test_a_failure_in_one_partition_leaves_the_other_alone(module, transfer_queue) -> None:
    async def run():
        transfer_queue.failures.append(RuntimeError("storage is gone"))
        puts = [put(module, 1), put(module, 2, partition_id="val")]
        return await asyncio.wait_for(asyncio.gather(*puts, return_exceptions=True), 5)

    assert sorted(map(str, asyncio.run(run()))) == ["None", "storage is gone"]
    assert len(transfer_queue.puts) == 1


def test_puts_that_arrive_during_a_write_are_written(module, transfer_queue) -> None:
    transfer_queue.latency_s = 2 * MAX_WAIT_S

    async def run():
        first = asyncio.create_task(put(module, 1))
        await asyncio.sleep(2 * MAX_WAIT_S)  # it is being written now
        assert transfer_queue.puts == [] and not first.done()
        late = [asyncio.create_task(put(module, i)) for i in (2, 3)]
        await asyncio.wait_for(asyncio.gather(first, *late), 5)

    asyncio.run(run())
    assert [call.keys for call in transfer_queue.puts] == [["k1"], ["k2", "k3"]]
    check_rows(transfer_queue, {1, 2, 3})


@pytest.mark.parametrize("when", ["before the write", "during the write"])
def test_a_cancelled_put_does_not_stop_the_others(module, transfer_queue, when) -> None:
    """The first caller did the writing for all: cancelled while it gathered, the others waited for ever."""
    transfer_queue.latency_s = 2 * MAX_WAIT_S

    async def run():
        puts = [asyncio.create_task(put(module, i)) for i in range(3)]
        await asyncio.sleep(MAX_WAIT_S / 4 if when == "before the write" else 2 * MAX_WAIT_S)
        assert transfer_queue.puts == []
        puts[0].cancel()
        await asyncio.wait_for(asyncio.gather(*puts[1:]), 5)
        assert puts[0].cancelled()

    asyncio.run(run())
    check_rows(transfer_queue, {0, 1, 2})


def test_everything_else_of_the_queue_is_passed_through(module) -> None:
    assert module.tq.kv_list("train") == "keys of train"
    with pytest.raises(AttributeError):
        module.tq.no_such_call  # noqa: B018


def trainer_config(nodes: int, gpus: int, **rollout: int | None):
    return OmegaConf.create(
        {
            "trainer": {"nnodes": nodes, "n_gpus_per_node": gpus},
            "actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 1, **rollout}},
        }
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (trainer_config(1, 1), True),
        (trainer_config(1, 2), False),
        (trainer_config(2, 1), False),
        (trainer_config(1, 2, tensor_model_parallel_size=2), True),
        (trainer_config(2, 2, tensor_model_parallel_size=2), False),
        (trainer_config(1, 2, data_parallel_size=2), True),
        (trainer_config(1, 4, data_parallel_size=2), False),
        (trainer_config(2, 1, pipeline_model_parallel_size=2), True),
        (
            trainer_config(2, 4, tensor_model_parallel_size=2, data_parallel_size=2, pipeline_model_parallel_size=2),
            True,
        ),
        (trainer_config(1, 1, data_parallel_size=None), True),
    ],
)
def test_one_engine_takes_all_gpus(config, expected) -> None:
    assert has_one_engine(config) is expected


def client_module() -> ModuleType:
    """Stands for `verl.workers.rollout.llm_server`, whose client calls the load balancer through Ray."""

    class LLMServerClient:
        def __init__(self, config):
            self.config, self.asked, self.released, self.failures = config, [], [], []

        async def _acquire_server(self, request_id, **fields):
            self.asked.append(request_id)
            await asyncio.sleep(0.01)
            if self.failures:
                raise self.failures.pop()
            return "server", len(self.asked)

        def _release_server(self, server_id, request_id=None):
            self.released.append(request_id)

    module = ModuleType("llm_server")
    module.LLMServerClient = LLMServerClient
    assert not CachedServerAcquire.is_live(module)
    CachedServerAcquire.apply(module)
    assert CachedServerAcquire.is_live(module)
    return module


@pytest.mark.parametrize(("gpus", "asked"), [(1, ["a"]), (2, ["a", "b", "c"])])
def test_one_engine_is_asked_for_once(gpus, asked) -> None:
    client = client_module().LLMServerClient(trainer_config(1, gpus))

    async def run():
        answers = await asyncio.gather(client._acquire_server("a"), client._acquire_server("b"))
        answers.append(await client._acquire_server("c"))
        for name in "abc":
            client._release_server("server", name)
        return answers

    assert len({server for server, _ in asyncio.run(run())}) == 1
    assert client.asked == asked
    assert client.released == ([] if gpus == 1 else ["a", "b", "c"])


def test_a_refused_or_cancelled_request_for_the_engine_is_not_remembered() -> None:
    """The answer was shared with its failure: one error, or one cancelled request, was every later request's error."""
    client = client_module().LLMServerClient(trainer_config(1, 1))

    async def run():
        client.failures.append(RuntimeError("no server yet"))
        with pytest.raises(RuntimeError, match="no server yet"):
            await client._acquire_server("a")
        first, second = (asyncio.create_task(client._acquire_server(name)) for name in "bc")
        await asyncio.sleep(0)
        first.cancel()
        assert await second == await client._acquire_server("d") == ("server", 2)

    asyncio.run(run())
    assert client.asked == ["a", "b"]


@pytest.mark.parametrize("field", [{"stop": ["\n\n"]}, {"detokenize": True}])
def test_requests_that_need_text_are_left_alone(field) -> None:
    params = {"temperature": 0.7, **field}
    assert final_output_only(params) is params
    assert params == {"temperature": 0.7, **field}


@pytest.mark.parametrize("field", [{}, {"stop": []}, {"stop": None}, {"detokenize": False}])
def test_other_requests_ask_vllm_for_one_output_without_text(field) -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = {"temperature": 0.7, "extra_args": {"rl_accel": {"step": 1}}, **field}
    before = dict(params)
    accepted = SamplingParams(max_tokens=4, **final_output_only(params))
    assert (accepted.detokenize, accepted.output_kind) == (False, RequestOutputKind.FINAL_ONLY)
    assert (accepted.temperature, accepted.extra_args) == (0.7, {"rl_accel": {"step": 1}})
    assert params == before


@pytest.fixture
def instantiate():
    module = ModuleType("agent_loop")
    module.hydra = __import__("hydra")
    assert not InstantiateDirectly.is_live(module)
    InstantiateDirectly.apply(module)
    assert InstantiateDirectly.is_live(module)
    return module.hydra.utils.instantiate


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
def test_a_class_alone_is_called_with_the_very_arguments(instantiate, make) -> None:
    """hydra would copy the list, and would build what the argument describes."""
    described = {"_target_": "builtins.set"}
    tokens = [1, 2]
    built = instantiate(config=make({"_target_": "types.SimpleNamespace"}), tokens=tokens, described=described)
    assert isinstance(built, SimpleNamespace)
    assert built.tokens is tokens and built.described is described


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
def test_a_configuration_with_more_goes_through_hydra(instantiate, make) -> None:
    built = instantiate(
        config=make({"_target_": "types.SimpleNamespace", "turns": 3}), described={"_target_": "builtins.set"}
    )
    assert (built.turns, built.described) == (3, set())
    partial = instantiate(config=make({"_target_": "types.SimpleNamespace", "_partial_": True}), turns=4)
    assert isinstance(partial, functools.partial) and partial().turns == 4
