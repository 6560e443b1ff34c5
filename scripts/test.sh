#!/usr/bin/env bash
# Sets up the environment on first use, then checks style and types and runs the tests: ./scripts/test.sh [pytest options]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$RL_ACCEL_ROOT"
ruff check .
ruff format --check .
mypy
# Two processes: most of a test that starts an engine or a training is the import of its hosts, on one core.
exec python -m pytest -n "${RL_ACCEL_TEST_PROCESSES:-2}" "$@"
