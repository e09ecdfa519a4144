"""The batch scripts run for real, with a ``srun`` that writes down what it was asked for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command_lines import after_program, parse

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "scripts" / "slurm"
SCRIPTS = sorted(path.name for path in SLURM.glob("*.sbatch"))

FAKE_SRUN = """#!/usr/bin/env python3
import json, os, signal, sys, time
with open(os.environ["SAW"], "a") as file:
    kept = {key: os.environ[key] for key in ("MPI_LOCALNRANKS", "ARCTIC_DATA") if key in os.environ}
    file.write(json.dumps({"program": os.path.basename(sys.argv[0]), "words": sys.argv[1:], "environment": kept}) + "\\n")
if os.path.basename(sys.argv[0]) == "srun":
    time.sleep(float(os.environ.get("SRUN_SECONDS", "0")))
    sys.exit(int(os.environ.get("SRUN_CODE", "0")))
"""

# sbatch's flags that these scripts may use; a misspelt directive is refused by Slurm only when the job is submitted.
DIRECTIVES = {
    "job-name": r"arctic-\w+",
    "array": r"0-1",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "exclusive": None,
    "mem": r"0",
    "time": r"\d\d:\d\d:\d\d",
    "requeue": None,
    "open-mode": r"append|truncate",
    "signal": r"B:USR1@\d+",
    "propagate": r"NONE",
    "output": r"%x-%(j|A_%a)\.log",
}


class Cluster:
    """A machine that believes to be a Slurm node."""

    def __init__(self, directory: Path) -> None:
        self.saw = directory / "saw"
        tools = directory / "bin"
        tools.mkdir()
        for name in ("srun", "scontrol"):
            (tools / name).write_text(FAKE_SRUN)
            (tools / name).chmod(0o755)
        # Slurm runs a copy that lies somewhere else.
        self.spool = directory / "spool"
        self.spool.mkdir()
        self.environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(directory),
            "SAW": str(self.saw),
            "SLURM_JOB_ID": "77",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "ARCTIC_DATA": "/lustre/my arctic",
        }

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        copy = self.spool / "slurm_script"
        copy.write_bytes((SLURM / script).read_bytes())
        return subprocess.Popen(
            ["bash", str(copy)], env={**self.environment, **environment}, cwd=self.spool, stderr=subprocess.PIPE, text=True
        )

    def run(self, script: str, *, code: int = 0, **environment: str) -> str:
        process = self.start(script, **environment)
        _, errors = process.communicate(timeout=90)
        assert process.returncode == code, errors
        return errors

    def calls(self, program: str) -> list[dict]:  # type: ignore[type-arg]
        lines = self.saw.read_text().splitlines() if self.saw.exists() else []
        return [call for call in map(json.loads, lines) if call["program"] == program]

    def only_step(self) -> tuple[list[str], list[str]]:
        """(flags and launcher, words after arctic-trt) of the one step that was started."""
        [call] = self.calls("srun")
        return call["words"][: call["words"].index("arctic-trt")], after_program(call["words"])


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def directives(script: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (SLURM / script).read_text(), flags=re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_directives_are_sbatchs_own_and_come_before_the_first_command(script: str) -> None:
    text = (SLURM / script).read_text()
    assert len(re.findall(r"^#SBATCH", text, flags=re.MULTILINE)) == len(directives(script))
    for name, value in directives(script).items():
        assert name in DIRECTIVES
        pattern = DIRECTIVES[name]
        assert re.fullmatch(pattern, value) if pattern else value == ""
    first_command = re.search(r"^[^#\n]", text, flags=re.MULTILINE)
    assert first_command
    assert text.rindex("#SBATCH") < first_command.start()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_started_is_a_command_of_ours(cluster: Cluster, script: str) -> None:
    cluster.run(script)
    flags, words = cluster.only_step()
    parse(words)
    assert "--kill-on-bad-exit=1" in flags
    assert all("/lustre/my arctic" in word for word in words if "arctic/" in word or word.endswith("arctic"))


def test_quantize_shares_one_pass_over_the_tasks_of_one_job(cluster: Cluster) -> None:
    cluster.run("quantize.sbatch", SLURM_NTASKS_PER_NODE="2", ARCTIC_PP_SIZE="2", ARCTIC_MEMORY_BUDGET="64GiB")
    [call] = cluster.calls("srun")
    flags, words = cluster.only_step()
    assert {"--mpi=pmix", "--cpu-bind=none"} <= set(flags)
    assert call["environment"] == {"MPI_LOCALNRANKS": "2", "ARCTIC_DATA": "/lustre/my arctic"}
    given = parse(words).params
    assert (given["tp_size"], given["pp_size"], given["memory_budget"]) == (8, 2, "64GiB")
    assert str(given["output_dir"]) == "/lustre/my arctic/arctic-fp8"
    assert "array" not in directives("quantize.sbatch")


@pytest.mark.mpi
def test_quantize_for_real_with_mpirun_in_the_place_of_srun(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text(
        '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec mpirun -n 2 --oversubscribe --allow-run-as-root "$@"\n'
    )
    tools = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    data = tmp_path / "my data"
    tiny = {"ARCTIC_DATA": str(data), "ARCTIC_MODEL_DIR": str(ROOT / "tests" / "data" / "tiny-arctic"), "ARCTIC_CALIB_SIZE": "2"}
    cluster.run("quantize.sbatch", PATH=tools, SLURM_NTASKS_PER_NODE="2", OMP_NUM_THREADS="1", **tiny)
    assert (data / "arctic-fp8" / "config.json").is_file()
    assert len(list((data / "arctic-fp8").glob("rank*.safetensors"))) == 8


@pytest.mark.parametrize(("ranks", "parts"), [(8, 1), (8, 2), (8, 3), (8, 8), (16, 2), (7, 5)])
def test_the_elements_of_the_array_build_every_rank_once(cluster: Cluster, ranks: int, parts: int) -> None:
    for part in range(parts):
        cluster.run("build.sbatch", ARCTIC_RANKS=str(ranks), SLURM_ARRAY_TASK_COUNT=str(parts), SLURM_ARRAY_TASK_ID=str(part))
    built = []
    for call in cluster.calls("srun"):
        given = parse(after_program(call["words"])).params
        first, last = given["ranks"].split("-")
        built += range(int(first), int(last) + 1)
        assert given["backend"] == "tensorrt_llm"
        assert "--mpi=none" in call["words"]
    assert built == list(range(ranks))


def test_an_element_beyond_the_ranks_is_refused(cluster: Cluster) -> None:
    assert "numbered from 0" in cluster.run("build.sbatch", code=2, ARCTIC_PARTS="2", SLURM_ARRAY_TASK_ID="2")
    assert "no ranks" in cluster.run("build.sbatch", code=2, ARCTIC_PARTS="9", SLURM_ARRAY_TASK_ID="0")
    assert cluster.calls("srun") == []


def test_a_part_can_be_built_again_alone(cluster: Cluster) -> None:
    cluster.run("build.sbatch", ARCTIC_PARTS="2", SLURM_ARRAY_TASK_COUNT="1", SLURM_ARRAY_TASK_ID="1")
    assert parse(cluster.only_step()[1]).params["ranks"] == "4-7"


def test_build_without_an_array_builds_all_ranks(cluster: Cluster) -> None:
    cluster.run("build.sbatch")
    assert parse(cluster.only_step()[1]).params["ranks"] == "0-7"


def test_a_recipe_replaces_the_limits(cluster: Cluster) -> None:
    cluster.run("build.sbatch", ARCTIC_RECIPE="engines/h200x8-fp8.yaml")
    given = parse(cluster.only_step()[1]).params
    assert (str(given["config"]), given["max_batch_size"], given["gemm_plugin"]) == ("engines/h200x8-fp8.yaml", None, None)


def test_run_takes_prompts_as_text_or_as_a_file(cluster: Cluster) -> None:
    cluster.run("run.sbatch", ARCTIC_PROMPT='Two words, a $HOME and a "quote"')
    cluster.run("run.sbatch", ARCTIC_INPUT_FILE="/lustre/prompts.jsonl")
    text, file = (parse(after_program(call["words"])).params for call in cluster.calls("srun"))
    assert text["input_text"] == ('Two words, a $HOME and a "quote"',)
    assert (file["input_text"], str(file["input_file"])) == ((), "/lustre/prompts.jsonl")
    assert "--gpu-bind=none" in cluster.calls("srun")[0]["words"]


def test_tasks_gpus_and_ranks_agree() -> None:
    run, build = directives("run.sbatch"), directives("build.sbatch")
    assert run["ntasks-per-node"] == run["gpus-per-node"] == build["gpus-per-node"] == "8"
    assert "${ARCTIC_RANKS:-8}" in (SLURM / "build.sbatch").read_text()
    assert "${ARCTIC_TP_SIZE:-8}" in (SLURM / "quantize.sbatch").read_text()
    assert "gpus-per-node" not in directives("quantize.sbatch")


@pytest.mark.parametrize("script", SCRIPTS)
def test_containers(cluster: Cluster, script: str) -> None:
    cluster.run(script, ARCTIC_CONTAINER="pyxis")
    cluster.run(script, ARCTIC_CONTAINER="apptainer", ARCTIC_IMAGE="/images/a b.sif")
    pyxis, apptainer = (call["words"] for call in cluster.calls("srun"))
    assert "--container-image=/lustre/my arctic/arctic-trt.sqsh" in pyxis
    assert "--container-mounts=/lustre/my arctic:/lustre/my arctic" in pyxis
    at = apptainer.index("apptainer")
    assert apptainer[at : at + 7] == ["apptainer", "exec", "--nv", "--bind", "/lustre/my arctic", "/images/a b.sif", "arctic-trt"]
    assert "docker" in cluster.run(script, code=2, ARCTIC_CONTAINER="docker")


def test_an_environment_is_sourced_without_containers(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "activate").write_text("export MPI_LOCALNRANKS=from-environment\n")
    cluster.run("quantize.sbatch", ARCTIC_ENVIRONMENT=str(tmp_path / "activate"))
    assert cluster.calls("srun")[0]["environment"]["MPI_LOCALNRANKS"] == "from-environment"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_job_ends_as_its_step_does(cluster: Cluster, script: str) -> None:
    cluster.run(script, code=3, SRUN_CODE="3")
    assert cluster.calls("scontrol") == []


@pytest.mark.parametrize("script", [name for name in SCRIPTS if "requeue" in directives(name)])
def test_out_of_time_means_back_into_the_queue(cluster: Cluster, script: str) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"} if "build" in script else {}
    process = warned(cluster, script, **array)
    assert process.returncode == 0
    [call] = cluster.calls("scontrol")
    assert call["words"] == ["requeue", "70_1" if array else "77"]


def test_a_job_does_not_come_back_forever(cluster: Cluster) -> None:
    assert warned(cluster, "quantize.sbatch", SLURM_RESTART_COUNT="20").returncode == 1
    assert cluster.calls("scontrol") == []


def warned(cluster: Cluster, script: str, **environment: str) -> subprocess.Popen[str]:
    """The script after it has been told, as Slurm does, that its time is running out."""
    process = cluster.start(script, SRUN_SECONDS="30", **environment)
    deadline = time.monotonic() + 20
    while not cluster.calls("srun") and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert time.monotonic() - began < 15, "it waited for the step to end on its own"
    return process


def test_only_what_can_resume_is_requeued() -> None:
    assert {name for name in SCRIPTS if "requeue" in directives(name)} == {"build.sbatch", "quantize.sbatch"}
    for name in ("build.sbatch", "quantize.sbatch"):
        assert {"signal", "open-mode"} <= directives(name).keys()
        assert "\nrequeue_on_usr1\n" in (SLURM / name).read_text()
