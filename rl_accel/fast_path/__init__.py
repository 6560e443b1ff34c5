"""Cheaper ways through verl's rollout plumbing: the same rollouts, sooner."""
