#!/usr/bin/env bash
# Sets up the environment on first use, then checks style and types and runs the tests: ./scripts/test.sh [pytest options]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$RL_ACCEL_ROOT"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
