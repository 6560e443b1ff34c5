#!/usr/bin/env bash
# Rewrites requirements/{cpu,gpu}{,-verl}.txt from pyproject.toml: one pinned list each for Python 3.10 to 3.12. Needs `uv` on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock() { # lock EXTRA [uv options]
  local extra=$1; shift
  uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header \
    --extra "$extra" --extra test "$@" pyproject.toml | grep -v "sys_platform == 'never'" > "requirements/$extra.txt"
}
for set in "" -verl; do
  lock "cpu$set" --override requirements/excluded.txt
  lock "gpu$set"
done
