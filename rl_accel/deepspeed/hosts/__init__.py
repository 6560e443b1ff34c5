"""Glue of `deepspeed` to its hosts."""
