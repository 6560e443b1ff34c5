"""Rollout requests that know which problem, sample and step they are (`agent.agent_loop_manager_class` of verl 0.9.1).

Everything that keys on the identity of a rollout, exact sampling and history drafting, reads it in vLLM from
`SamplingParams.extra_args["rl_accel"]` (`rl_accel/identity.py`). `(problem_id, sample_index, step, validate)` names a
session: unique in a run, also when a problem occurs twice in a batch, and the same in every run of the same data and
seed, whatever the order in which requests are served. A generation of a session has a number besides (`session.py`).

Host symbols: `AgentLoopManagerTQ.generate_sequences`, `AgentLoopWorkerTQ._run_agent_loop`.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu

from rl_accel.config import AccelConfig
from rl_accel.hosts.verl.identity import OCCURRENCE, PROBLEM_ID, problem_id_of
from rl_accel.hosts.verl.prepare import accel_block
from rl_accel.hosts.verl.session import SessionClient


class IdentifiedAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """Gives every agent loop a client that names its generations, and asks the features on the way."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        accel = AccelConfig.from_mapping(accel_block(self.config))
        self._features = {
            feature.name: feature.role("agent_loop")(accel.settings[feature.name], self)
            for feature in accel.enabled()
            if feature.agent_loop
        }
        self._clients: dict[str, Any] = {}
        """Of the session, feature -> what it made; on the copy of the worker that serves the session."""

    def drain_features(self) -> dict[str, dict[str, float]]:
        """Return feature -> metrics since the last call."""
        return {name: feature.drain() for name, feature in self._features.items()}

    async def _compute_score(self, outputs, kwargs):
        for name, feature in self._features.items():
            feature.finish(outputs, self._clients[name])
        wanted = outputs[-1].reward_score is None and self.reward_loop_worker_handles
        if not wanted or not any(feature.score(outputs[-1], kwargs) for feature in self._features.values()):
            await super()._compute_score(outputs, kwargs)

    async def _run_agent_loop(self, sampling_params, trajectory, *, agent_name, trace=True, **kwargs):
        rollout = self.config.actor_rollout_ref.rollout
        samples = rollout.val_kwargs.n if trajectory["validate"] else rollout.n
        identity = {
            "problem_id": str(kwargs[PROBLEM_ID]),
            "sample_index": int(kwargs[OCCURRENCE]) * samples + int(kwargs["session_id"]),
            "step": int(kwargs["global_steps"]),
            "validate": bool(trajectory["validate"]),
        }
        worker = copy.copy(self)  # verl hands `llm_client` to the loop that it makes in here
        worker._clients, client = {}, self.llm_client
        for name, feature in self._features.items():
            worker._clients[name] = client = feature.client(client, identity["validate"])
            sampling_params = feature.sampling_params(sampling_params)
        worker.llm_client = SessionClient(client, identity)
        return await super(IdentifiedAgentLoopWorker, worker)._run_agent_loop(
            sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
        )


class IdentifiedAgentLoopManager(AgentLoopManagerTQ):
    """Names every prompt before it is dispatched to the workers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(IdentifiedAgentLoopWorker)
        self._seen: Counter[str] = Counter()
        self._seen_in: tuple[int, bool] | None = None

    def generate_sequences(self, prompts) -> None:
        step = int(tu.get_non_tensor_data(prompts, "global_steps", 0))
        validate = bool(tu.get_non_tensor_data(prompts, "validate", False))
        if self._seen_in != (step, validate):
            self._seen_in, self._seen = (step, validate), Counter()
        extra_infos, raw_prompts = list(prompts["extra_info"]), list(prompts["raw_prompt"])
        sources = list(prompts["data_source"]) if "data_source" in prompts.keys() else ["data"] * len(raw_prompts)  # noqa: SIM118
        names, occurrences = [], []
        for extra_info, source, raw_prompt in zip(extra_infos, sources, raw_prompts, strict=True):
            name = problem_id_of(extra_info, str(source), raw_prompt)
            names.append(name)
            occurrences.append(self._seen[name])
            self._seen[name] += 1
        tu.assign_non_tensor_stack(prompts, PROBLEM_ID, names)
        tu.assign_non_tensor_stack(prompts, OCCURRENCE, occurrences)
        super().generate_sequences(prompts)
