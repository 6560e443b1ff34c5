#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: tests every kernel against its reference, times it against its incumbent and its bound,
# and writes docs/results/gpu-<name>-<date>.json. The kernels' benchmarks are scripts/bench_<op>.py. Last, the speculator in
# an engine there, the quantized KV cache and quantized experts: their tests, and their rows; what fails of them does not cost
# the others' results.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$RL_ACCEL_ROOT"
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu_check: no GPU here" >&2; exit 1; }

name=$(python -c 'import torch; print(torch.cuda.get_device_name(0).replace(" ", "-"))')
result=docs/results/gpu-$name-$(date +%Y-%m-%d).json
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

python -m pytest tests/kernels tests/sampling
for op in gumbel_argmax codec suffix propose_overlap; do
  bench=scripts/bench_$op.py
  python "$bench" --json "$parts/$(basename "$bench" .py).json"
done
failed=0
python -m pytest tests/kvcache || failed=1
python scripts/bench_kv_int4_gpu.py --no-tests --json "$parts/bench_kv_int4_gpu.json" || failed=1
python -m pytest tests/moe || failed=1
python scripts/bench_moe_int3_gpu.py --no-tests --json "$parts/bench_moe_int3_gpu.json" || failed=1
python -m pytest tests/speculator tests/hosts/vllm/test_speculator_engine.py || failed=1
python scripts/bench_speculator.py --steps 12 --json "$parts/bench_speculator.json" || failed=1
python - "$parts" "$result" <<'PYTHON'
import json, sys
from pathlib import Path
from rl_accel import machine
from rl_accel.hosts import versions

parts, result = Path(sys.argv[1]), Path(sys.argv[2])
rows = {part.stem: json.loads(part.read_text()) for part in sorted(parts.glob("*.json"))}
result.write_text(json.dumps({"machine": machine.describe(), "versions": versions.report(), "results": rows}, indent=1))
print(f"written: {result}")
PYTHON
exit $failed
