"""Data sources: generated problems, a local copy of GSM8K in both formats, and what is wrong with a bad one."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rl_accel import data
from rl_accel.errors import ConfigError
from rl_accel.quickstart.reward import compute_score

REAL_GSM8K = Path(os.environ.get("RL_ACCEL_GSM8K", Path(__file__).parents[2] / "shared" / "data" / "gsm8k"))
ROWS = [
    {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "A thousand and one?", "answer": "#### 1,001"},
]


def write_jsonl(folder, rows):
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def read(path):
    return pq.read_table(path).to_pylist()


def test_generated_rows_are_what_verl_reads(tmp_path):
    train, val = map(read, data.build("generated", tmp_path, train_size=50, val_size=20))
    assert (len(train), len(val)) == (50, 20)
    row = train[0]
    assert row["prompt"][0]["role"] == "user"
    assert row["data_source"] == "rl_accel/generated"
    assert not {r["prompt"][0]["content"] for r in train} & {r["prompt"][0]["content"] for r in val}
    assert len({r["extra_info"]["problem_id"] for r in train + val}) == 70


def test_jsonl_and_parquet_copies_give_the_same_rows(tmp_path):
    jsonl, parquet = tmp_path / "jsonl", tmp_path / "parquet"
    for folder in (jsonl, parquet):
        folder.mkdir()
    write_jsonl(jsonl, ROWS)
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(ROWS), parquet / f"{split}.parquet")
    read_rows = [
        read(data.build("gsm8k", tmp_path / f"out{i}", path=str(folder), instruction="Think.")[0])
        for i, folder in enumerate((jsonl, parquet))
    ]
    assert read_rows[0] == read_rows[1]
    assert read_rows[0][1]["reward_model"]["ground_truth"] == "1001"
    assert read_rows[0][0]["prompt"][0]["content"] == "Two and two? Think."


@pytest.mark.parametrize(
    ("row", "message"),
    [({"question": "?"}, "row 1 of train has no"), ({"question": "?", "answer": "4"}, "answer without '####")],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    write_jsonl(tmp_path, [row])
    with pytest.raises(ConfigError, match=message):
        data.build("gsm8k", tmp_path / "out", path=str(tmp_path))


def test_a_missing_copy_and_an_unknown_source_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"neither train\.jsonl nor train\.parquet"):
        data.build("gsm8k", tmp_path, path=str(tmp_path))
    with pytest.raises(ConfigError, match="Known: gsm8k, generated"):
        data.build("math", tmp_path)


@pytest.mark.skipif(not REAL_GSM8K.is_dir(), reason="no copy of GSM8K (set RL_ACCEL_GSM8K to its folder)")
def test_the_real_gsm8k_is_read_whole_and_its_own_answers_are_right(tmp_path):
    train, val = map(read, data.build("gsm8k", tmp_path, path=str(REAL_GSM8K)))
    assert (len(train), len(val)) == (7473, 1319)
    answers = [json.loads(line)["answer"] for line in (REAL_GSM8K / "test.jsonl").open()]
    scores = [
        compute_score("openai/gsm8k", answer, row["reward_model"]["ground_truth"])["score"]
        for answer, row in zip(answers, val, strict=True)
    ]
    assert sum(scores) == len(scores)


def test_a_wrong_or_missing_number_scores_zero():
    assert compute_score("x", "so it is\n#### 5", "4")["acc"] == 0.0
    assert compute_score("x", "it is 4", "4")["acc"] == 0.0
    assert compute_score("x", "#### 4", "4") == {"score": 1.0, "acc": 1.0}
