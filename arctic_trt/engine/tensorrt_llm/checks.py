"""Whether a TensorRT engine can run here, decided before anything is loaded: that takes minutes, and failing there tells little.

A rank that runs out of host memory is killed, and one that finds another TensorRT prints a serialization error; both end eight
processes without a word about what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_trt.engine.tensorrt_llm.engine_dir import RECORD, engine_file
from arctic_trt.engine.tensorrt_llm.session import RuntimeOptions
from arctic_trt.engine.tensorrt_llm.versions import NEWEST, Versions, check_supported, release_of
from arctic_trt.errors import CheckpointError, RefusedError, UsageError
from arctic_trt.machine import Gpu

REBUILD = "Build the engine again here: arctic-trt build --backend tensorrt_llm."


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine directory says about itself; None where it was made by ``trtllm-build`` alone and nobody knows."""

    engine_dir: Path
    version: str
    tensorrt: str | None
    sm: int | None
    gpu: str | None
    rank_bytes: tuple[int, ...]
    plugin_config: Mapping[str, Any]
    gathers_context_logits: bool
    gathers_generation_logits: bool
    pp_size: int


def read_engine_facts(engine_dir: Path, world_size: int) -> EngineFacts:
    """Read ``config.json`` and ``build.json``; raises :class:`CheckpointError` for an engine that is missing or cut short."""
    raw = json.loads((engine_dir / "config.json").read_text(encoding="utf-8"))
    record = _read_record(engine_dir / RECORD)
    fingerprint = record.get("fingerprint", {})
    sizes = {rank["rank"]: rank["engine_bytes"] for rank in record.get("ranks", ())}
    return EngineFacts(
        engine_dir=engine_dir,
        version=str(raw.get("version")),
        tensorrt=fingerprint.get("tensorrt"),
        sm=fingerprint.get("sm"),
        gpu=fingerprint.get("gpu"),
        rank_bytes=tuple(_engine_bytes(engine_dir / engine_file(rank), sizes.get(rank)) for rank in range(world_size)),
        plugin_config=raw["build_config"].get("plugin_config", {}),
        gathers_context_logits=bool(raw["build_config"].get("gather_context_logits")),
        gathers_generation_logits=bool(raw["build_config"].get("gather_generation_logits")),
        pp_size=raw["pretrained_config"]["mapping"]["pp_size"],
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.", REBUILD) from None
    return record if isinstance(record, dict) else {}


def _engine_bytes(path: Path, expected: int | None) -> int:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.", "Copy the whole engine directory, or build it again.")
    size = path.stat().st_size
    if expected is not None and size != expected:
        raise CheckpointError(f"{path} has {size} bytes, expected {expected}.", "Copy the engine again, or build it again.")
    return size


def check_versions(engine: EngineFacts, versions: Versions) -> list[str]:
    """What is doubtful about running ``engine`` with ``versions``; raises :class:`RefusedError` for what cannot work."""
    check_supported(versions.tensorrt_llm)
    if release_of(engine.version) != versions.release:
        raise RefusedError(
            f"{engine.engine_dir} was built with TensorRT-LLM {engine.version}, {versions.tensorrt_llm} is installed.",
            f"Install tensorrt-llm=={engine.version}, or build the engine again (newest that builds engines: {NEWEST}).",
        )
    if engine.tensorrt is not None and versions.tensorrt is not None and engine.tensorrt != versions.tensorrt:
        raise RefusedError(
            f"{engine.engine_dir} was built with TensorRT {engine.tensorrt}, {versions.tensorrt} is installed, and engines do "
            "not load across versions.",
            REBUILD,
        )
    if engine.version != versions.tensorrt_llm:
        return [f"{engine.engine_dir} was built with TensorRT-LLM {engine.version}, {versions.tensorrt_llm} is installed."]
    return []


def check_gpus(engine: EngineFacts, gpus: Sequence[Gpu], local_ranks: int) -> None:
    """Raise :class:`RefusedError` where a rank would have no GPU, one of another kind, or one without room for its weights."""
    if len(gpus) < local_ranks:
        raise RefusedError(
            f"{local_ranks} ranks were started on this machine, which shows {len(gpus)} GPUs; each rank needs one.",
            "Look at nvidia-smi and CUDA_VISIBLE_DEVICES, or spread the ranks over more machines.",
        )
    for gpu in gpus[:local_ranks]:
        if engine.sm is not None and gpu.sm != engine.sm:
            raise RefusedError(
                f"{engine.engine_dir} was built for SM {engine.sm} ({engine.gpu}), GPU {gpu.index} is SM {gpu.sm} ({gpu.name}).",
                REBUILD,
            )
        needed = max(engine.rank_bytes)
        if gpu.memory_bytes and gpu.free_bytes < needed:
            raise RefusedError(
                f"GPU {gpu.index} ({gpu.name}) has {gpu.free_bytes / 1e9:.1f} GB free, the weights of a rank take "
                f"{needed / 1e9:.1f} GB.",
                "End what else runs there (nvidia-smi names it), or quantize to more ranks.",
            )


def check_host_memory(engine: EngineFacts, available: int, local_ranks: int, options: RuntimeOptions) -> None:
    """Raise :class:`RefusedError` where loading all local ranks at once does not fit into ``available`` bytes.

    They cannot load in turns: the ranks of an engine meet while they load.
    """
    needed = sum(sorted(engine.rank_bytes)[-local_ranks:])
    if options.use_gpu_direct_storage or options.no_memory_check or available >= needed:
        return
    raise RefusedError(
        f"Loading {local_ranks} ranks reads {needed / 1e9:.0f} GB of engines at once, {available / 1e9:.0f} GB of host memory "
        "are free, and a rank that runs out is killed.",
        "Free memory, read past it with --use_gpu_direct_storage, or try nevertheless with --no_memory_check.",
    )


def check_options(engine: EngineFacts, options: RuntimeOptions, *, prompt_logits: bool) -> None:
    """Raise :class:`UsageError` for what this engine was not built for."""
    fraction, weights = options.kv_cache_free_gpu_memory_fraction, options.gpu_weights_percent
    if fraction is not None and not 0 < fraction < 1:
        raise UsageError(f"--kv_cache_free_gpu_memory_fraction {fraction} is out of range, expected between 0 and 1.")
    if weights is not None and not 0 <= weights <= 1:
        raise UsageError(f"--gpu_weights_percent {weights} is out of range, expected 0 to 1.")
    for name in ("kv_cache_enable_block_reuse", "enable_chunked_context"):
        if getattr(options, name) and engine.plugin_config.get("use_paged_context_fmha") is False:
            raise UsageError(
                f"--{name} needs an engine with paged context attention, {engine.engine_dir} was built without.",
                "Build it with --use_paged_context_fmha enable.",
            )
    if engine.pp_size > 1 and (engine.gathers_context_logits or engine.gathers_generation_logits):
        raise UsageError(
            f"{engine.engine_dir} gathers logits over {engine.pp_size} stages, for which TensorRT-LLM's runner waits forever.",
            "Build it without --gather_context_logits and --gather_generation_logits.",
        )
    if prompt_logits and not engine.gathers_context_logits:
        raise UsageError(
            f"--output_logits_npy needs the prompts' logits, which {engine.engine_dir} does not gather.",
            "Build it with --gather_context_logits.",
        )
