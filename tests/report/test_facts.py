"""What the doctor looks at, on made-up file systems and with made-up programs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arctic_trt import machine
from arctic_trt.report import facts as module
from arctic_trt.report.facts import (
    PACKAGES,
    Limits,
    file_system_kind,
    find_container,
    find_disk,
    find_limits,
    find_memory,
    find_mpi,
    find_processor,
    find_system,
    find_torch_cuda,
    gather,
    parse_mpi_version,
)

REPOSITORY = Path(__file__).parents[2]
MOUNTS = """\
overlay / overlay rw,relatime 0 0
proc /proc proc rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
/dev/nvme0n1p1 /data ext4 rw 0 0
nas:/models /data/models nfs4 rw 0 0
lustre /my\\040scratch lustre rw 0 0
/dev/sdb1 /data xfs rw 0 0
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An empty machine, with the files that are given by path and content."""
    monkeypatch.setattr(module, "ROOT", tmp_path)

    def make(**files: str) -> Path:
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return make


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put shell scripts on an otherwise empty path."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def make(name: str, body: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "overlay"),
        ("/home/me", "overlay"),
        ("/data", "xfs"),
        ("/database", "overlay"),
        ("/data/models/arctic", "nfs4"),
        ("/data/modelsx", "xfs"),
        ("/my scratch/engine", "lustre"),
        ("/dev/shm", "tmpfs"),
    ],
)
def test_the_file_system_that_holds_a_path(path: str, kind: str) -> None:
    assert file_system_kind(Path(path), MOUNTS) == kind


def test_a_file_system_that_nobody_names() -> None:
    assert file_system_kind(Path("/data"), "") == "unknown"
    assert file_system_kind(Path("/data"), "garbage\n\n") == "unknown"


def test_the_disk_below_a_directory_that_is_still_to_be_made(tmp_path: Path) -> None:
    disk = find_disk(tmp_path / "a" / "b" / "c")
    assert (disk.path, disk.writable) == (str(tmp_path / "a" / "b" / "c"), True)
    assert 0 < disk.free_bytes <= disk.total_bytes and disk.kind != "unknown"
    assert not (tmp_path / "a").exists(), "nothing is made"
    assert find_disk(Path()).path == "."


def test_a_disk_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not find_disk(tmp_path).writable


def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr("shutil.disk_usage", fail)
    assert (find_disk(tmp_path).free_bytes, find_disk(tmp_path).total_bytes) == (0, 0)


X86 = (
    "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8480C\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_bf16 amx_tile\n\n"
)
ARM = "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd bf16 i8mm sve\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name", "instructions"),
    [
        (X86 * 2, "Intel(R) Xeon(R) Platinum 8480C", ("avx2", "avx512f", "avx512_bf16", "amx_bf16")),
        (ARM, "aarch64", ("bf16", "i8mm", "sve")),
        ("", "aarch64", ()),
        ("model name\t:\nflags\t:\n", "aarch64", ()),
    ],
)
def test_the_processor(cpuinfo: str, name: str, instructions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert find_processor(cpuinfo) == (name, instructions)


def test_the_system(root: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.release", lambda: "6.8.0")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert find_system() == "Linux 6.8.0, x86_64"
    root(**{"etc__os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\nVERSION_ID="24.04"\n'})
    assert find_system() == "Ubuntu 24.04.3 LTS, Linux 6.8.0, x86_64"


@pytest.mark.parametrize(
    ("files", "environ", "kind"),
    [
        ({}, {}, None),
        ({".dockerenv": ""}, {}, "docker"),
        ({".dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({"run__.containerenv": "", ".dockerenv": ""}, {}, "podman"),
        ({}, {"APPTAINER_CONTAINER": "image.sif"}, "apptainer"),
        ({}, {"SINGULARITY_CONTAINER": "image.sif"}, "apptainer"),
        ({"proc__1__cgroup": "0::/kubepods/pod1\n"}, {}, "kubepods"),
        ({"proc__1__cgroup": "0::/init.scope\n"}, {}, None),
        ({}, {"container": "systemd-nspawn"}, "systemd-nspawn"),
    ],
)
def test_the_kind_of_container(
    files: dict[str, str], environ: dict[str, str], kind: str | None, root: Callable[..., Path]
) -> None:
    root(**files)
    assert find_container(environ) == kind


def test_limits_are_those_of_ulimit(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = {resource.RLIMIT_MEMLOCK: resource.RLIM_INFINITY, resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_STACK: 8 << 20}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (soft[what], resource.RLIM_INFINITY))
    assert find_limits() == Limits(memlock_bytes=None, open_files=1024, stack_bytes=8 << 20)


def test_a_machine_that_does_not_say_has_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert find_memory() == (0, 0)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("cuda: Optional[str] = None", None),
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ("cuda = '12.8'", "12.8"),
        ("cuda_something = '1.0'", None),
        ("debug = False", None),
    ],
)
def test_the_cuda_version_of_torch(line: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('nobody may import it')\n")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.9.1'\n{line}\nhip: Optional[str] = '6.4'\n")
    script = "import sys; sys.path.insert(0, sys.argv[1]); from arctic_trt.report.facts import find_torch_cuda as f; print(f())"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout.strip() == str(version)


def test_no_torch_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_torch_cuda() is None


HYDRA = "HYDRA build details:\n    Version:                                 4.1.2\n    Release Date:  Wed\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n", ("Open MPI", "5.0.11")),
        ("mpirun (Open MPI) 4.1.4rc1\n", ("Open MPI", "4.1.4rc1")),
        ("mpirun (OpenRTE) 4.0.3\n", ("Open MPI", "4.0.3")),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307\n", ("Intel MPI", "2021.9")),
        (HYDRA, ("MPICH", "4.1.2")),
        ("", (None, None)),
        ("usage: mpirun\n", (None, None)),
    ],
)
def test_whose_launcher_it_is(text: str, expected: tuple[str | None, str | None]) -> None:
    assert parse_mpi_version(text) == expected


def test_no_launcher(programs: Callable[[str, str], Path]) -> None:
    mpi = find_mpi()
    assert (mpi.mpirun, mpi.implementation, mpi.version, mpi.beside_python) == (None, None, None, None)
    assert (mpi.slurm, mpi.slurm_pmix) == (False, False)


def test_the_launcher_on_path_and_the_one_beside_python(programs: Callable[[str, str], Path]) -> None:
    mpirun = programs("mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    beside = Path(sys.executable).parent / "mpirun"
    beside.parent.mkdir(parents=True)
    beside.touch()
    mpi = find_mpi()
    assert (mpi.mpirun, mpi.implementation, mpi.version) == (str(mpirun), "Open MPI", "4.1.4")
    assert mpi.beside_python == str(beside)


def test_a_launcher_that_insists_on_a_home(programs: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    programs("mpirun", '[ -n "$HOME" ] && echo "mpirun (Open MPI) 5.0.11"')
    monkeypatch.delenv("HOME")
    assert find_mpi().version == "5.0.11"


@pytest.mark.parametrize("body", ["exit 1", "exec /bin/sleep 60"])
def test_a_launcher_that_does_not_answer(
    body: str, programs: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASK_PATIENCE_S", 0.2)
    mpirun = programs("mpirun", body)
    mpi = find_mpi()
    assert (mpi.mpirun, mpi.implementation, mpi.version) == (str(mpirun), None, None)


@pytest.mark.parametrize(
    ("plugins", "pmix"),
    [("MPI plugin types are...\n\tnone\n\tpmix\nspecific pmix plugin versions available: pmix_v4", True), ("\tpmi2", False)],
)
def test_slurm_with_and_without_pmix(plugins: str, pmix: bool, programs: Callable[[str, str], Path]) -> None:
    programs("srun", f"echo '{plugins}' >&2")
    mpi = find_mpi()
    assert (mpi.slurm, mpi.slurm_pmix) == (True, pmix)


def test_a_job_of_slurm_without_its_programs(programs: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert (find_mpi().slurm, find_mpi().slurm_pmix) == (True, False)


ANSWERS = """\
case "$*" in
  *fabric.state*) echo Completed; echo Completed ;;
  *--query-gpu*) echo '0, GPU-a, NVIDIA H100, 9.0, 81559, 81000, 580.1'; echo '1, GPU-b, NVIDIA H100, 9.0, 81559, 81000, 580.1' ;;
  topo*) printf '\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\nGPU1\\tNV18\\t X \\n' ;;
  *) echo '| Driver Version: 580.1   CUDA Version: 13.0 |' ;;
esac"""


def test_everything_is_gathered(programs: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs("nvidia-smi", ANSWERS)
    programs("mpirun", "echo 'mpirun (Open MPI) 5.0.11'")
    programs("tritonserver", "")
    programs("cc", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = gather(tmp_path)
    assert found.nvidia_smi and [gpu.sm for gpu in found.gpus] == [90, 90]
    assert (found.driver_cuda, found.links, found.fabric) == ("13.0", "NV18 between all 2", "Completed")
    assert found.mpi.version == "5.0.11" and found.tritonserver == str(tmp_path / "programs" / "tritonserver")
    assert found.c_compiler == str(tmp_path / "programs" / "cc")
    assert tuple(found.packages) == PACKAGES and found.packages["torch"]
    assert found.disk.path == str(tmp_path) and found.cores >= 1
    assert 0 < found.memory_free_bytes <= found.memory_total_bytes
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = gather(tmp_path)
    assert (hidden.gpus, hidden.nvidia_smi, hidden.cuda_visible_devices, hidden.links) == ((), True, "", None)


def test_a_broken_driver_is_reported_once(
    programs: Callable[[str, str], Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    programs("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert gather(tmp_path).gpus == ()
    assert caplog.text.count("NVIDIA-SMI has failed") == 1
