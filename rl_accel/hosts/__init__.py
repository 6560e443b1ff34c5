"""Glue to the hosts. Nothing outside this package imports verl, vLLM or DeepSpeed."""
