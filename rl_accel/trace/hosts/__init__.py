"""Glue of `trace` to its hosts."""
