"""What a run keeps for `rl_accel.compare`."""
