"""Glue of `sampling` to its hosts."""
