"""Data sources of the GSM8K recipes, written as the parquet files that verl reads.

`generated`: problems made by `rl_accel.quickstart.problems`, nothing to download.
`gsm8k`: a local copy (folder with train/test as .jsonl or .parquet), else the public data set `openai/gsm8k`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_accel.errors import ConfigError
from rl_accel.run_folder import write_whole

SOURCES = ("gsm8k", "generated", "files")
GENERATED_SEED = 20_000
"""The problems are the same in every run: the run's seed orders and samples, it does not choose the data."""


def build(
    source: str,
    out_dir: Path,
    *,
    path: str | None = None,
    instruction: str = "",
    train_size: int | None = None,
    val_size: int | None = None,
) -> tuple[str, str]:
    """Write train.parquet and val.parquet into ``out_dir`` and return their paths.

    Args:
        source: `gsm8k` or `generated`.
        path: `gsm8k` only: folder of a local copy.
        instruction: appended to every question after a blank.
        train_size, val_size: problems to keep; None keeps all (`generated`: 4096 and 256).

    Raises:
        ConfigError: on an unknown source, a missing or unreadable copy, or an unreachable data set.
    """
    if source == "generated":
        train = _generated("train", 4096 if train_size is None else train_size)
        val = _generated("test", 256 if val_size is None else val_size)
    elif source == "gsm8k":
        train = _gsm8k("train", path)[:train_size]
        val = _gsm8k("test", path)[:val_size]
    else:
        raise ConfigError(f"data.source={source}: unknown. Known: {', '.join(SOURCES)}")
    for name, rows in (("train", train), ("test", val)):
        if not rows:
            raise ConfigError(f"data.source={source}: the {name} part has no problems")
    out_dir.mkdir(parents=True, exist_ok=True)
    train_path, val_path = paths(out_dir)
    _write(train_path, train, "train", source, instruction)
    _write(val_path, val, "test", source, instruction)
    return str(train_path), str(val_path)


def paths(out_dir: Path) -> tuple[Path, Path]:
    """Where `build` writes."""
    return out_dir / "train.parquet", out_dir / "val.parquet"


def final_answer(answer: str) -> str:
    """Return the number after `####` without thousands separators.

    Raises:
        ConfigError: if there is none.
    """
    _, mark, number = answer.rpartition("####")
    if not mark or not number.strip():
        raise ConfigError(f"answer without '#### <number>': {answer[-80:]!r}")
    return number.strip().replace(",", "")


def _generated(split: str, num_problems: int) -> list[dict[str, str]]:
    from rl_accel.quickstart.problems import generate

    problems = generate(num_problems, seed=GENERATED_SEED, split=split)
    return [{"question": p.question, "answer": p.answer} for p in problems]


def _gsm8k(split: str, path: str | None) -> list[dict[str, str]]:
    if path is None:
        return _public_gsm8k(split)
    folder = Path(path).expanduser()
    jsonl, parquet = folder / f"{split}.jsonl", folder / f"{split}.parquet"
    if jsonl.exists():
        rows = _read(jsonl, _jsonl_rows)
    elif parquet.exists():
        rows = _read(parquet, _parquet_rows)
    else:
        raise ConfigError(f"data.path={path}: neither {jsonl.name} nor {parquet.name} is there")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not {"question", "answer"} <= row.keys():
            raise ConfigError(f"data.path={path}: row {number} of {split} has no 'question' and 'answer'")
        if not isinstance(row["question"], str) or not isinstance(row["answer"], str):
            raise ConfigError(f"data.path={path}: 'question' and 'answer' of row {number} of {split} are not both text")
    return rows


def num_rows(files: str | Sequence[str]) -> int | None:
    """Return the rows of verl's parquet files, or None where one is of another kind or elsewhere.

    Raises:
        ConfigError: if a file is damaged.
    """
    total = 0
    for name in [files] if isinstance(files, str) else files:
        path = Path(str(name)).expanduser()
        if path.suffix != ".parquet" or not path.is_file():
            return None
        total += _read(path, _parquet_num_rows)
    return total


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """Read a data file; whatever a parser raises on damaged bytes becomes one error."""
    try:
        return read(path)
    except MemoryError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def _jsonl_rows(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _parquet_rows(path: Path) -> list[Any]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def _parquet_num_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).metadata.num_rows


def _public_gsm8k(split: str) -> list[dict[str, str]]:
    from datasets import load_dataset

    try:
        return load_dataset("openai/gsm8k", "main", split=split).to_list()
    except Exception as error:
        raise ConfigError(
            "data.source=gsm8k: the public data set openai/gsm8k cannot be loaded "
            f"({type(error).__name__}: {error}). Give a local copy with data.path=FOLDER, or use data.source=generated"
        ) from error


def _write(path: Path, problems: Iterable[Mapping[str, str]], split: str, source: str, instruction: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data_source = "openai/gsm8k" if source == "gsm8k" else "rl_accel/generated"
    rows = [
        {
            "data_source": data_source,
            "prompt": [{"role": "user", "content": f"{problem['question']} {instruction}".strip()}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": final_answer(problem["answer"])},
            "extra_info": {"split": split, "index": index, "problem_id": f"{data_source}/{split}/{index}"},
        }
        for index, problem in enumerate(problems)
    ]
    write_whole(path, lambda partial: pq.write_table(pa.Table.from_pylist(rows), partial))
