"""Glue to vLLM 0.28.0: the plug-in, exact sampling, the repair of the CPU build, speculation counters."""
