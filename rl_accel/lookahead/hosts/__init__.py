"""Lookahead in the processes of verl."""
