"""Word problems, tokenizer and a small trained policy with which GRPO runs on a CPU, offline."""
