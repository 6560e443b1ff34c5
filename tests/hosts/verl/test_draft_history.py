"""Drafting history between engines and checkpoints.

Engines are real processes with real drafters, and Ray is real; what is left out of an engine is the model, and of the
trainer all but the names that `DraftTrainer` reads.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def pool():
    """Actors that no test uses at present; starting one takes seconds."""
    import ray

    sys.path.insert(0, str(HERE))
    import draft_engines

    env = {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    actor = ray.remote(num_cpus=0)(draft_engines.Engine)
    yield [actor.remote() for _ in range(4)]
    ray.shutdown()
    sys.path.remove(str(HERE))


@pytest.fixture
def engines(pool):
    """Start engines by their settings."""
    used: list = []

    def start(number: int, **settings) -> list:
        found = [pool.pop() for _ in range(number)]
        used.extend(found)
        for server in found:
            call(server, "begin", **settings)
        return found

    yield start
    pool.extend(used)


@pytest.fixture
def trainer(tmp_path):
    """Of two steps an epoch."""

    def make(servers: list, step: int = 2, resumed_from: int = -1):
        from rl_accel.draft.config import DraftConfig
        from rl_accel.draft.feature import FEATURE
        from rl_accel.draft.hosts.trainer import DraftTrainer
        from rl_accel.hosts.verl.engines import RolloutEngines, add_up

        replicas = [SimpleNamespace(servers=[server]) for server in servers]
        found = SimpleNamespace(
            config=SimpleNamespace(
                trainer=SimpleNamespace(default_local_dir=str(tmp_path / "run"), resume_mode="auto")
            ),
            llm_server_manager=SimpleNamespace(get_replicas=lambda: replicas),
            steps_per_epoch=2,
            global_steps=step,
            resumed_from_step=resumed_from,
        )
        found.engines = RolloutEngines(found)
        found.feature_folder = lambda name: tmp_path / "run" / f"global_step_{found.global_steps}" / "rl_accel" / name
        found.history = DraftTrainer(FEATURE, DraftConfig(method="das"), found)
        found.metrics = lambda: {
            **add_up(answer["features"] for answer in found.engines.ask("rl_accel_drain")),
            **add_up([{"draft": found.history.metrics()}]),
        }
        return found

    return make


def call(actor, method: str, *args, **settings):
    import ray

    return ray.get(getattr(actor, method).remote(*args, **settings))


def text(number: int) -> list[int]:
    return list(range(1000 * number + 10, 1000 * number + 110))


def test_engines_learn_from_each_other_without_a_common_folder(engines, trainer, tmp_path) -> None:
    """Three engines with a problem each: in the next epoch each one drafts for all of them."""
    servers = engines(3)
    train = trainer(servers)
    for i, server in enumerate(servers):
        call(server, "sample", f"p{i}", text(i))
    train.global_steps = 1
    train.history.on_step_end()
    assert all(call(server, "segments") == [] for server in servers), "the epoch has a second step"
    train.global_steps = 2
    train.history.on_step_end()
    for server in servers:
        assert sorted(s["foreign"] for s in call(server, "segments")) == [False, True, True]
        for i in range(3):
            assert call(server, "sample", f"p{i}", text(i)[:2]) == text(i)[2:10]
    metrics = train.metrics()
    assert metrics["rl_accel/draft/history_not_shared"] == 0
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_what_a_checkpoint_packed_is_shared_too(engines, trainer) -> None:
    """A checkpoint in an epoch's last step packs what is done, before the epoch is closed."""
    servers = engines(2)
    train = trainer(servers)
    call(servers[0], "sample", "p0", text(0))
    train.history.save()
    call(servers[0], "sample", "p1", text(1))
    train.history.on_step_end()
    assert call(servers[1], "sample", "p0", text(0)[:2]) == text(0)[2:10]
    assert call(servers[1], "sample", "p1", text(1)[:2]) == text(1)[2:10]
    train.global_steps = 4
    train.history.on_step_end()
    for server in servers:
        of_first_epoch = [s["num_tokens"] for s in call(server, "segments") if s["epoch"] == 0]
        assert of_first_epoch == [100, 100], "and once only"


def test_a_resume_at_the_end_of_an_epoch_is_as_if_there_was_none(engines, trainer) -> None:
    """The checkpoint is older than the close of its epoch, so what was not shared then is shared after the resume."""
    first = engines(2)
    train = trainer(first)
    for i, server in enumerate(first):
        call(server, "sample", f"p{i}", text(i))
    train.history.save()
    second = engines(2)
    resumed = trainer(second, step=2, resumed_from=2)
    resumed.history.restore()
    train.history.on_step_end()
    for old, new in zip(first, second, strict=True):
        assert call(old, "segments") == call(new, "segments")
        assert len(call(new, "segments")) == 2
        assert call(new, "sample", "p0", text(0)[:2]) == text(0)[2:10]
    assert resumed.metrics()["rl_accel/draft/history_refused"] == 0


def test_another_number_of_engines_goes_on_with_the_same_history(engines, trainer) -> None:
    """Two snapshots for three engines, and then for one."""
    servers = engines(3)
    train = trainer(servers[:2])
    for i in range(2):
        call(servers[i], "sample", f"p{i}", text(i))
    train.history.on_step_end()
    train.history.save()
    for number in (3, 1):
        for server in servers:
            call(server, "begin")
        resumed = trainer(servers[:number], step=2, resumed_from=2)
        resumed.history.restore()
        for server in servers[:number]:
            assert len(call(server, "segments")) == 2
            for i in range(2):
                assert call(server, "sample", f"p{i}", text(i)[:2]) == text(i)[2:10]


def test_a_segment_that_an_engine_refuses_is_counted_and_harms_nobody(engines, trainer) -> None:
    """One engine has another tokenizer; the other two share."""
    servers = [*engines(2), *engines(1, tokenizer="another")]
    train = trainer(servers)
    for i, server in enumerate(servers):
        call(server, "sample", f"p{i}", text(i))
    train.history.on_step_end()
    assert [len(call(server, "segments")) for server in servers] == [2, 2, 1]
    metrics = train.metrics()
    assert metrics["rl_accel/draft/history_not_shared"] == 4


def test_what_all_engines_said_may_be_too_much_for_each(engines, trainer) -> None:
    """The limit of 1 MiB holds half of the epoch: each engine keeps its own, and as much of the others' as fits."""
    servers = engines(4, history_gib=1 / 2**10)
    train = trainer(servers)
    for number, server in enumerate(servers):
        for i in range(24):
            call(server, "sample", f"p{number} {i}", [10 + 13 * number + i + 7 * k * k % 100_003 for k in range(1500)])
    train.history.on_step_end()
    for number, server in enumerate(servers):
        segments = call(server, "segments")
        own = sum(s["num_tokens"] for s in segments if not s["foreign"])
        assert own == 24 * 1500, f"engine {number} forgot {24 * 1500 - own} tokens of its own"
        assert 0.7 * 2**20 < sum(s["num_bytes"] for s in segments) <= 2**20
    assert train.metrics()["rl_accel/draft/segments_dropped"] > 0


def test_a_failed_save_stops_nothing_and_is_said(engines, trainer, tmp_path, caplog) -> None:
    """A file where the first engine's snapshot goes; then one where the folder of all goes."""
    servers = engines(2)
    train = trainer(servers)
    for i, server in enumerate(servers):
        call(server, "sample", f"p{i}", text(i))
    folder = tmp_path / "run" / "global_step_2" / "rl_accel" / "draft"
    folder.mkdir(parents=True)
    (folder / "engine000").write_text("")
    train.history.save()
    assert train.metrics()["rl_accel/draft/history_not_saved"] == 1
    assert "engine000" in caplog.text and (folder / "engine001" / "manifest.json").exists()
    shutil.rmtree(folder)
    folder.write_text("")
    train.history.save()
    assert train.metrics()["rl_accel/draft/history_not_saved"] == 2
    folder.unlink()
    train.history.save()
    assert train.metrics()["rl_accel/draft/history_not_saved"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["engine000", "engine001"]


def test_a_snapshot_that_the_trainer_does_not_see_is_said(engines, trainer, tmp_path, caplog, monkeypatch) -> None:
    """An engine on another node wrote to a folder of the same name there."""
    train = trainer(engines(1))
    elsewhere = tmp_path / "other node"
    answer = train.engines.call_each

    def on_another_node(feature, method, arguments):
        return answer(feature, method, [(str(elsewhere / "engine000"),)] if method == "save" else arguments)

    monkeypatch.setattr(train.engines, "call_each", on_another_node)
    train.history.save()
    assert (elsewhere / "engine000" / "manifest.json").exists()
    assert train.metrics()["rl_accel/draft/history_not_saved"] == 1
    assert "not seen here" in caplog.text


def test_what_earlier_runs_left_in_a_checkpoint_is_not_restored(engines, trainer, tmp_path) -> None:
    """An earlier run had more engines, and was killed while it saved."""
    servers = engines(2)
    train = trainer(servers)
    call(servers[0], "sample", "p0", text(0))
    train.history.save()
    folder = tmp_path / "run" / "global_step_2" / "rl_accel" / "draft"
    shutil.copytree(folder / "engine000", folder / "engine002")
    shutil.copytree(folder / "engine000", folder / "engine001.old4194304")
    (folder / "engine003.tmp77").mkdir()
    train.history.save()
    assert sorted(path.name for path in folder.iterdir()) == ["engine000", "engine001", "engine003.tmp77"]
    resumed = trainer(engines(2), step=2, resumed_from=2)
    resumed.history.restore()
    assert resumed.metrics()["rl_accel/draft/history_refused"] == 0


def test_a_checkpoint_of_an_older_version_is_restored(engines, trainer, tmp_path) -> None:
    """It has its snapshots in a folder of another name."""
    servers = engines(1)
    train = trainer(servers)
    call(servers[0], "sample", "p0", text(0))
    train.history.save()
    folder = tmp_path / "run" / "global_step_2"
    (folder / "rl_accel" / "draft").rename(folder / "rl_accel_draft")
    resumed = trainer(engines(1), step=2, resumed_from=2)
    resumed.history.restore()
    assert resumed.metrics()["rl_accel/draft/history_refused"] == 0
    assert len(call(resumed.engines.servers()[0], "segments")) == 1


def test_data_parallel_ranks_never_write_one_path(tmp_path) -> None:
    """Each rank of an engine is told the same path; what each one wrote is what it reads again."""
    sys.path.insert(0, str(HERE))
    try:
        from draft_engines import new_proposer, sample
    finally:
        sys.path.remove(str(HERE))
    path = str(tmp_path / "engine000")
    for rank in range(3):
        proposer = new_proposer(rank=rank)
        sample(proposer, f"p{rank}", text(rank))
        assert "error" not in proposer.save(path)
    assert len(list(tmp_path.iterdir())) == 3
    for rank in range(3):
        proposer = new_proposer(rank=rank)
        assert proposer.open(path)["tokens"] == 100
        assert sample(proposer, f"p{rank}", text(rank)[:2]) == text(rank)[2:10]
    late = new_proposer(rank=7)
    assert late.open(path)["restored"], "a rank more than there were reads what the first one wrote"


def test_an_engine_that_is_gone_stops_the_training(engines, trainer) -> None:
    """The last one: its actor is not there for others."""
    import ray

    servers = engines(2)
    train = trainer(servers)
    ray.kill(servers[1])
    with pytest.raises(ray.exceptions.RayActorError):
        train.history.save()
