"""Glue of `weight_sync` to its hosts."""
