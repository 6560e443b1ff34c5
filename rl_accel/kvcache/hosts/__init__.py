"""The INT4 KV cache in vLLM and verl."""
