"""Drafting ahead: a small language model in a process of its own writes on while the policy's engine verifies."""
