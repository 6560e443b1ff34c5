"""Glue to verl."""

ACTIVE_ENV = "RL_ACCEL_ACTIVE"
"""Names of the features that are on, for the Ray processes of a run."""
RUN_ENV = "RL_ACCEL_RUN"
"""A random name of the run, in all of its processes."""
FOLDER = "rl_accel"
"""Beside verl's checkpoints and in each of them: a folder per feature."""
