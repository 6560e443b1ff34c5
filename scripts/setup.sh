# Sourced by train.sh and test.sh: makes .venv on first use from the pinned lists, then activates it.
# RL_ACCEL_PYTHON chooses the interpreter, RL_ACCEL_DEVICE=cpu|gpu the flavour (default: gpu where nvidia-smi works).
set -euo pipefail
RL_ACCEL_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
  local candidate
  for candidate in "${RL_ACCEL_PYTHON:-}" python3 python3.12 python3.11 python3.10; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"; return
    fi
    if [ "$candidate" = "${RL_ACCEL_PYTHON:-}" ]; then break; fi
  done
  echo "rl_accel needs Python 3.10, 3.11 or 3.12 (set RL_ACCEL_PYTHON to one)" >&2
  return 1
}

install_into_venv() {
  local flavour=$1 pip=("$RL_ACCEL_ROOT/.venv/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off)
  "${pip[@]}" --upgrade "pip>=24" "setuptools>=77,<81" wheel
  if [ "$flavour" = cpu ]; then
    # The small CPU build lives on an index of PyTorch's own; without it the build of the default index works too.
    "${pip[@]}" "torch==2.13.0+cpu" 2>/dev/null || "${pip[@]}" "torch==2.13.0"
  fi
  # The list is complete and pinned, so pip has nothing to resolve: --no-deps keeps what has no CPU build out.
  "${pip[@]}" --no-deps -r "$RL_ACCEL_ROOT/requirements/$flavour.txt"
  if [ "$flavour" = cpu ]; then
    "$RL_ACCEL_ROOT/.venv/bin/python" "$RL_ACCEL_ROOT/scripts/vllm_cpu_stub.py"
  fi
}

# The C++ kernels are built with the package; what they are built from decides whether that is due.
build_package() {
  command -v c++ >/dev/null || {
    echo "rl_accel builds its C++ kernels and found no compiler (Debian, Ubuntu: apt install g++)" >&2; return 1
  }
  PATH="$RL_ACCEL_ROOT/.venv/bin:$PATH" "$RL_ACCEL_ROOT/.venv/bin/python" -m pip --disable-pip-version-check install \
    --quiet --progress-bar off --no-deps --no-build-isolation -e "$RL_ACCEL_ROOT"
}

checksum() { sha256sum | cut -c1-16; }

setup() {
  local flavour=${RL_ACCEL_DEVICE:-} stamp built python
  if [ -z "$flavour" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then flavour=gpu; else flavour=cpu; fi
  fi
  stamp="$RL_ACCEL_ROOT/.venv/.rl_accel-$flavour-$(cat "$RL_ACCEL_ROOT/requirements/$flavour.txt" \
    "$RL_ACCEL_ROOT/pyproject.toml" "$RL_ACCEL_ROOT/CMakeLists.txt" "$RL_ACCEL_ROOT/scripts/setup.sh" \
    | checksum)"
  built="$RL_ACCEL_ROOT/.venv/.rl_accel-kernels-$(find "$RL_ACCEL_ROOT/kernels" "$RL_ACCEL_ROOT/CMakeLists.txt" -type f \
    \( -name '*.?pp' -o -name CMakeLists.txt \) -print0 | sort -z | xargs -0 cat | checksum)"
  if [ ! -e "$stamp" ]; then
    python=$(find_python)
    echo "rl_accel: setting up .venv ($flavour, $("$python" -V 2>&1)); this happens once and takes a few minutes" >&2
    [ -x "$RL_ACCEL_ROOT/.venv/bin/python" ] || "$python" -m venv "$RL_ACCEL_ROOT/.venv"
    install_into_venv "$flavour"
    rm -f "$RL_ACCEL_ROOT"/.venv/.rl_accel-*
  fi
  if [ ! -e "$stamp" ] || [ ! -e "$built" ]; then
    build_package
    rm -f "$RL_ACCEL_ROOT"/.venv/.rl_accel-kernels-*
    touch "$stamp" "$built"
  fi
  # shellcheck disable=SC1091
  source "$RL_ACCEL_ROOT/.venv/bin/activate"
}

setup
