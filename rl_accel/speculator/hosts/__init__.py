"""The speculator in its hosts."""
