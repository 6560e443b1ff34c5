"""Glue of `fast_path` to its hosts."""
