"""rl_accel: faster RL post-training of language models on verl, vLLM and DeepSpeed, without a fork."""

__version__ = "0.1.0"
