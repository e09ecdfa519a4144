"""``config.json`` of an engine directory: what it was built from, for which limits, and for which backend.

The shape is TensorRT-LLM's (``version``, ``pretrained_config``, ``build_config``) with one key of ours, ``backend``: a
directory without that key was made by TensorRT-LLM itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from arctic_trt import __version__
from arctic_trt.checkpoint.contract import QuantFormat, parse_pretrained_config, read_json
from arctic_trt.checkpoint.output_dir import read_marker
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Mapping
from arctic_trt.recipes.build import Expects

TORCH, TENSORRT_LLM = "torch", "tensorrt_llm"
BACKENDS = (TORCH, TENSORRT_LLM)
REBUILD = "Build the engine again with arctic-trt build."


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """Limits that an engine keeps to; make one with :func:`plan_build_config`, which checks that they fit."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    max_beam_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """A decoded ``config.json``; ``pretrained_config`` is the checkpoint's, verbatim."""

    version: str
    backend: str
    pretrained_config: dict[str, Any]
    build_config: BuildConfig

    def network(self, source: str = "config.json") -> tuple[ArcticConfig, Mapping, QuantFormat]:
        """What the engine computes, how it is cut, and what is in e4m3."""
        return parse_pretrained_config(self.pretrained_config, source)


def plan_build_config(
    config: ArcticConfig,
    *,
    max_batch_size: int = 256,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
    max_num_tokens: int = 8192,
    max_beam_width: int = 1,
    beam_search: bool = False,
) -> BuildConfig:
    """Complete and check the limits: ``max_seq_len`` follows the model, ``max_input_len`` follows ``max_seq_len``.

    ``beam_search`` is whether the backend can do it.

    Raises :class:`UsageError` naming the flag that does not fit.
    """
    limit = config.max_position_embeddings
    seq_len = limit if max_seq_len is None else max_seq_len
    input_len = seq_len if max_input_len is None else max_input_len
    sizes = {
        "--max_batch_size": max_batch_size,
        "--max_input_len": input_len,
        "--max_seq_len": seq_len,
        "--max_num_tokens": max_num_tokens,
    }
    for flag, size in sizes.items():
        if size < 1:
            raise UsageError(f"{flag} {size} is not a positive number.")
    if seq_len > limit:
        raise UsageError(
            f"--max_seq_len {seq_len} exceeds max_position_embeddings={limit}.", f"Arctic was trained up to {limit} positions."
        )
    if input_len > seq_len:
        raise UsageError(f"--max_input_len {input_len} exceeds --max_seq_len {seq_len}.", "The prompt is part of the sequence.")
    if max_beam_width != 1 and not beam_search:
        raise UsageError(f"--max_beam_width {max_beam_width} is not supported, expected 1.", "Sample instead of searching.")
    return BuildConfig(
        max_batch_size=max_batch_size,
        max_input_len=input_len,
        max_seq_len=seq_len,
        max_num_tokens=max_num_tokens,
        max_beam_width=max_beam_width,
    )


def is_engine_config(raw: dict[str, Any]) -> bool:
    """Whether a decoded ``config.json`` is an engine's, ours or TensorRT-LLM's."""
    return isinstance(raw.get("pretrained_config"), dict) and isinstance(raw.get("build_config"), dict)


def check_expectations(expects: Expects | None, mapping: Mapping, quant: QuantFormat, source: str) -> None:
    """Raise :class:`UsageError` where the checkpoint ``source`` is not what a recipe was computed for."""
    if expects is None:
        return
    found = {
        "tp_size": mapping.tp_size,
        "pp_size": mapping.pp_size,
        "qformat": "fp8" if quant.fp8 else "full_prec",
        "kv_cache_dtype": "fp8" if quant.kv_fp8 else "none",
    }
    for key, value in found.items():
        wanted = getattr(expects, key)
        if wanted != value:
            raise UsageError(
                f"{source} has {key} {value}, but this recipe for {expects.machine} expects {wanted}.",
                f"Quantize with --{key} {wanted}, or take another recipe.",
            )


def check_engine_dir(output_dir: Path, checkpoint_dir: Path) -> None:
    """Raise :class:`RefusedError` where the engine would take the place of the checkpoint, or of anything but an engine."""
    if output_dir.resolve() == checkpoint_dir.resolve():
        raise RefusedError(f"--output_dir {output_dir} is the checkpoint itself.", "Choose another --output_dir.")
    config = output_dir / "config.json"
    if config.is_file() and not is_engine_config(read_json(config, "Choose another --output_dir.")):
        raise RefusedError(
            f"--output_dir {output_dir} holds something that is not an engine, and is not overwritten.",
            "Choose another --output_dir.",
        )


def plan_engine_config(backend: str, pretrained_config: dict[str, Any], build_config: BuildConfig) -> dict[str, Any]:
    """The value of ``config.json``; writing it makes the directory an engine, so nothing may be missing by then."""
    return {
        "version": __version__,
        "backend": backend,
        "pretrained_config": pretrained_config,
        "build_config": asdict(build_config),
    }


def read_engine_config(engine_dir: Path) -> EngineConfig:
    """Read ``engine_dir/config.json``; raises :class:`UsageError` for anything that is not an engine directory."""
    path = engine_dir / "config.json"
    if read_marker(engine_dir) is not None:
        raise UsageError(f"{engine_dir} is not complete.", "Run the command that builds it again, on all machines that share it.")
    raw = read_json(path, "Point --engine_dir at the output of arctic-trt build.")
    if not is_engine_config(raw):
        raise UsageError(
            f"{path} describes {_what_else(raw)}, not an engine.", "Point --engine_dir at the output of arctic-trt build."
        )
    backend = raw.get("backend", TENSORRT_LLM)
    if backend not in BACKENDS:
        raise UsageError(f"{path} has backend={backend!r}, expected one of {', '.join(BACKENDS)}.", REBUILD)
    limits = {field.name: raw["build_config"].get(field.name) for field in fields(BuildConfig)}
    for key, value in limits.items():
        if not isinstance(value, int):
            raise UsageError(f"{path} has build_config.{key}={value!r}, expected a number.", REBUILD)
    return EngineConfig(
        version=str(raw.get("version")),
        backend=backend,
        pretrained_config=raw["pretrained_config"],
        build_config=BuildConfig(**limits),
    )


def _what_else(raw: dict[str, Any]) -> str:
    if "mapping" in raw and "architecture" in raw:
        return "a TensorRT-LLM checkpoint"
    return "a Hugging Face model" if "architectures" in raw else "something else"
