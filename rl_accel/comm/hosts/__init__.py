"""Glue of `comm` to its hosts."""
