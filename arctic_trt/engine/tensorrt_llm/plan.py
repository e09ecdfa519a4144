"""What a build with TensorRT-LLM will do: which ranks, with which command lines, how many at a time. Nothing is written here."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.output_dir import JOURNAL, check_space
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import TENSORRT_LLM, BuildConfig
from arctic_trt.engine.tensorrt_llm.arguments import Value, check_arguments, command_line, plan_arguments
from arctic_trt.engine.tensorrt_llm.mixed import check_mixed, kept_in_bf16
from arctic_trt.engine.tensorrt_llm.needs import FP8_SM, TIGHT_BYTES_A_SHARD_BYTE, WORKER_BYTES_A_SHARD_BYTE
from arctic_trt.engine.tensorrt_llm.versions import Versions, check_flags, check_supported
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import Gpu
from arctic_trt.model import tokenizer
from arctic_trt.recipes.build import BuildRecipe

TIMINGS = "timing.cache"
WORKER_MODULE = "arctic_trt.engine.tensorrt_llm.worker"


@dataclass(frozen=True, slots=True)
class Crew:
    """How many ranks are built side by side, and why not as many as asked for."""

    size: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtBuildPlan:
    """A build whose inputs have been checked. ``ranks`` are those to build here, ``shard_bytes`` the sizes of all rank files."""

    checkpoint: TrtCheckpoint
    output_dir: Path
    ranks: tuple[int, ...]
    arguments: dict[str, Value]
    versions: Versions
    gpus: tuple[Gpu, ...]
    crew: Crew
    shard_bytes: tuple[int, ...]
    timing_caches: tuple[Path | None, Path | None]
    overwrite: bool
    notes: tuple[str, ...]

    @property
    def world_size(self) -> int:
        return self.checkpoint.mapping.world_size

    @property
    def side_files(self) -> list[str]:
        return [name for name in tokenizer.FILES if (self.checkpoint.checkpoint_dir / name).is_file()]

    @property
    def worker_bytes(self) -> int:
        """Host memory of the largest build, an estimate."""
        return WORKER_BYTES_A_SHARD_BYTE * max(self.shard_bytes[rank] for rank in self.ranks)

    def shard(self, rank: int) -> Path:
        return self.checkpoint.checkpoint_dir / rank_file(rank)

    def fingerprint(self) -> dict[str, Any]:
        """What an engine is tied to, apart from the weights: all ranks of a directory have this in common."""
        config = (self.checkpoint.checkpoint_dir / "config.json").read_bytes()
        return {
            "checkpoint_config": hashlib.sha256(config).hexdigest(),
            "arguments": " ".join(command_line(self.arguments)),
            "tensorrt_llm": self.versions.tensorrt_llm,
            "tensorrt": self.versions.tensorrt,
            "sm": self.gpus[0].sm if self.gpus else None,
            "gpu": self.gpus[0].name if self.gpus else None,
        }


def plan_trtllm_build(
    recipe: BuildRecipe,
    checkpoint: TrtCheckpoint,
    limits: BuildConfig,
    *,
    versions: Versions,
    gpus: Sequence[Gpu],
    available_bytes: int,
) -> TrtBuildPlan:
    """Decide everything; ``gpus`` are this machine's, ``available_bytes`` its free memory, both ignored for a dry run without
    TensorRT-LLM.

    Raises :class:`UsageError` for flags that do not fit, :class:`RefusedError` for a machine that does not.
    """
    check_supported(versions.tensorrt_llm)
    arguments = plan_arguments(recipe, checkpoint.quant, limits, in_bf16=kept_in_bf16(checkpoint))
    check_flags(arguments, versions)
    notes = check_arguments(recipe, arguments, checkpoint.quant, pp_size=checkpoint.mapping.pp_size, release=versions.release)
    check_mixed(arguments, checkpoint)
    ranks = parse_ranks(recipe.ranks, checkpoint.mapping.world_size)
    shard_bytes = tuple(checkpoint.file(rank.index).path.stat().st_size for rank in checkpoint.mapping.ranks())
    wanted = recipe.workers or (len(gpus) if gpus else len(ranks))
    crew = Crew(min(wanted, len(ranks)))
    if not versions.assumed:
        check_gpus(gpus, fp8=checkpoint.quant.fp8)
        crew = plan_crew(
            wanted, ranks=len(ranks), gpus=len(gpus), available=available_bytes, shard=max(shard_bytes[r] for r in ranks)
        )
    return TrtBuildPlan(
        checkpoint=checkpoint,
        output_dir=recipe.output_dir,
        ranks=ranks,
        arguments=arguments,
        versions=versions,
        gpus=tuple(gpus),
        crew=crew,
        shard_bytes=shard_bytes,
        timing_caches=plan_timing_caches(recipe, gpus, versions),
        overwrite=recipe.overwrite,
        notes=tuple(notes),
    )


def parse_ranks(text: str | None, world_size: int) -> tuple[int, ...]:
    """Ranks of ``0-3``, ``5`` or ``0,2,4-7``, in order; all of them for None. Raises :class:`UsageError`."""
    if text is None:
        return tuple(range(world_size))
    ranks: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise UsageError(f"--ranks {text!r} is not a list of ranks.", "Write it as 0-3 or 0,2,4-7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= world_size:
            raise UsageError(f"--ranks {text!r} does not fit a checkpoint of {world_size} ranks, 0 to {world_size - 1}.")
        ranks.update(range(first, last + 1))
    return tuple(sorted(ranks))


def check_gpus(gpus: Sequence[Gpu], *, fp8: bool) -> None:
    """Raise :class:`RefusedError` unless there are GPUs, all alike, with what the checkpoint needs."""
    if not gpus:
        raise RefusedError(
            "TensorRT builds engines on the GPU that will run them, and this machine shows none.",
            "Look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --backend torch.",
        )
    kinds = sorted({gpu.name for gpu in gpus})
    if len(kinds) > 1:
        raise RefusedError(
            f"This machine has different GPUs, {' and '.join(kinds)}; an engine is tied to one kind.",
            "Choose GPUs of one kind with CUDA_VISIBLE_DEVICES.",
        )
    if fp8 and gpus[0].sm < FP8_SM:
        raise RefusedError(
            f"{kinds[0]} (SM {gpus[0].sm}) has no FP8 tensor cores, which this checkpoint needs (SM {FP8_SM} or later).",
            "Use Hopper or Ada GPUs, or quantize with --qformat full_prec.",
        )


def plan_crew(asked: int, *, ranks: int, gpus: int, available: int, shard: int) -> Crew:
    """How many of ``asked`` builds run side by side: one a GPU, and as many as host memory holds, in bytes.

    A build that runs out of memory is killed without a word, so memory is not taken up to the last byte. Raises
    :class:`RefusedError` where not even one build fits.
    """
    need = WORKER_BYTES_A_SHARD_BYTE * shard
    fitting, limit = available // need, min(asked, ranks, gpus)
    have = f"{available / 1e9:.0f} GB of host memory are free and a build takes about {need / 1e9:.0f} GB"
    if available < TIGHT_BYTES_A_SHARD_BYTE * shard:
        raise RefusedError(
            f"{have}, at least {TIGHT_BYTES_A_SHARD_BYTE * shard / 1e9:.0f} GB.",
            "Build on a machine with more memory, or quantize to more and smaller ranks (--tp_size, --pp_size).",
        )
    if fitting < 1:
        return Crew(1, f"{have}: one rank at a time, and it may still be killed for lack of memory")
    if fitting < limit:
        return Crew(fitting, f"{have}: {fitting} ranks at a time instead of {limit}")
    if limit < min(asked, ranks):
        return Crew(limit, f"there are {gpus} GPUs: {limit} ranks at a time instead of {min(asked, ranks)}")
    return Crew(limit)


def plan_timing_caches(recipe: BuildRecipe, gpus: Sequence[Gpu], versions: Versions) -> tuple[Path | None, Path | None]:
    """Files to read kernel timings from and to write them to: the caller's, or one for each kind of GPU and TensorRT.

    None where there is none, and where it is not known what it would be valid for.
    """
    given = recipe.input_timing_cache
    if given is not None and not given.is_file():
        raise UsageError(f"--input_timing_cache {given} does not exist.", "Leave it out, or name a file that TensorRT-LLM wrote.")
    default = None
    if gpus and versions.tensorrt is not None:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arctic-trt"
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpus[0].name} sm{gpus[0].sm} trt{versions.tensorrt}")
        default = (recipe.timing_cache_dir or directory) / f"{name}.cache"
    return given or default, recipe.output_timing_cache or default


def rank_command(plan: TrtBuildPlan, rank: int, gpu: int, output_dir: Path) -> list[str]:
    """The command that builds one rank into ``output_dir``, an empty directory of its own."""
    arguments: dict[str, Value] = {
        "checkpoint_dir": plan.checkpoint.checkpoint_dir.absolute(),
        "output_dir": output_dir,
        **plan.arguments,
    }
    if plan.timing_caches[0] is not None and plan.timing_caches[0].is_file():
        arguments["input_timing_cache"] = plan.timing_caches[0].absolute()
    arguments["output_timing_cache"] = output_dir / TIMINGS
    shard = str(plan.shard(rank).absolute())
    return [sys.executable, "-m", WORKER_MODULE, str(rank), str(gpu), shard, *command_line(arguments)]


def describe_plan(plan: TrtBuildPlan) -> dict[str, Any]:
    """The plan as a JSON object; ``command`` is what ``trtllm-build`` would be called with to do the same by itself."""
    build = command_line({"checkpoint_dir": plan.checkpoint.checkpoint_dir, "output_dir": plan.output_dir, **plan.arguments})
    scratch = plan.output_dir.absolute() / JOURNAL
    return {
        "output_dir": str(plan.output_dir),
        "backend": TENSORRT_LLM,
        "ranks": list(plan.ranks),
        "world_size": plan.world_size,
        "workers": plan.crew.size,
        "command": ["trtllm-build", *build, "--workers", str(plan.crew.size)],
        "rank_commands": [
            rank_command(plan, rank, index % plan.crew.size, scratch / f"rank{rank}") for index, rank in enumerate(plan.ranks)
        ],
        "versions": asdict(plan.versions),
        "gpus": [gpu.name for gpu in plan.gpus],
        "timing_caches": [str(path) if path else None for path in plan.timing_caches],
        "output_bytes": sum(plan.shard_bytes[rank] for rank in plan.ranks),
        "worker_bytes": plan.worker_bytes,
        "notes": list(plan.notes),
    }


def check_room(plan: TrtBuildPlan) -> None:
    """Refuse a disk that cannot hold the engines, which are about as large as the rank files."""
    check_space(plan.output_dir, sum(plan.shard_bytes[rank] for rank in plan.ranks))
