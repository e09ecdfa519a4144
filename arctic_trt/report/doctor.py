"""Which of arctic-trt's steps work on a machine, and for each that does not, the one thing to do next.

Decisions only: :mod:`arctic_trt.report.facts` looks at the machine, :mod:`arctic_trt.report.obstacles` knows what can be in the
way, and the released Arctic's sizes are those that ``arctic-trt plan`` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from arctic_trt.engine.tensorrt_llm.needs import TIGHT_BYTES_A_SHARD_BYTE, WORKER_BYTES_A_SHARD_BYTE
from arctic_trt.model.mapping import Mapping as Sizes
from arctic_trt.quantize.memory import BASE_BYTES, SAFE_SHARE
from arctic_trt.report.arctic import TP_SIZE, forecast_released
from arctic_trt.report.facts import Facts
from arctic_trt.report.obstacles import (
    NO,
    TINY_ONLY,
    Obstacle,
    cuda_obstacles,
    disk_obstacles,
    fit_here,
    fp8_obstacles,
    gb,
    gpu_memory_obstacles,
    gpu_obstacles,
    library_obstacles,
    mpi_obstacles,
    package_obstacles,
    shared_memory_obstacles,
    torch_obstacles,
    tritonserver_obstacles,
    worst,
)
from arctic_trt.report.plan import Forecast

WORKS = "works"
WANTED_FILES = 65536
"""Open files: NCCL and MPI take several for each pair of ranks, and the usual 1024 run out."""


@dataclass(frozen=True, slots=True)
class Capability:
    """The verdict on one of arctic-trt's steps; ``next_step`` is empty where it works."""

    name: str
    verdict: str
    why: str
    next_step: str

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "next_step": self.next_step or None}


@dataclass(frozen=True, slots=True)
class Step:
    """A step of arctic-trt: what can be in its way, and how it does on a machine where nothing is."""

    obstacles: Callable[[Facts, Forecast], Iterator[Obstacle]]
    success: Callable[[Facts, Forecast], str]


def forecast_here(facts: Facts) -> Forecast:
    """What the released Arctic takes on the machine of ``facts``."""
    return forecast_released(workers=facts.cores, budget_bytes=int(SAFE_SHARE * facts.memory_free_bytes))


def diagnose(facts: Facts, full: Forecast) -> list[Capability]:
    """A verdict on each step, in the order in which they are taken."""
    found = []
    for name, step in STEPS.items():
        obstacle = worst(step.obstacles(facts, full))
        if obstacle:
            found.append(Capability(name, obstacle.verdict, obstacle.why, obstacle.next_step))
        else:
            found.append(Capability(name, WORKS, step.success(facts, full), ""))
    return found


def advise(facts: Facts) -> list[tuple[str, str]]:
    """What is no obstacle to any step, but to be known before several ranks start: a topic, and what to do."""
    advice = []
    if facts.mpi.implementation == "Open MPI" and not facts.home:
        advice.append(("mpirun", "export HOME=/tmp: without a HOME, Open MPI does not start."))
    if facts.root and facts.mpi.implementation == "Open MPI":
        advice.append(("mpirun", "Give it --allow-run-as-root, since this is root."))
    if facts.mpi.mpirun and facts.cores < TP_SIZE:
        advice.append(("mpirun", f"Give it --oversubscribe for {TP_SIZE} ranks: there are {facts.cores} cores."))
    if len(facts.gpus) > 1 and facts.limits.memlock_bytes is not None:
        how = "--ulimit memlock=-1 for the container" if facts.container else "ulimit -l unlimited"
        advice.append(("locked memory", f"{how}: {gb(facts.limits.memlock_bytes)} is little for NCCL and RDMA."))
    if len(facts.gpus) > 1 and facts.limits.open_files is not None and facts.limits.open_files < WANTED_FILES:
        advice.append(("open files", f"ulimit -n {WANTED_FILES}: {facts.limits.open_files} is little for many ranks."))
    return advice


def _quantize(facts: Facts, full: Forecast) -> Iterator[Obstacle]:
    yield from library_obstacles(facts)
    yield from disk_obstacles(facts, full.disk_bytes)
    if full.memory.peak_bytes > full.job.budget_bytes:
        why = f"full Arctic takes {gb(full.memory.peak_bytes)} of memory, {gb(full.job.budget_bytes)} may be used"
        need = gb(full.memory.peak_bytes / SAFE_SHARE)
        yield Obstacle(TINY_ONLY, why, f"Have {need} of memory free: quantize takes {SAFE_SHARE:.0%} of it at most.")


def _build_torch(facts: Facts, full: Forecast) -> Iterator[Obstacle]:
    yield from torch_obstacles(facts)
    yield from disk_obstacles(facts, full.output_bytes)


def _build_tensorrt_llm(facts: Facts, full: Forecast) -> Iterator[Obstacle]:
    yield from gpu_obstacles(facts)
    yield from package_obstacles(facts)
    yield from fp8_obstacles(facts)
    yield from disk_obstacles(facts, full.output_bytes)
    need = TIGHT_BYTES_A_SHARD_BYTE * _rank_bytes(facts, full)
    if facts.memory_free_bytes < need:
        why = f"each rank of full Arctic takes {gb(need)} of host memory to build, {gb(facts.memory_free_bytes)} are free"
        yield Obstacle(TINY_ONLY, why, f"Build on a machine with {gb(need)} of free memory, or quantize for more ranks.")


def _run_torch(facts: Facts, full: Forecast) -> Iterator[Obstacle]:
    yield from library_obstacles(facts)
    yield from mpi_obstacles(facts)
    need = _torch_memory(full)
    if facts.memory_free_bytes < need:
        why = f"full Arctic takes {gb(need)} of memory (it runs on the CPUs), {gb(facts.memory_free_bytes)} are free"
        yield Obstacle(TINY_ONLY, why, f"Run full Arctic on a machine with {gb(need)} of free memory.")


def _run_cuda(facts: Facts, full: Forecast) -> Iterator[Obstacle]:
    yield from library_obstacles(facts)
    yield from cuda_obstacles(facts)
    yield from mpi_obstacles(facts)
    yield from shared_memory_obstacles(facts)
    yield from gpu_memory_obstacles(facts, full)


def _run_tensorrt_llm(facts: Facts, full: Forecast) -> Iterator[Obstacle]:
    yield from gpu_obstacles(facts)
    yield from package_obstacles(facts)
    yield from fp8_obstacles(facts)
    yield from mpi_obstacles(facts)
    yield from shared_memory_obstacles(facts)
    yield from gpu_memory_obstacles(facts, full)
    if facts.memory_free_bytes < full.output_bytes:  # ranks load side by side: they meet while they do
        why = f"loading reads {gb(full.output_bytes)} of engines at once, {gb(facts.memory_free_bytes)} of host memory are free"
        yield Obstacle(TINY_ONLY, why, "Free memory, or give run --use_gpu_direct_storage.")


def _serve(facts: Facts, full: Forecast) -> Iterator[Obstacle]:
    yield from tritonserver_obstacles(facts)
    engines = [worst(rule(facts, full)) for rule in (_run_tensorrt_llm, _run_cuda, _run_torch)]
    in_the_way = [obstacle for obstacle in engines if obstacle]
    if len(in_the_way) == len(engines):
        lesser = min(in_the_way, key=lambda obstacle: obstacle.verdict == NO)
        yield Obstacle(lesser.verdict, f"no engine runs: {lesser.why}" if lesser.verdict == NO else lesser.why, lesser.next_step)


def _torch_memory(full: Forecast) -> int:
    """Weights of all ranks as bf16 and e4m3 in host memory, and what each process takes besides."""
    return full.output_bytes + len(full.rank_bytes) * BASE_BYTES


def _quantization(facts: Facts, full: Forecast) -> str:
    read, written, memory = full.source.checkpoint_bytes, full.disk_bytes, full.memory.peak_bytes
    return f"full Arctic, {gb(written)} on disk besides the {gb(read)} that are read, {gb(memory)} of memory"


def _mapping_here(facts: Facts, full: Forecast) -> Sizes:
    """How the full Arctic is divided on this machine's GPUs; as the official recipe does where it does not fit them."""
    fit = fit_here(facts, full)
    return fit.mapping if fit and fit.mapping and not fit.why_not else full.job.mapping


def _rank_bytes(facts: Facts, full: Forecast) -> int:
    return full.output_bytes // _mapping_here(facts, full).world_size


def _trt_building(facts: Facts, full: Forecast) -> str:
    each, ranks = WORKER_BYTES_A_SHARD_BYTE * _rank_bytes(facts, full), _mapping_here(facts, full).world_size
    side_by_side = max(1, min(len(facts.gpus), ranks, facts.memory_free_bytes // each))
    return f"full Arctic, {side_by_side} of {ranks} ranks at a time, {gb(each)} of host memory each"


def _running_on_gpus(facts: Facts, full: Forecast) -> str:
    sizes, asked = _mapping_here(facts, full), full.job.mapping
    stages = f" --pp_size {sizes.pp_size}" if sizes.pp_size > 1 else ""
    how = "" if sizes == asked else f", quantized with --tp_size {sizes.tp_size}{stages}"
    return f"full Arctic on {len(facts.gpus)} x {facts.gpus[0].name}{how}"


STEPS: Mapping[str, Step] = {
    "quantize": Step(_quantize, _quantization),
    "build torch": Step(_build_torch, lambda facts, full: f"full Arctic, {gb(full.output_bytes)} on disk"),
    "build tensorrt_llm": Step(_build_tensorrt_llm, _trt_building),
    "run torch": Step(_run_torch, lambda facts, full: f"full Arctic on the CPUs, {gb(_torch_memory(full))} of memory"),
    "run torch on CUDA": Step(_run_cuda, _running_on_gpus),
    "run tensorrt_llm": Step(_run_tensorrt_llm, _running_on_gpus),
    "serve": Step(_serve, lambda facts, full: "full Arctic"),
}
