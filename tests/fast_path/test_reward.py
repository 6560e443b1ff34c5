"""The built-in reward in place, one token builder for all requests, and polls that wait: same results, less work."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

import rl_accel
from rl_accel.fast_path.hosts.polling import POLL_INTERVAL_S, AdaptivePolling
from rl_accel.fast_path.hosts.reward import OUR_REWARD, LocalReward
from rl_accel.fast_path.hosts.token_builder import ReuseTokenBuilder
from rl_accel.quickstart.reward import compute_score


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(rl_accel.__file__).parent / "quickstart" / "policy")


def reward_config(path: str = OUR_REWARD, name: str = "naive", model: bool = False):
    return OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": {"path": path},
                "reward_manager": {"source": "register", "name": name},
                "reward_model": {"enable": model},
            }
        }
    )


@pytest.mark.parametrize(
    ("config", "applies"),
    [
        (reward_config(), True),
        (reward_config(path="my_reward.py"), False),
        (reward_config(path=None), False),
        (reward_config(name="dapo"), False),
        (reward_config(model=True), False),
    ],
)
def test_only_the_built_in_reward_is_computed_in_place(config, applies, tokenizer) -> None:
    assert LocalReward(config, tokenizer).applies == applies


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("3 + 4 = 7\n#### 7", 1, 1.0),
        ("3 + 4 = 7\n#### 7", 0, 1.0),
        ("#### 8", 1, 0.0),
        ("7", 0, 0.0),
        ("", 1, 0.0),
        ("#### 7 #### 9", 1, 0.0),
    ],
)
def test_the_score_is_that_of_the_naive_reward_manager(text, end, expected, tokenizer) -> None:
    response = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * end
    sample = {"data_source": "openai/gsm8k", "reward_model": {"ground_truth": "7"}, "extra_info": {}}
    output = AgentLoopOutput(prompt_ids=[1, 2], response_ids=response, response_mask=[1] * len(response), metrics={})
    LocalReward(reward_config(), tokenizer).score(output, sample)

    tensors = {"responses": torch.tensor([response]), "attention_mask": torch.ones(1, 2 + len(response), dtype=int)}
    rows = {key: np.array([value], dtype=object) for key, value in sample.items()}
    data = DataProto(batch=TensorDict(tensors, batch_size=1), non_tensor_batch=rows)

    async def by_verl():
        return await NaiveRewardManager(reward_config(), tokenizer, compute_score).run_single(data)

    theirs = asyncio.run(by_verl())
    assert output.reward_score == theirs["reward_score"] == expected
    assert output.extra_fields["reward_extra_info"] == theirs["reward_extra_info"]


def test_a_token_builder_is_made_once_for_equal_arguments(tokenizer) -> None:
    verl_module = importlib.import_module("verl.experimental.agent_loop.agent_loop")
    module = ModuleType("agent_loop")
    module.create_continuous_token_builder = verl_module.create_continuous_token_builder
    ReuseTokenBuilder.apply(module)
    assert ReuseTokenBuilder.is_live(module)
    create = module.create_continuous_token_builder
    arguments = {"hf_model_type": "qwen2", "chat_template_kwargs": {}, "mm_processor_kwargs": {}, "processor": None}
    first = create(tokenizer, **arguments)
    assert create(tokenizer, **arguments) is first
    others = [
        create(tokenizer, **{**arguments, "chat_template_kwargs": {"enable_thinking": False}}),
        create(tokenizer, **{**arguments, "hf_model_type": "llama"}),
        create(AutoTokenizer.from_pretrained(tokenizer.name_or_path), **arguments),
    ]
    assert len({id(builder) for builder in (first, *others)}) == 4
    assert type(others[1]) is not type(first)
    message = [{"role": "user", "content": "1 + 1?"}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert (
        first.build_initial_tokens(message) == create(tokenizer, **arguments).build_initial_tokens(message) == expected
    )


def test_polls_wait_as_long_as_no_rollout_was_done_before() -> None:
    """Rollouts of 1.0, 0.8 and 1.2 s: the next one is not asked for before 0.48 s, then every 50 ms."""
    polls = AdaptivePolling(SimpleNamespace(sample=None, _wait_for_next_poll=None))
    assert polls.interval("train", 0.0) == POLL_INTERVAL_S
    polls._recent["train"] = [8.0, 0.8]
    assert polls.interval("train", 0.0) == POLL_INTERVAL_S, "too few to know"
    polls._recent["train"] = [1.0, 0.8, 1.2]
    assert polls.interval("train", 0.01) == pytest.approx(0.47)
    assert polls.interval("train", 0.46) == polls.interval("train", 3.0) == POLL_INTERVAL_S
    assert polls.interval("val", 0.0) == POLL_INTERVAL_S, "validation has times of its own"


def test_polls_of_a_replay_buffer_are_timed_and_results_passed_on() -> None:
    buffer = ReplayBuffer.__new__(ReplayBuffer)
    buffer.poll_interval, buffer.filter_groups_metric, buffer.sync_refill_failed_groups = 2.0, None, False

    def sample(global_steps, partition_id, batch_size):
        buffer.waits = []
        last = buffer._wait_for_next_poll(partition_id, 1.5)
        return global_steps, partition_id, batch_size, last

    def wait_for_next_poll(partition_id, last_debug_time):
        buffer.waits.append(buffer.poll_interval)
        return last_debug_time

    buffer.sample, buffer._wait_for_next_poll = sample, wait_for_next_poll
    polls = AdaptivePolling(buffer)
    assert buffer.sample(global_steps=3, partition_id="train", batch_size=2) == (3, "train", 2, 1.5)
    assert buffer.waits == [POLL_INTERVAL_S]
    assert len(polls._recent["train"]) == 1 and polls._recent["train"][0] < 1.0
    polls._recent["train"] = [10.0, 11.0, 12.0]
    buffer.sample(global_steps=4, partition_id="train", batch_size=2)
    assert 5.9 < buffer.waits[0] <= 6.0
    for step in range(10):
        buffer.sample(global_steps=step, partition_id="train", batch_size=2)
    assert len(polls._recent["train"]) == 8
