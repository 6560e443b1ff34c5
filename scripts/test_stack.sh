#!/usr/bin/env bash
# The tests of what depends on the hosts, with the versions that verl itself asks for: ./scripts/test_stack.sh [pytest options]
# Makes .venv-verl on first use. Engines, exactness, drafting, 4-bit communication and trainings; results: docs/versions.md.
# One process: torch's default build takes more memory than its CPU build, and two trainings at once need 24 GB.
export RL_ACCEL_STACK=verl
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$RL_ACCEL_ROOT"
exec python -m pytest -n "${RL_ACCEL_TEST_PROCESSES:-1}" \
  tests/hosts tests/sampling tests/feature tests/test_doctor.py tests/kernels/test_gumbel_argmax.py "$@"
