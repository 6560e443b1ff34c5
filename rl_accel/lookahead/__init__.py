"""Step-level speculation: a draft model writes reasoning steps ahead, the target writes the same steps in parallel."""
