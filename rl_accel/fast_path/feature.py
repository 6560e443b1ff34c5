"""The fast path as a feature.

What stock verl 0.9.1 spends on every request of a single-turn rollout, measured on 2 CPU cores with 128 requests a step
(seconds of rollout; tiny policy), and what is done here instead:
- output of every token to the front end, detokenized: only the final output, token ids only    (with `uni`: 4.9 -> 3.1)
- `hydra.utils.instantiate` of the agent loop, 4 ms a request: the class is looked up and called  \
- a TransferQueue write per response: those of a burst together                                    } 3.1 -> 2.3
- the built-in rule-based reward through another Ray process: called in place                      |
- the load balancer asked for every request although there is one engine: asked once              /
- a chat-template builder per request, each encoding its boundary tokens anew: one for all        \
- the built-in reward by a batch of one, with position ids and masks: on the response itself       } 2.3 -> 2.0
- the replay buffer asked 20 times a second whether all are done: not while they cannot be        /
"""

from rl_accel.fast_path.config import FastPathConfig
from rl_accel.feature import Feature

FEATURE = Feature(
    name="fast_path",
    title="fast path of rollouts",
    config=FastPathConfig,
    free=("enable",),
    driver="rl_accel.fast_path.hosts.driver:FastPathDriver",
    agent_loop="rl_accel.fast_path.hosts.agent_loop:FastAgentLoop",
    trainer="rl_accel.fast_path.hosts.trainer:FastPathTrainer",
    patches="rl_accel.fast_path.hosts.patches:PATCHES",
)
