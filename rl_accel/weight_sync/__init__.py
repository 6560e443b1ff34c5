"""The weight sync from trainer to rollout engines: watched, and read back from the kernels that use the weights."""
