"""``arctic-trt doctor``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, output_options
from arctic_trt.output import Output, gigabytes

if TYPE_CHECKING:
    from arctic_trt.report.doctor import Capability
    from arctic_trt.report.facts import Facts
    from arctic_trt.report.plan import Forecast

EPILOG = """\b
Example, for the disk that is to hold checkpoint and engine:
  arctic-trt doctor --output_dir /data/arctic

"tiny model only" means that the step itself works here, but that the full Arctic does not fit.
Verdicts follow from what is here; nothing is tried out. The exit code is 0 whatever it finds."""

VERDICTS = {"works": "works", "tiny_only": "tiny model only", "no": "does not work"}
STYLES = {"works": "green", "tiny model only": "yellow", "does not work": "red"}
SHOWN_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


@click.command("doctor", epilog=EPILOG, short_help="Say what this machine has, which steps work on it, and what to do next.")
@click.option("--output_dir", type=DIRECTORY, default=Path(), help="Where output would go: its disk is looked at.  [default: .]")
@output_options
def command(output: Output, output_dir: Path) -> None:
    """Say what this machine has, which steps of arctic-trt work on it, and for each that does not, what to do next."""
    from arctic_trt.report.doctor import advise, diagnose, forecast_here
    from arctic_trt.report.facts import gather

    facts = gather(output_dir)
    full = forecast_here(facts)
    capabilities, advice = diagnose(facts, full), advise(facts)
    output.result(
        {
            "machine": asdict(facts),
            "full_arctic": _sizes(full),
            "capabilities": [capability.as_dict() for capability in capabilities],
            "advice": [{"topic": topic, "text": text} for topic, text in advice],
        }
    )
    output.table("This machine", _machine(facts), always=True)
    rows = [(capability.name, VERDICTS[capability.verdict], capability.why) for capability in capabilities]
    output.table("What works here", rows, ("step", "verdict", "why"), always=True, styles=STYLES)
    steps = [*_next_steps(capabilities), *advice]
    if steps:
        output.table("Next steps", steps, ("for", "do"), always=True)


def _sizes(full: Forecast) -> dict[str, int]:
    return {
        "source_bytes": full.source.checkpoint_bytes,
        "checkpoint_bytes": full.output_bytes,
        "quantize_disk_bytes": full.disk_bytes,
        "quantize_memory_bytes": full.memory.peak_bytes,
        "rank_bytes": max(full.rank_bytes),
        "gpu_bytes": max(need.needed_bytes for need in full.stages),
    }


def _next_steps(capabilities: list[Capability]) -> list[tuple[str, str]]:
    """Each step once, with all that it is for."""
    steps: dict[str, list[str]] = {}
    for capability in capabilities:
        if capability.next_step:
            steps.setdefault(capability.next_step, []).append(capability.name)
    return [(_together(names), text) for text, names in steps.items()]


def _together(names: list[str]) -> str:
    """``build and run torch`` for ``build torch`` and ``run torch``."""
    verbs: dict[str, list[str]] = {}
    for name in names:
        verb, _, backend = name.partition(" ")
        verbs.setdefault(backend, []).append(verb)
    return ", ".join(f"{' and '.join(of_backend)} {backend}".strip() for backend, of_backend in verbs.items())


def _machine(facts: Facts) -> list[tuple[str, str]]:
    installed = [f"{name}=={version}" for name, version in facts.packages.items() if version]
    absent = [name for name, version in facts.packages.items() if not version]
    (installed if facts.tritonserver else absent).append("tritonserver")
    rows = [
        ("system", f"{facts.system}{f', in a container ({facts.container})' if facts.container else ''}"),
        ("processor", f"{facts.processor}, {_cores(facts)}, {_instructions(facts)}"),
        ("memory", _memory(facts)),
        ("/dev/shm", f"{gigabytes(facts.shm_free_bytes)} free of {gigabytes(facts.shm_total_bytes)}"),
        ("disk", f"{gigabytes(facts.disk.free_bytes)} free {_place(facts.disk.path)} ({facts.disk.kind})"),
        ("limits", _limits(facts)),
        *_gpus(facts),
        ("MPI", _mpi(facts)),
        ("Python", facts.python),
        ("C compiler", facts.c_compiler or "none: the torch backend computes many times slower on CPUs"),
        ("installed", ", ".join(installed)),
    ]
    return [*rows, ("absent", ", ".join(absent))] if absent else rows


def _cores(facts: Facts) -> str:
    part = "" if facts.cores == facts.machine_cores else f" of {facts.machine_cores}"
    return f"{facts.cores}{part} cores"


def _place(path: str) -> str:
    return "here" if path == "." else f"at {path}"


def _instructions(facts: Facts) -> str:
    found = [name for name in SHOWN_INSTRUCTIONS if name in facts.instructions]
    return f"with {' and '.join(found)}" if found else "without avx512_bf16 and amx_bf16"


def _memory(facts: Facts) -> str:
    limited = ", as far as its control group allows" if facts.memory_limited else ""
    return f"{gigabytes(facts.memory_free_bytes)} free of {gigabytes(facts.memory_total_bytes)}{limited}"


def _limits(facts: Facts) -> str:
    def size(count: int | None) -> str:
        return "unlimited" if count is None else gigabytes(count)

    limits = facts.limits
    files = "unlimited" if limits.open_files is None else str(limits.open_files)
    return f"locked memory {size(limits.memlock_bytes)}, stack {size(limits.stack_bytes)}, open files {files}"


def _gpus(facts: Facts) -> list[tuple[str, str]]:
    if not facts.gpus:
        return [("GPUs", "none")]
    kinds: dict[str, list[Any]] = {}
    for gpu in facts.gpus:
        kinds.setdefault(gpu.name, []).append(gpu)
    rows = []
    for name, gpus in kinds.items():
        free = min(gpu.free_bytes for gpu in gpus)
        rows.append(
            ("GPUs", f"{len(gpus)} x {name}, SM {gpus[0].sm}, {gigabytes(free)} free of {gigabytes(gpus[0].memory_bytes)}")
        )
    rows.append(("driver", f"{facts.gpus[0].driver}{f', CUDA {facts.driver_cuda}' if facts.driver_cuda else ''}"))
    if facts.links:
        rows.append(("links", f"{facts.links}{f', fabric {facts.fabric}' if facts.fabric else ''}"))
    return rows


def _mpi(facts: Facts) -> str:
    mpi = facts.mpi
    slurm = "; Slurm with PMIx" if mpi.slurm_pmix else "; Slurm" if mpi.slurm else ""
    if mpi.mpirun is None:
        return f"no mpirun on PATH{slurm}"
    return f"{' '.join(filter(None, (mpi.implementation, mpi.version))) or 'unknown'}, {mpi.mpirun}{slurm}"
