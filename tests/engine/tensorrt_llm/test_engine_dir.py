"""One directory, several builders: who may write what, what is kept, and when it becomes an engine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint.output_dir import JOURNAL, MARKER, OutputDir, entries
from arctic_trt.engine.tensorrt_llm.engine_dir import RankRecord, SharedEngineDir
from arctic_trt.errors import CheckpointError, RefusedError
from tests.support.jobs import tree

FINGERPRINT = {"tensorrt_llm": "1.2.1", "arguments": "--moe_plugin auto"}
Open = Callable[..., SharedEngineDir]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "checkpoint" / f"rank{rank}.safetensors" for rank in range(3)]
    paths[0].parent.mkdir()
    for rank, path in enumerate(paths):
        path.write_bytes(bytes([rank]) * 100)
    return paths


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine"


@pytest.fixture
def engine(path: Path, shards: list[Path]) -> Open:
    def make(overwrite: bool = False, **changes: Any) -> SharedEngineDir:
        return SharedEngineDir(path, {**FINGERPRINT, **changes}, shards, overwrite=overwrite)

    return make


def build(out: SharedEngineDir, shards: list[Path], *ranks: int) -> None:
    """What a worker leaves, accepted."""
    for rank in ranks:
        assert out.take(rank)
        scratch = out.scratch(rank)
        (scratch / f"rank{rank}.engine").write_bytes(bytes([rank]) * (10 + rank))
        (scratch / "rank.noise").write_text("not part of an engine")
        if rank == 0:
            (scratch / "config.json").write_text(json.dumps({"pretrained_config": {}, "build_config": {}}))
        out.accept(rank, hashlib.sha256(shards[rank].read_bytes()).hexdigest(), 1.5)


def whole(engine: Open, shards: list[Path]) -> None:
    with engine() as out:
        build(out, shards, 0, 1, 2)
        assert out.complete([])


def test_an_engine_appears_when_all_ranks_are_there(engine: Open, shards: list[Path], path: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    with engine() as out:
        build(out, shards, 0, 2)
        assert not out.complete([tokenizer])
    assert not (path / "config.json").exists() and (path / MARKER).exists()
    with engine() as out:
        assert sorted(out.finished()) == [0, 2]
        build(out, shards, 1)
        assert out.complete([tokenizer])
    names = ["build.json", "config.json", "rank0.engine", "rank1.engine", "rank2.engine", "tokenizer.json"]
    assert entries(path) == names
    record = json.loads((path / "build.json").read_text())
    assert record["fingerprint"] == FINGERPRINT and [rank["rank"] for rank in record["ranks"]] == [0, 1, 2]
    assert record["ranks"][1]["engine_bytes"] == 11


def test_two_builders_share_the_ranks(engine: Open, shards: list[Path]) -> None:
    with engine() as here, engine() as there:
        assert here.take(0) and not there.take(0)
        assert there.take(1)
        build(here, shards, 2)
        assert sorted(there.finished()) == [2]
    with engine() as later:
        assert later.take(0) and later.take(1), "a builder that is gone holds nothing"


def test_whoever_is_last_completes_and_the_others_notice(engine: Open, shards: list[Path]) -> None:
    with engine() as here, engine() as there:
        build(here, shards, 0, 1)
        build(there, shards, 2)
        assert there.complete([]) and here.complete([])


def test_a_finished_engine_of_the_same_inputs_needs_nothing(engine: Open, shards: list[Path], path: Path) -> None:
    whole(engine, shards)
    records = engine().completed()
    assert records is not None and sorted(records) == [0, 1, 2]
    assert engine(tensorrt_llm="1.2.0").completed() is None
    os.utime(shards[1])
    assert engine().completed() is not None, "touched, but the bytes are the same"
    shards[1].write_bytes(b"x" * 100)
    assert engine().completed() is None


@pytest.mark.parametrize("damage", ["rank1.engine", "build.json", "config.json"])
def test_a_finished_engine_that_lacks_a_file_is_not_finished(engine: Open, shards: list[Path], path: Path, damage: str) -> None:
    whole(engine, shards)
    (path / damage).unlink()
    assert engine().completed() is None


def test_an_engine_cut_short_is_not_finished(engine: Open, shards: list[Path], path: Path) -> None:
    whole(engine, shards)
    (path / "rank1.engine").write_bytes(b"")
    assert engine().completed() is None


def test_a_finished_engine_is_not_touched_without_overwrite(engine: Open, shards: list[Path], path: Path) -> None:
    whole(engine, shards)
    before = tree(path)
    with pytest.raises(RefusedError, match="is not empty"):
        engine(tensorrt_llm="1.2.0").__enter__()
    assert tree(path) == before


def test_overwriting_keeps_the_ranks_that_still_hold(engine: Open, shards: list[Path], path: Path) -> None:
    whole(engine, shards)
    shards[1].write_bytes(b"x" * 100)
    with engine(overwrite=True) as out:
        assert sorted(out.finished()) == [0, 2] and not (path / "config.json").exists()
        build(out, shards, 1)
        assert out.complete([])
    assert engine().completed() is not None


def test_overwriting_with_other_inputs_keeps_nothing(engine: Open, shards: list[Path], path: Path) -> None:
    whole(engine, shards)
    with engine(overwrite=True, tensorrt_llm="1.2.0") as out:
        assert out.finished() == {} and not list(path.glob("rank*"))


def test_a_finished_rank_counts_only_while_its_shard_is_the_same(engine: Open, shards: list[Path]) -> None:
    with engine() as out:
        build(out, shards, 0, 1)
    shards[0].write_bytes(b"y" * 100)
    with engine() as out:
        assert sorted(out.finished()) == [1]


def test_unfinished_work_of_other_inputs_is_refused(engine: Open, shards: list[Path], path: Path) -> None:
    with engine() as out:
        build(out, shards, 0)
    with pytest.raises(RefusedError, match=r"unfinished work that differs in tensorrt_llm \(1\.2\.1 then, 1\.2\.0 now\)"):
        engine(tensorrt_llm="1.2.0").__enter__()
    with engine(tensorrt_llm="1.2.0", overwrite=True) as out:
        assert out.finished() == {}


def test_a_beginning_without_a_finished_rank_holds_nobody_up(engine: Open, path: Path) -> None:
    with engine() as out:
        out.take(0)
        (out.scratch(0) / "rank0.engine").write_bytes(b"half")
    with engine(tensorrt_llm="1.2.0") as out:
        assert out.finished() == {}
        assert json.loads((path / MARKER).read_text())["fingerprint"]["tensorrt_llm"] == "1.2.0"


def test_nobody_begins_something_else_while_others_build(engine: Open) -> None:
    with engine() as out:
        out.take(0)
        with pytest.raises(RefusedError, match="Another process is building something else"):
            engine(tensorrt_llm="1.2.0").__enter__()


def test_a_directory_that_is_being_quantized_into_is_refused(engine: Open, path: Path) -> None:
    with OutputDir(path, kind="checkpoint", fingerprint={"model": "x"}), pytest.raises(RefusedError, match="Another process"):
        engine().__enter__()


def test_an_unfinished_checkpoint_is_not_cleared_away(engine: Open, path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), OutputDir(path, kind="checkpoint", fingerprint={"model": "x"}) as checkpoint:
        (path / "rank0.safetensors").write_bytes(b"work")
        checkpoint.keep = True
        raise KeyboardInterrupt
    with pytest.raises(RefusedError, match="unfinished work"):
        engine().__enter__()
    assert (path / "rank0.safetensors").exists()


def test_foreign_files_are_refused(engine: Open, path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(RefusedError, match=r"already holds thesis\.tex"):
            engine(overwrite=overwrite).__enter__()
    assert entries(path) == ["thesis.tex"]


def test_what_is_not_all_there_is_not_accepted(engine: Open) -> None:
    with engine() as out:
        scratch = out.scratch(0)
        (scratch / "rank0.engine").write_bytes(b"x")
        with pytest.raises(CheckpointError, match=r"rank 0 was built, but there is no config\.json"):
            out.accept(0, "d", 1.0)
        with pytest.raises(CheckpointError, match=r"there is no rank1\.engine"):
            out.scratch(1)
            out.accept(1, "d", 1.0)
        assert out.finished() == {}


def test_managed_weights_travel_with_their_rank(engine: Open, path: Path) -> None:
    with engine() as out:
        scratch = out.scratch(1)
        for name in ("rank1.engine", "rank1_managed_weights.safetensors"):
            (scratch / name).write_bytes(b"x")
        out.accept(1, "d", 1.0)
    assert (path / "rank1_managed_weights.safetensors").exists()


def test_a_crash_while_completing_is_made_good(engine: Open, shards: list[Path], path: Path) -> None:
    with engine() as out:
        build(out, shards, 0, 1, 2)
        saved = tree(path)
        assert saved is not None and out.complete([])
    shutil.copy(path / "config.json", path / JOURNAL) if (path / JOURNAL).exists() else None
    (path / JOURNAL).mkdir(exist_ok=True)
    for name, data in saved.items():  # as if config.json had been moved, and nothing after that
        if data is not None and name != f"{JOURNAL}/config.json":
            (path / name).write_bytes(data)
    with engine() as out:
        assert sorted(out.finished()) == [0, 1, 2] and out.complete([])
    assert (path / "config.json").exists() and not (path / MARKER).exists() and not (path / JOURNAL).exists()


def test_a_record_knows_its_shard_by_time_or_by_bytes(shards: list[Path]) -> None:
    stat = shards[0].stat()
    digest = hashlib.sha256(shards[0].read_bytes()).hexdigest()
    record = RankRecord(rank=0, digest=digest, shard_bytes=100, shard_mtime_ns=stat.st_mtime_ns, engine_bytes=1, seconds=1.0)
    assert record.is_of(shards[0])
    os.utime(shards[0], ns=(1, 1))
    assert record.is_of(shards[0])
    shards[0].write_bytes(b"z" * 100)
    assert not record.is_of(shards[0])
    shards[0].write_bytes(b"z" * 99)
    assert not record.is_of(shards[0])
