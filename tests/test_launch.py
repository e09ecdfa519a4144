"""What launchers say in the environment, and what follows from it."""

from __future__ import annotations

import pytest

from arctic_trt import launch
from arctic_trt.errors import RefusedError
from arctic_trt.launch import (
    Launch,
    become_mpirun,
    end_job,
    find_launch,
    is_leader,
    tie_to_launcher,
    wait_for_leader,
    without_launcher,
)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, None),  # a batch script's own shell
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            Launch(3, 8, 4),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, Launch(1, 2, 2)),
        ({"PMIX_RANK": "5"}, Launch(5, None, None)),
        ({"PMIX_RANK": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, Launch(5, 8, None)),
        ({"OMPI_COMM_WORLD_RANK": "", "PMIX_RANK": "2"}, Launch(2, None, None)),
    ],
)
def test_find_launch(environ: dict[str, str], expected: Launch | None) -> None:
    assert find_launch(environ) == expected


@pytest.mark.parametrize(
    ("tasks", "expected"), [("8(x2)", 8), ("4", 4), ("4,3", 4), ("2(x3),1", 2), ("", None), ("many", None), ("4,", None)]
)
def test_slurm_says_how_many_tasks_a_node_has(tasks: str, expected: int | None) -> None:
    step = {"PMIX_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": tasks}
    assert find_launch(step) == Launch(1, 8, expected)


def test_a_child_that_is_no_rank_keeps_everything_else() -> None:
    environ = {"PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_btl": "tcp", "PATH": "/bin", "SLURM_JOB_ID": "7"}
    assert without_launcher(environ) == {"OMPI_MCA_btl": "tcp", "PATH": "/bin", "SLURM_JOB_ID": "7"}
    assert find_launch(without_launcher(environ)) is None


def test_a_process_started_by_hand_speaks_and_is_tied_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launch.RANK_KEYS, *launch.SIZE_KEYS, "HOME"):
        monkeypatch.delenv(name, raising=False)
    tie_to_launcher()
    end_job(1)
    assert is_leader() and wait_for_leader() is None
    assert "HOME" not in launch.os.environ


def test_a_follower_is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert wait_for_leader() is None and is_leader()
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert wait_for_leader() == 3 and not is_leader()
    assert waited == [pytest.approx(launch.PATIENCE_BEFORE_MPI_S + 0.3)]


def test_ranks_are_started_by_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(launch.os, "execvp", lambda program, words: called.append((program, words)))
    become_mpirun(3, ["quantize", "--workers", "3"])
    [(program, words)] = called
    assert program.endswith("mpirun") and words[:3] == [program, "-n", "3"]
    assert words[-5:] == ["-m", "arctic_trt", "quantize", "--workers", "3"]


def test_without_mpirun_there_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(launch.os, "execvp", absent)
    with pytest.raises(RefusedError, match=r"Starting 2 processes needs mpirun, .* pip install 'arctic-trt\[mpi\]'"):
        become_mpirun(2, ["quantize"])
