#!/usr/bin/env bash
# Style and types of everything, without changing it; ./scripts/check.sh --fix changes what can be changed. Needs the environment
# of scripts/setup.sh to be active.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cpp=$(find kernels tests -name "*.?pp")
if [ "${1:-}" = --fix ]; then
  ruff check --fix . && ruff format . && clang-format -i $cpp
fi
ruff check .
ruff format --check .
clang-format --dry-run -Werror $cpp
mypy
