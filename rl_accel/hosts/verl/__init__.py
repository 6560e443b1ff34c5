"""Glue to verl."""

ACTIVE_ENV = "RL_ACCEL_ACTIVE"
"""Names of the features that are on, for the Ray processes of a run."""
RUN_ENV = "RL_ACCEL_RUN"
"""A random name of the run, in all of its processes."""
