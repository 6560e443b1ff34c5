"""The EAGLE-3 head in a rollout engine: vLLM's own proposer drafts, and its weights are the trainer's.

vLLM loads the draft from a folder (`draft_folder.py`) beside the policy. From then on every tensor that it computes
with belongs to `DraftWeights`, apart from the policy's, and a swap copies into them. On a CPU vLLM multiplies by packed
copies that it cannot change; plain products take their place. Drafts are greedy and always as long as allowed, except
while a version is silent: then vLLM drafts on, which keeps its KV cache whole, and nothing is verified.

What a version promised is not known here, so it is watched by the share of its draft tokens that is accepted.

Host symbols (vLLM 0.28.0): `drafter.load_model`, `drafter.model`; `Eagle3LlamaForCausalLM.{model, lm_head}` and the
modules of its `LlamaModel`; `cpu_linear` of a layer; `SpeculativeConfig.{method, model, disable_padded_drafter_batch}`;
those of `source.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rl_accel.errors import NotLiveError
from rl_accel.hosts.vllm.faults import Faults
from rl_accel.speculator.config import SpeculatorConfig, refuse_parallel
from rl_accel.speculator.eagle import EagleShape, first_weights
from rl_accel.speculator.hosts import draft_folder
from rl_accel.speculator.hosts.source import Source

PAUSE_S = 1.0
"""Seconds between two steps from which on the engine had nothing to do."""


class EagleSource(Source):
    """Between vLLM's proposer and the trainer process."""

    gives_candidates = False
    shape: EagleShape

    def __init__(self, config: SpeculatorConfig, vllm_config: Any, faults: Faults):
        """
        Raises:
            NotLiveError: if vLLM was not started with the folder of a head that fits the policy.
        """
        speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
        if speculative is None or speculative.method != "eagle3":
            raise NotLiveError(
                "rl_accel.speculator.head=eagle3 needs vLLM's speculative_config with method eagle3; got "
                f"{getattr(speculative, 'method', None)}"
            )
        if not speculative.disable_padded_drafter_batch:
            raise NotLiveError(
                "rl_accel.speculator.head=eagle3 needs disable_padded_drafter_batch=true in vLLM's speculative_config: "
                "with padded batches vLLM drafts before it knows what was accepted"
            )
        refuse_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, NotLiveError)
        shape = draft_folder.read_shape(speculative.model)
        text = vllm_config.model_config.hf_text_config
        policy = int(vllm_config.model_config.get_vocab_size()), int(text.hidden_size), int(text.num_hidden_layers)
        if policy[:2] != (shape.vocab_size, shape.hidden_size) or max(shape.layers) > policy[2]:
            raise NotLiveError(
                f"{speculative.model} is a draft for a policy of {shape.vocab_size} tokens, width {shape.hidden_size} "
                f"and at least {max(shape.layers)} layers; this one has {policy[0]}, {policy[1]} and {policy[2]}"
            )
        super().__init__(config, vllm_config, faults, shape, shape.layers)
        self._last_step = -PAUSE_S

    def attach(self, runner: Any, acts: bool = True) -> None:
        super().attach(runner, acts)
        inner = runner.drafter.load_model

        def load_model(target_model: Any) -> None:
            inner(target_model)
            self.load(target_model, runner.drafter.model)

        runner.drafter.load_model = load_model

    def load(self, policy: Any, draft: Any) -> None:
        """Policy and draft are loaded: give the draft weights of its own, and start the trainer."""
        first = first_weights(self.shape, self.config.seed, self._embeddings(policy))
        weights = DraftWeights(draft, self.shape, policy)

        def serve(folded: torch.Tensor) -> DraftWeights:
            weights.load(folded)
            return weights

        self._start(first, serve)

    @torch.inference_mode()
    def _see_accepted(self, sampled: list[list[int]]) -> None:
        if (step := self._step) is not None and self.head is not None:
            num_drafted = np.asarray(step.num_draft_tokens, np.int64)
            num_sampled = np.fromiter(map(len, sampled), np.int64, len(sampled))
            drafted = (num_drafted > 0) & (num_sampled > 0)
            if drafted.any():
                lengths = num_drafted[drafted]
                self.observe(np.ones((len(lengths), lengths.max()), np.float32), lengths, num_sampled[drafted] - 1)
        now = time.perf_counter()
        if self.tap is not None and self.client is not None and now - self._last_step < PAUSE_S:
            self.tap.observe_step(now - self._last_step, self.client.slots.allowed_share)
        self._last_step = now
        super()._see_accepted(sampled)

    def _propose(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        drafts = inner(*args, **kwargs)
        self._count("propose", started, 1)
        return [[] for _ in args[1]] if self.watch.silent else drafts


class DraftWeights:
    """The tensors that vLLM's draft computes with."""

    def __init__(self, draft: Any, shape: EagleShape, policy: Any):
        """
        Raises:
            NotLiveError: if the draft shares a tensor with the policy, or is not of `shape`.
        """
        self.shape = shape
        model, layer = draft.model, draft.model.layers[0]
        attention, mlp = layer.self_attn, layer.mlp
        for module in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj, model.fc, draft.lm_head):
            _unpack(module)
        sizes = shape.sizes()
        dtype = layer.input_layernorm.weight.dtype
        qkv = _own(attention.qkv_proj, dtype, sizes["q"][0] + 2 * sizes["k"][0], 2 * shape.width)
        gate_up = _own(mlp.gate_up_proj, dtype, 2 * shape.inner, shape.width)
        q, k, v = qkv.split([sizes[name][0] for name in "qkv"])
        gate, up = gate_up.chunk(2)
        self.parts: dict[str, list[torch.Tensor]] = {
            "aux_norm": [norm.weight for norm in model.fc_norm],
            "fc": [_own(model.fc, dtype, *sizes["fc"])],
            "embed": [model.embed_tokens.weight[: shape.vocab_size]],  # vLLM pads the vocabulary
            "embed_norm": [layer.input_layernorm.weight],
            "state_norm": [layer.hidden_norm.weight],
            "q": [q],
            "k": [k],
            "v": [v],
            "o": [_own(attention.o_proj, dtype, *sizes["o"])],
            "mlp_norm": [layer.post_attention_layernorm.weight],
            "gate": [gate],
            "up": [up],
            "down": [_own(mlp.down_proj, dtype, *sizes["down"])],
            "final_norm": [model.norm.weight],
            "lm_head": [draft.lm_head.weight[: shape.num_drafted]],
        }
        """Weight -> views that hold it, one after the other."""
        for name, size in sizes.items():
            found = sum(part.numel() for part in self.parts[name])
            if found != torch.Size(size).numel():
                raise NotLiveError(f"vLLM's draft has {found} numbers in {name}; {size} are expected")
        shared = {p.data_ptr() for p in policy.parameters() if p.numel()}
        shared &= {part.data_ptr() for parts in self.parts.values() for part in parts}
        if shared:
            raise NotLiveError("vLLM shares tensors of the policy with the draft, so that learning would change it")

    @torch.no_grad()
    def load(self, folded: torch.Tensor) -> None:
        """Overwrite the weights in place; storage stays, so captured graphs stay valid.

        Args:
            folded: float32 [num_weights].
        """
        for name, weight in self.shape.split(folded).items():
            parts = self.parts[name]
            for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
                part.copy_(rows.view(part.shape))

    def flat(self) -> torch.Tensor:
        """Return a copy, float32 [num_weights]."""
        return torch.cat([part.flatten().float().cpu() for name in self.shape.sizes() for part in self.parts[name]])


def _unpack(module: Any) -> None:
    """Have a layer multiply by its weight as it is."""
    if hasattr(module, "cpu_linear"):
        module.cpu_linear = torch.nn.functional.linear


def _own(module: Any, dtype: torch.dtype, *size: int) -> torch.Tensor:
    """Return the weight of a layer, a new one where vLLM has kept only a packed copy."""
    if not module.weight.numel():
        weight = torch.zeros(size, dtype=dtype, device=module.weight.device)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module.weight
