"""Low-bit experts in vLLM and verl."""
