"""An agent loop that generates several times on one prompt at once and returns every text as an output of its own."""

import asyncio
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

NUM_TEXTS = 3


class BestOfLoop(AgentLoopBase):
    async def run(self, sampling_params, **kwargs):
        prompt_ids = await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))
        texts = await asyncio.gather(
            *(
                self.server_manager.generate(
                    request_id=uuid4().hex, prompt_ids=prompt_ids, sampling_params=dict(sampling_params)
                )
                for _ in range(NUM_TEXTS)
            )
        )
        length = self.rollout_config.response_length
        return [
            AgentLoopOutput(
                prompt_ids=prompt_ids,
                response_ids=text.token_ids[:length],
                response_mask=[1] * len(text.token_ids[:length]),
                response_logprobs=text.log_probs[:length],
                num_turns=2,
                metrics={},
                extra_fields={**text.extra_fields, "turn_scores": [], "tool_rewards": []},
            )
            for text in texts
        ]
