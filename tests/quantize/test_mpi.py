"""Several processes write the bytes that one writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.errors import RefusedError
from tests.conftest import Finished
from tests.faults.dying import Death, run_and_die
from tests.support.checkpoints import SMALL, TINY, Config, random_checkpoint, random_ids, write_samples
from tests.support.engines import ROOT, mpi_environ, mpirun
from tests.support.jobs import Job, digests, lasting, quantize, read_report, spilling_budget

pytestmark = pytest.mark.mpi

RANKS = 4


@dataclass(frozen=True)
class Case:
    """A quantization that does not divide evenly among four, in one way or another."""

    config: Config = field(default_factory=lambda: TINY)
    lengths: tuple[int, ...] = (24, 24, 24, 17, 17)
    recipe: dict[str, Any] = field(default_factory=lambda: {"tp_size": 2})
    spill: bool = False
    die_after: int | None = None
    """The layer after which an earlier run, of one process, was killed."""


CASES = {
    "two ranks": Case(),
    "hidden states on disk": Case(spill=True),
    "fewer batches than processes": Case(lengths=(9,)),
    "fewer experts than processes": Case({**TINY, "num_local_experts": 3}),
    "two batches, pipeline stages, expert parallelism": Case(
        {**TINY, "num_hidden_layers": 3},
        (16, 16, 16, 9),
        {"tp_size": 4, "pp_size": 2, "moe_ep_size": 2, "batch_size": 3},
    ),
    "some of it in bf16": Case(recipe={"tp_size": 2, "exclude_modules": ["transformer.layers.1.mlp", "*.attention.dense"]}),
    "no calibration": Case(recipe={"tp_size": 2, "qformat": "full_prec"}),
    "top 1": Case({**TINY, "num_experts_per_tok": 1}),
    "begun by one process": Case({**SMALL, "num_hidden_layers": 5}, die_after=2),
    "begun by one process, on disk": Case({**SMALL, "num_hidden_layers": 5}, die_after=2, spill=True),
}


def recipe_of(case: Case, path: Path) -> dict[str, Any]:
    model_dir = path / "model"
    if not model_dir.exists():
        random_checkpoint(model_dir, case.config)
        write_samples(path / "calib.jsonl", random_ids(case.config["vocab_size"], list(case.lengths)))
    return {"model_dir": model_dir, "calib_dataset": str(path / "calib.jsonl"), **case.recipe}


def argv_of(case: Case, path: Path, processes: int) -> list[str]:
    recipe = {**recipe_of(case, path), "output_dir": path / "four"}
    if case.spill:
        recipe["memory_budget"] = str(spilling_budget(recipe, processes))
    each = [(name, one) for name, value in recipe.items() for one in (value if isinstance(value, list) else [value])]
    return ["quantize", "--no_report", *(word for name, value in each for word in (f"--{name}", str(value)))]


def test_four_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    """All the cases in one MPI job, the first of them twice."""
    paths = {name: tmp_path / str(number) for number, name in enumerate(CASES)}
    for name, case in CASES.items():
        if case.die_after is not None:
            argv = argv_of(case, paths[name], 1)
            assert run_and_die([*argv, "-q"], Death(name=f"/layer_{case.die_after:04d}.json", after=True)).code < 0
    plan = tmp_path / "plan.json"
    argvs = [argv_of(case, paths[name], RANKS) for name, case in CASES.items()]
    plan.write_text(json.dumps([*argvs, argvs[0]]))
    job = mpirun(RANKS, "-m", "tests.support.many_runs", plan)
    assert job.code == 0, job.err
    assert json.loads(plan.with_suffix(".done").read_text()) == [0] * (len(CASES) + 1)
    assert job.err.count("layer 1/2 ") == sum(case.config["num_hidden_layers"] == 2 for case in CASES.values()), "rank 0 speaks"
    assert job.err.count("already holds exactly this checkpoint; nothing to do") == 1
    assert job.out.count("Quantized\n") == len(CASES) + 1
    for name, case in CASES.items():
        compare(name, case, paths[name])


def compare(name: str, case: Case, path: Path) -> None:
    alone = quantize(output_dir=path / "one", **recipe_of(case, path))
    together = read_report(path / "four")
    assert lasting(path / "four") == lasting(path / "one"), name
    done = 0 if case.die_after is None else case.die_after + 1
    assert (together["resumed_layers"], together["processes"]) == (done, RANKS), name
    assert together["hidden_states_on_disk"] is case.spill, name
    for key in (
        "tokens_per_expert",
        "scales",
        "expert_scales",
        "config",
        "experts_without_tokens",
        "tensors",
        "calibration_tokens",
        "fingerprint",
    ):
        assert together[key] == alone[key], f"{name}: {key}"
    if not done:
        assert together["bytes_written"] == alone["bytes_written"], f"{name}: each byte is written by one of them"
        shared = together["bytes_read"] - alone["bytes_read"]
        assert 0 <= shared <= (RANKS - 1) * alone["bytes_read"] / 2, f"{name}: an expert is read by one of them"


def test_workers_are_processes_on_this_machine(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "arctic_trt", *job.argv("--json", "--workers", 2)],
        cwd=ROOT,
        env=mpi_environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["processes"] == 2 and report["recipe"]["workers"] == 2
    assert "layer 2/2" in done.stderr
    found = lasting(job.output_dir)
    assert arctic_trt(*job.argv("-q")).code == 0, "the number of workers is no part of the job"
    assert arctic_trt(*job.argv("-q", "--overwrite")).code == 0
    assert lasting(job.output_dir) == found


@pytest.mark.parametrize(
    ("rank", "call", "count"), [(0, "fdatasync", 9), (1, "pwrite", 20)], ids=["first, when syncing", "second, when writing"]
)
def test_a_rank_that_dies_takes_the_others_along_and_one_process_resumes(
    rank: int, call: str, count: int, job: Job, arctic_trt: Callable[..., Finished], tmp_path: Path
) -> None:
    job.model_dir = random_checkpoint(tmp_path / "layered", {**SMALL, "num_hidden_layers": 6})
    done = mpirun(2, "-m", "tests.faults.dying_rank", rank, call, count, *job.argv("-q"))
    assert done.code != 0 and not (job.output_dir / "config.json").exists()
    assert arctic_trt(*job.argv("-q")) == Finished(0, "", "")
    assert 0 < read_report(job.output_dir)["resumed_layers"] < 6
    found = digests(job.output_dir)
    assert arctic_trt(*job.argv("-q", "--overwrite")).code == 0
    assert digests(job.output_dir) == found


def test_a_bad_weight_is_reported_once_by_the_process_that_met_it(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    good = job.home(name).read_bytes()
    job.edit_shard(name, lambda tensors: tensors[name].view(-1)[3:4].fill_(float("nan")))
    done = mpirun(2, "-m", "arctic_trt", *job.argv("-q"))
    assert (done.code, done.out) == (1, "")
    [complaint] = re.findall(r"arctic-trt: error: (.*)", done.err)
    assert complaint.startswith(f"rank 1: {name} contains NaN or infinity.")
    assert not (job.output_dir / "config.json").exists()
    job.home(name).write_bytes(good)
    assert arctic_trt(*job.argv("-q", "--overwrite")) == Finished(0, "", "")


def test_a_refusal_is_said_once(job: Job) -> None:
    job.output_dir.mkdir()
    (job.output_dir / "notes.txt").touch()
    done = mpirun(2, "-m", "arctic_trt", *job.argv("-q"))
    assert (done.code, done.out) == (3, "")
    [complaint] = re.findall(r"arctic-trt: error: (.*)", done.err)
    assert "already holds notes.txt" in complaint


def test_a_model_of_three_experts_a_token_is_left_to_one_process(tmp_path: Path) -> None:
    from arctic_trt.launch import Launch
    from arctic_trt.quantize.mpi import join_team

    model_dir = random_checkpoint(tmp_path / "model", {**SMALL, "num_experts_per_tok": 3})
    samples = write_samples(tmp_path / "calib.jsonl", random_ids(64, [5]))
    with pytest.raises(RefusedError, match="Run it as one process"):
        join_team(Launch(0, 2, 2), 3)
    assert quantize(model_dir, tmp_path / "out", tp_size=1, calib_dataset=str(samples))["processes"] == 1
