"""The command line of `python -m rl_accel.compare`."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rl_accel.compare import report
from rl_accel.compare.arms import parse_arms, run_arms
from rl_accel.compare.plot import plot_runs
from rl_accel.compare.runs import group_arms, load_runs
from rl_accel.compare.verdict import Criteria, compare_arms
from rl_accel.errors import CompareError, RLAccelError

DESCRIPTION = "Is one way of training faster than another, and did it change the training curve?"
EPILOG = """
examples:
  python -m rl_accel.compare outputs/plain outputs/ngram
  python -m rl_accel.compare --arms none,ngram --seeds 3 recipe=gsm8k_grpo

exit codes: 0 done; 1 the runs cannot be compared; 2 usage; 3 with --fail-on-difference, an arm is neither
identical nor shown to be equivalent; 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """All options; `--launcher` is for tests and unusual schedulers."""
    default = Criteria()
    parser = argparse.ArgumentParser(
        "python -m rl_accel.compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, wandb offline run, or entity/project/run_id; with --arms: overrides for all runs",
    )
    parser.add_argument("--out", type=Path, help="folder for the report (default: outputs/compare)")
    parser.add_argument("--wandb", metavar="PROJECT", help="log the report as a wandb run")
    parser.add_argument("--json", action="store_true", help="print compare.json instead of the table")
    parser.add_argument("--arms", help="train first: draft methods, or name:key=value+key2=value2, by commas")
    parser.add_argument("--seeds", type=int, default=1, help="with --arms: runs per arm (default: 1)")
    parser.add_argument(
        "--score-margin",
        type=float,
        default=default.score_margin,
        help="difference in reward and accuracy that counts as equivalent, absolute (default: %(default)s)",
    )
    parser.add_argument(
        "--length-margin",
        type=float,
        default=default.length_margin,
        help="the same for response length, as a fraction (default: %(default)s)",
    )
    parser.add_argument(
        "--fail-on-difference", action="store_true", help="exit 3 unless every arm is identical or equivalent"
    )
    parser.add_argument(
        "--launcher", default=f"{shlex.quote(sys.executable)} -m rl_accel.train", help=argparse.SUPPRESS
    )
    return parser


def compare(args: argparse.Namespace) -> int:
    """Train if asked to, judge, and write compare.md, compare.json and compare.png."""
    criteria = Criteria(score_margin=args.score_margin, length_margin=args.length_margin)
    out: Path = args.out or Path("outputs/compare")
    sources: Sequence[str | Path] = args.runs
    names = None
    if args.arms:
        sources, names = run_arms(parse_arms(args.arms), args.seeds, args.runs, out, shlex.split(args.launcher))
    runs = load_runs(sources, names)
    arms = group_arms(runs)
    if len(arms) < 2:
        raise CompareError(f"give two runs or more; got {', '.join(map(str, sources))}")
    baseline, *others = arms.values()
    comparisons = [compare_arms(baseline, other, criteria) for other in others]
    picture = out / "compare.png"
    text = report.markdown(arms, comparisons, criteria)
    data = json.dumps(report.as_json(arms, comparisons, criteria), indent=2) + "\n"
    try:
        plot_runs(runs, picture, "\n".join(report.sentence(comparison) for comparison in comparisons))
        for name, content in (("compare.md", text), ("compare.json", data)):
            (out / name).write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CompareError(f"--out {out} cannot be written: {error}") from error
    print(data if args.json else text, end="")
    print(f"Written: {picture}, compare.md and compare.json beside it", file=sys.stderr)
    if args.wandb:
        report.log_wandb(args.wandb, arms, comparisons, picture)
    failed = args.fail_on_difference and any(c.word not in ("identical", "equivalent") for c in comparisons)
    return 3 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {args.seeds}")
    try:
        return compare(args)
    except RLAccelError as error:
        print(f"rl_accel.compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rl_accel.compare: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
