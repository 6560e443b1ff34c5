#!/usr/bin/env bash
# Installs the suffix_decoding part of arctic-inference (Snowflake, Apache-2.0) into the active virtual environment, for
# vLLM's own speculative method `suffix`. The rest of that package wants CUDA, and its vLLM plug-in would patch vLLM: both
# stay out. Nothing is done if it is there already. To remove it: pip uninstall arctic-inference
set -euo pipefail

VERSION=0.3.0
SDIST_SHA256=7f22e3e1b1071c6061c0d6951be17c0fb50b08d06d6e543144c8f52faba60a36

fail() { echo "install_arctic.sh: $*" >&2; exit 1; }

[ -n "${VIRTUAL_ENV:-}" ] || fail "activate the virtual environment first: source .venv/bin/activate"
PYTHON="$VIRTUAL_ENV/bin/python"
[ -x "$PYTHON" ] || fail "$PYTHON: not found"
PIP=("$PYTHON" -m pip --disable-pip-version-check --quiet)

# The new process sees what a run will see: the package imports, has this version, and no plug-in of it is registered.
verify() {
  (cd / && "$PYTHON" - "$VERSION" <<'PY'
import sys
from importlib.metadata import entry_points, version
from arctic_inference.suffix_decoding import SuffixDecodingCache
assert version("arctic-inference") == sys.argv[1], version("arctic-inference")
plugins = [e.value for e in entry_points(group="vllm.general_plugins") if e.value.startswith("arctic_inference")]
assert not plugins, f"vLLM plug-in of arctic-inference is registered: {plugins}"
cache = SuffixDecodingCache(max_tree_depth=8, max_cached_requests=4)
import numpy as np
cache.start_request("a", np.array([1, 2, 3, 4, 5, 1, 2, 3], dtype=np.int32))
assert list(cache.speculate("a", np.array([1, 2, 3], dtype=np.int32), max_spec_tokens=2).token_ids) == [4, 5]
PY
  )
}

if "$PYTHON" -m pip show --quiet arctic-inference 2>/dev/null; then
  verify || fail "another or a broken arctic-inference is installed; remove it (pip uninstall arctic-inference) and run this again"
  echo "arctic-inference $VERSION (suffix_decoding only) is installed already"
  exit 0
fi

command -v c++ >/dev/null || fail "needs a C++20 compiler (Debian, Ubuntu: apt install g++)"
for module in torch setuptools wheel; do  # the sdist's setup.py imports torch to report its metadata
  "$PYTHON" -c "import $module" 2>/dev/null || fail "$PYTHON has no $module; run scripts/setup.sh first"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Build tools that the environment lacks go to a folder of their own.
missing=()
PATH="$VIRTUAL_ENV/bin:$work/tools/bin:$PATH"
command -v cmake >/dev/null || missing+=("cmake>=3.26")
command -v ninja >/dev/null || missing+=(ninja)
"$PYTHON" -c "import nanobind" 2>/dev/null || missing+=("nanobind>=2.9")
export PYTHONPATH="$work/tools${PYTHONPATH:+:$PYTHONPATH}"
if [ ${#missing[@]} -gt 0 ]; then
  "${PIP[@]}" install --target "$work/tools" "${missing[@]}" || fail "could not install ${missing[*]}"
fi

echo "arctic-inference==$VERSION --hash=sha256:$SDIST_SHA256" > "$work/sdist.txt"
"${PIP[@]}" download --no-deps --no-binary :all: --no-build-isolation --require-hashes --dest "$work" -r "$work/sdist.txt" \
  || fail "could not download the sdist of arctic-inference $VERSION"
tar -xzf "$work/arctic_inference-$VERSION.tar.gz" -C "$work" || fail "could not unpack the sdist"
source="$work/arctic_inference-$VERSION"

log="$work/build.log"
cmake -S "$source/csrc/suffix_decoding" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$PYTHON" > "$log" 2>&1 && cmake --build "$work/build" >> "$log" 2>&1 \
  || { tail -40 "$log" >&2; fail "building the suffix_decoding extension failed"; }

# A wheel of those parts only, so that pip knows what is installed and can remove it. It names no entry points.
wheel="$work/wheel/arctic_inference-$VERSION"
package="$wheel/arctic_inference/suffix_decoding"
info="$wheel/arctic_inference-$VERSION.dist-info"
mkdir -p "$package" "$info"
touch "$wheel/arctic_inference/__init__.py"
cp "$source"/arctic_inference/suffix_decoding/{__init__,cache}.py "$work"/build/_C*.so "$package"
cp "$source/LICENSE" "$info"
printf 'Metadata-Version: 2.1\nName: arctic-inference\nVersion: %s\nSummary: suffix_decoding only, built by %s\nLicense: Apache-2.0\nRequires-Dist: numpy\n' \
  "$VERSION" "rl_accel/scripts/install_arctic.sh" > "$info/METADATA"
tag=$("$PYTHON" -c 'import sys, sysconfig as s
py = f"cp{sys.version_info[0]}{sys.version_info[1]}"
print(f"{py}-{py}-" + s.get_platform().replace("-", "_").replace(".", "_"))')
printf 'Wheel-Version: 1.0\nGenerator: install_arctic.sh\nRoot-Is-Purelib: false\nTag: %s\n' "$tag" > "$info/WHEEL"
"$PYTHON" -m wheel pack --dest-dir "$work" "$wheel" > "$log" 2>&1 || { cat "$log" >&2; fail "packing the wheel failed"; }
"${PIP[@]}" install --no-deps "$work"/arctic_inference-*.whl || fail "installing the wheel failed"
verify || fail "arctic-inference was installed but does not work"
echo "arctic-inference $VERSION (suffix_decoding only) installed into $VIRTUAL_ENV"
