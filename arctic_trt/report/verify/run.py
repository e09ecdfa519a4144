"""A verification from beginning to end: what kind of directory it is, what there is to look at, and all threads at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from arctic_trt.checkpoint.contract import read_json
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.engine.config import TORCH, is_engine_config, read_engine_config
from arctic_trt.errors import UsageError
from arctic_trt.machine import available_cores
from arctic_trt.model import tokenizer
from arctic_trt.model.config import ArcticConfig
from arctic_trt.quantize.memory import default_budget
from arctic_trt.quantize.stream import WorkPool
from arctic_trt.report.verify.checkpoint import OpenCheckpoint, check_structure, open_checkpoint
from arctic_trt.report.verify.engine import check_tensorrt_engine, check_torch_engine, torch_engine_works
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.original import original_works
from arctic_trt.report.verify.records import read_digests_of
from arctic_trt.report.verify.scales import check_scales
from arctic_trt.report.verify.values import Work, value_works

SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("num_local_experts", "vocab_size"),
)
OnProgress = Callable[[Verification], None]


def verify_structure(path: Path) -> Verification:
    """Check a checkpoint without reading its matrices: what ``quantize`` does when it is done."""
    found = Verification()
    checkpoint = open_checkpoint(path, found)
    if checkpoint is not None:
        _check_small(checkpoint, found)
        checkpoint.close()
    return found


def verify(
    path: Path, against: Path | None = None, *, share: float = 1.0, on_progress: OnProgress = lambda found: None
) -> Verification:
    """Check a checkpoint or an engine; ``share`` of its matrices, and of those of ``against``, between 0 and 1.

    ``against`` is the Hugging Face original of a checkpoint, or the checkpoint of a torch engine. Raises
    :class:`UsageError` where there is nothing to verify, or nothing to compare with.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory.", "Point it at a checkpoint or an engine.")
    if _is_engine(path):
        return _verify_engine(path, against, share, on_progress)
    found = Verification()
    checkpoint = open_checkpoint(path, found)
    if checkpoint is None:
        return found
    _check_small(checkpoint, found)
    if against is None or share < 1:  # what equals its original byte for byte has the original's values
        _work_through(checkpoint.config, value_works(checkpoint, found, share), found, on_progress)
    if against is not None:
        source = HfCheckpoint(against)
        if _is_same_model(checkpoint, source, found):
            _check_side_files(checkpoint, source, found)
            _work_through(checkpoint.config, original_works(checkpoint, source, found, share), found, on_progress)
        source.close()
    checkpoint.close()
    return found


def _check_small(checkpoint: OpenCheckpoint, found: Verification) -> None:
    check_structure(checkpoint, found)
    if checkpoint.quant.fp8:
        check_scales(checkpoint, found)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a TensorRT-LLM checkpoint, as far as its files' names and its configuration's kind can tell."""
    return (path / "config.json").is_file() and any(path.glob("rank*.safetensors")) and not _is_engine(path)


def _is_engine(path: Path) -> bool:
    """Whether ``config.json`` is an engine's; one that cannot be read is the checkpoint's to report, as a finding."""
    try:
        return is_engine_config(read_json(path / "config.json", ""))
    except (UsageError, OSError):
        return False


def _is_same_model(checkpoint: OpenCheckpoint, source: HfCheckpoint, found: Verification) -> bool:
    """Whether the two can be compared: sizes that differ make it another model, other settings that differ make it wrong.

    Raises :class:`UsageError` for another model, unless the checkpoint has shown that it is its own sizes that are wrong.
    """
    differ = [key for key in type(source.config).model_fields if getattr(checkpoint.config, key) != getattr(source.config, key)]
    for key in sorted(differ, key=lambda key: key not in SIZES):
        mine, theirs = getattr(checkpoint.config, key), getattr(source.config, key)
        if key in SIZES and found.passed:
            raise UsageError(
                f"{checkpoint.path} has {key} {mine}, {source.model_dir} has {theirs}.", "Give the model that it was made of."
            )
        found.error("config", "config.json", key, f"config.json has {key} {mine}, the original has {theirs}.")
    return not set(differ) & set(SIZES)


def _check_side_files(checkpoint: OpenCheckpoint, source: HfCheckpoint, found: Verification) -> None:
    """Without digests, a tokenizer's files must be the original's; other producers leave them out."""
    for name in tokenizer.FILES if checkpoint.records.digests is None else ():
        mine, theirs = checkpoint.path / name, source.model_dir / name
        if mine.is_file() and theirs.is_file() and mine.read_bytes() != theirs.read_bytes():
            found.error("payload", name, "", f"{name} is not the original's.")


def _verify_engine(path: Path, against: Path | None, share: float, on_progress: OnProgress) -> Verification:
    found = Verification()
    engine = read_engine_config(path)
    if engine.backend != TORCH:
        check_tensorrt_engine(path, engine, found)
        return found
    files = check_torch_engine(path, engine, found)
    works = torch_engine_works(files, engine, against, read_digests_of(path, found), found, share)
    _work_through(engine.network("config.json")[0], works, found, on_progress)
    return found


def plan_workers(config: ArcticConfig, cores: int, budget_bytes: int) -> int:
    """Threads at work at the same time: one a core, as far as memory goes.

    Each may hold the dense part of a layer in bf16, or the output head, its codes, and what the ranks hold of it.
    """
    dense = 2 * (6 * config.hidden_size + 2 * config.kv_size) * config.hidden_size
    head = 2 * config.vocab_size * config.hidden_size
    return max(1, min(cores, budget_bytes // (2 * max(dense, head))))


def _work_through(config: ArcticConfig, works: Iterable[Work], found: Verification, on_progress: OnProgress) -> None:
    pool = WorkPool(plan_workers(config, available_cores(), default_budget()))
    try:
        for _ in pool.each(works):
            on_progress(found)
    finally:
        pool.close()
