#!/usr/bin/env bash
# Sets up the environment on first use, then trains: ./scripts/train.sh recipe=gsm8k_grpo [overrides]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m rl_accel.train "$@"
