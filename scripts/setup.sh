# Sourced by train.sh and test.sh: makes .venv on first use from the pinned lists, then activates it.
# RL_ACCEL_PYTHON chooses the interpreter, RL_ACCEL_DEVICE=cpu|gpu the flavor (default: gpu where nvidia-smi works),
# RL_ACCEL_STACK=verl the versions that verl itself asks for, in .venv-verl (docs/versions.md; default: newer ones),
# RL_ACCEL_TORCH_INDEX a package index that has PyTorch's CPU builds (`torch==...+cpu`), where pip's own has none.
set -euo pipefail
RL_ACCEL_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${RL_ACCEL_STACK:-default}" in
  default) STACK="" TORCH=2.13.0 ;;
  verl) STACK=-verl TORCH=2.11.0 ;;
  *) echo "rl_accel: RL_ACCEL_STACK=$RL_ACCEL_STACK is unknown; known: default, verl" >&2; exit 1 ;;
esac
VENV="$RL_ACCEL_ROOT/.venv$STACK"

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

# A Python without ensurepip (Debian's, without python3-venv) leaves an environment without pip behind, which is of no use.
make_venv() {
  local python=$1
  if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
  rm -rf "$VENV"
  if ! "$python" -m venv "$VENV" || ! "$VENV/bin/python" -m pip --version >/dev/null; then
    rm -rf "$VENV"
    echo "rl_accel: $python cannot make a virtual environment with pip (Debian, Ubuntu: apt install python3-venv)," \
      "or set RL_ACCEL_PYTHON to another Python" >&2
    return 1
  fi
}

PIP=(-m pip --disable-pip-version-check install -qq --root-user-action=ignore --progress-bar off)

install_into_venv() {
  local flavor=$1 pip=("$VENV/bin/python" "${PIP[@]}")
  # The pip that came with Python may not know --root-user-action.
  "$VENV/bin/python" -m pip --disable-pip-version-check install -qq --progress-bar off --upgrade \
    "pip>=24" "setuptools>=77,<81" wheel
  if [ "$flavor" = cpu ]; then
    "${pip[@]}" ${RL_ACCEL_TORCH_INDEX:+--extra-index-url "$RL_ACCEL_TORCH_INDEX"} "torch==$TORCH+cpu" 2>/dev/null || {
      echo "rl_accel: no CPU build of torch on pip's index; taking the default build (several GB)." \
        "RL_ACCEL_TORCH_INDEX can name an index that has it" >&2
      "${pip[@]}" "torch==$TORCH"
    }
  fi
  # The list is complete and pinned, so pip has nothing to resolve: --no-deps keeps what has no CPU build out.
  "${pip[@]}" --no-deps -r "$RL_ACCEL_ROOT/requirements/$flavor$STACK.txt"
  if [ "$flavor" = cpu ]; then
    "$VENV/bin/python" "$RL_ACCEL_ROOT/scripts/vllm_cpu_stub.py"
  fi
}

# The C++ kernels are built with the package; what they are built from decides whether that is due.
build_package() {
  command -v c++ >/dev/null || {
    echo "rl_accel builds its C++ kernels and found no compiler (Debian, Ubuntu: apt install g++)" >&2; return 1
  }
  PATH="$VENV/bin:$PATH" "$VENV/bin/python" "${PIP[@]}" --no-deps --no-build-isolation \
    -e "$RL_ACCEL_ROOT"
}

checksum() { sha256sum | cut -c1-16; }

# Two first runs at once would install into one environment; the second waits, and finds it made.
lock_setup() {
  exec 9>"$RL_ACCEL_ROOT/.setup.lock"
  flock -n 9 || { echo "rl_accel: waiting for another set-up in this folder" >&2; flock 9; }
}
unlock_setup() { exec 9>&-; }

setup() {
  local flavor=${RL_ACCEL_DEVICE:-} stamp built python
  if [ -z "$flavor" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then flavor=gpu; else flavor=cpu; fi
  fi
  stamp="$VENV/.rl_accel-$flavor-$(cat "$RL_ACCEL_ROOT/requirements/$flavor$STACK.txt" \
    "$RL_ACCEL_ROOT/pyproject.toml" "$RL_ACCEL_ROOT/CMakeLists.txt" "$RL_ACCEL_ROOT/scripts/setup.sh" \
    | checksum)"
  built="$VENV/.rl_accel-kernels-$(find "$RL_ACCEL_ROOT/kernels" "$RL_ACCEL_ROOT/CMakeLists.txt" -type f \
    \( -name '*.?pp' -o -name CMakeLists.txt \) -print0 | sort -z | xargs -0 cat | checksum)"
  if [ ! -e "$stamp" ] || [ ! -e "$built" ]; then lock_setup; fi
  if [ ! -e "$stamp" ]; then
    python=$(find_python)
    echo "rl_accel: setting up $(basename "$VENV") ($flavor, $("$python" -V 2>&1)); this happens once and takes a few minutes" >&2
    make_venv "$python"
    install_into_venv "$flavor"
    rm -f "$VENV"/.rl_accel-*
  fi
  if [ ! -e "$stamp" ] || [ ! -e "$built" ]; then
    build_package
    rm -f "$VENV"/.rl_accel-kernels-*
    touch "$stamp" "$built"
    unlock_setup
  fi
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
}

setup
