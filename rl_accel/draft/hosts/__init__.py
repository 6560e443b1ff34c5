"""Glue of `draft` to its hosts."""
