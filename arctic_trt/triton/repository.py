"""The model repository: what each of its models takes, gives and is told, and where its code comes from."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arctic_trt.checkpoint.output_dir import named_errors
from arctic_trt.engine.config import TORCH, read_engine_config
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.model.tokenizer import FILES
from arctic_trt.triton.gate import STATE, UP
from arctic_trt.triton.names import BLS, ENGINE, ENSEMBLE, GATE, POSTPROCESSING, PREPROCESSING
from arctic_trt.triton.pbtxt import Message, Word, ensemble_step, render, string_parameters
from arctic_trt.triton.tensors import (
    ABOUT,
    CLIENT_INPUTS,
    CLIENT_OUTPUTS,
    ENGINE_INPUTS,
    ENGINE_OUTPUTS,
    IDS,
    LENGTHS,
    PARAMETERS,
    PIECES,
    PROMPTS,
    TEXT_OUTPUT,
    TOKEN_IDS,
    TOP,
    Tensor,
    inner_name,
)

CODE = Path(__file__).parent / "models"
CONFIG, MODEL, KEEP = "config.pbtxt", "1/model.py", "1/.keep"
POST_INPUTS = (TOKEN_IDS, ABOUT[0], *PIECES, TOP)
POST_OUTPUTS = (TEXT_OUTPUT, TOP)
PARTIAL, OLD = ".partial", ".old"
INSTANCES: Sequence[Message] = [{"count": 1, "kind": Word("KIND_CPU")}]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryOptions:
    """What the repository is to serve, and how; durations in seconds; None is for the default or no limit.

    ``environment`` is where arctic-trt is installed, for Triton's Python. ``priority_levels`` 0 is none: all are equal.
    """

    engine_dir: Path
    tokenizer_dir: Path
    environment: Path = Path(sys.prefix)
    max_queue_size: int = 0
    queue_timeout_s: float | None = None
    priority_levels: int = 0
    request_timeout_s: float | None = None
    device: str | None = None
    kv_cache_memory: str | None = None
    max_tokens_in_paged_kv_cache: int | None = None
    exclude_input_in_output: bool = True


def plan_repository(options: RepositoryOptions) -> dict[str, str]:
    """Every file of the repository, by its path in it.

    Raises :class:`UsageError` for an engine that is none, or one of another backend, and without a tokenizer.
    """
    engine = read_engine_config(options.engine_dir)
    if engine.backend != TORCH:
        raise UsageError(
            f"{options.engine_dir} is an engine of the backend {engine.backend}, expected {TORCH}.",
            "Serve it with TensorRT-LLM's own backend: --backend tensorrtllm.",
        )
    if not (options.tokenizer_dir / FILES[0]).is_file():
        raise UsageError(f"{options.tokenizer_dir / FILES[0]} does not exist, so text cannot be served.", "Give --tokenizer_dir.")
    _, mapping, _ = engine.network(str(options.engine_dir / "config.json"))
    limits = engine.build_config
    text = {"tokenizer_dir": str(options.tokenizer_dir.resolve()), "max_input_len": str(limits.max_input_len)}
    answers = {"capacity": str(limits.max_batch_size), "exclude_input_in_output": str(options.exclude_input_in_output).lower()}
    group = {"engine_dir": str(options.engine_dir.resolve()), "world_size": str(mapping.world_size), **text, **answers}
    most = options.max_queue_size
    # requests of arctic_bls, which have waited in its own queue, are not to be turned away here
    engine_queue = _queue(options, most + limits.max_batch_size if most else 0)
    configs = [
        _model(options, PREPROCESSING, CLIENT_INPUTS, (PROMPTS[2], LENGTHS), text),
        _model(options, ENGINE, ENGINE_INPUTS, ENGINE_OUTPUTS, {**group, **_settings(options)}, inner=True, queue=engine_queue),
        _model(options, POSTPROCESSING, POST_INPUTS, POST_OUTPUTS, text, inner=True),
        _ensemble(),
        _model(options, BLS, CLIENT_INPUTS, CLIENT_OUTPUTS, {**text, **answers}, queue=_queue(options, most)),
        _model(options, GATE, (LENGTHS,), (LENGTHS,), {STATE: UP}),
    ]
    files = {f"{config['name']}/{CONFIG}": render(config) for config in configs}
    for name in (PREPROCESSING, ENGINE, POSTPROCESSING, BLS, GATE):
        files[f"{name}/{MODEL}"] = (CODE / name / MODEL).read_text(encoding="utf-8")
    return {**files, f"{ENSEMBLE}/{KEEP}": ""}  # Triton wants a version's directory, though an ensemble has nothing in it


def holds_repository(files: Mapping[str, str], model_repo: Path) -> bool:
    """Whether every one of ``files`` is in ``model_repo`` as it would be written, and nothing else."""
    present = [name for name in _entries(model_repo) if "__pycache__" not in name]
    return present == sorted(files) and all((model_repo / name).read_bytes() == text.encode() for name, text in files.items())


def _entries(model_repo: Path) -> list[str]:
    return sorted(str(path.relative_to(model_repo)) for path in model_repo.rglob("*") if not path.is_dir())


def write_repository(files: Mapping[str, str], model_repo: Path, *, overwrite: bool) -> None:
    """Write ``files`` so that ``model_repo`` has all of them, and no other, or is as it was.

    Raises :class:`RefusedError` when it holds anything without ``overwrite``, or something that is not a repository of ours.
    """
    if model_repo.exists() and not model_repo.is_dir():
        raise UsageError(f"--model_repo {model_repo} is a file, expected a directory.")
    present = _entries(model_repo)
    foreign = next((name for name in present if name not in files and "__pycache__" not in name), None)
    if foreign is not None:
        raise RefusedError(
            f"{model_repo} holds {foreign}, which is not part of this repository.",
            "Choose an empty or new --model_repo; --overwrite never deletes such files.",
        )
    if present and not overwrite:
        raise RefusedError(
            f"{model_repo} is not empty: it holds {present[0]}.", "Choose another --model_repo, or pass --overwrite."
        )
    whole = model_repo.resolve()
    partial, old = (whole.with_name(whole.name + ending) for ending in (PARTIAL, OLD))
    with named_errors(model_repo):
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        for name, text in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        if whole.exists():
            os.replace(whole, old)
        os.replace(partial, whole)
        shutil.rmtree(old, ignore_errors=True)


def _settings(options: RepositoryOptions) -> dict[str, str]:
    """Of the engine; what is not given is left out."""
    given = {
        "request_timeout_s": options.request_timeout_s,
        "device": options.device,
        "kv_cache_memory": options.kv_cache_memory,
        "max_tokens_in_paged_kv_cache": options.max_tokens_in_paged_kv_cache,
    }
    return {name: str(value) for name, value in given.items() if value is not None}


def _model(
    options: RepositoryOptions,
    name: str,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    parameters: Mapping[str, str],
    *,
    inner: bool = False,
    queue: Message | None = None,
) -> Message:
    """A model of our own code; one with a ``queue`` lets requests wait, and answers each with several responses."""
    several: Message = {} if queue is None else {"model_transaction_policy": {"decoupled": True}, "dynamic_batching": queue}
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": 1,
        **several,
        "input": [{**_tensor(tensor, inner=inner), "optional": True} for tensor in inputs],
        "output": [_tensor(tensor, inner=inner) for tensor in outputs],
        "instance_group": INSTANCES,
        "parameters": string_parameters({"EXECUTION_ENV_PATH": str(options.environment.resolve()), **parameters}),
    }


def _tensor(tensor: Tensor, *, inner: bool = False) -> Message:
    return {
        "name": inner_name(tensor) if inner else tensor.name,
        "data_type": Word(f"TYPE_{tensor.kind}"),
        "dims": list(tensor.dims),
    }


def _queue(options: RepositoryOptions, max_queue_size: int) -> Message:
    """Of Triton's scheduler, where requests wait while the engine has as many as it takes at once."""
    policy: dict[str, str | int | bool] = {"timeout_action": Word("REJECT"), "allow_timeout_override": True}
    if options.queue_timeout_s is not None:
        policy["default_timeout_microseconds"] = round(options.queue_timeout_s * 1e6)
    if max_queue_size:
        policy["max_queue_size"] = max_queue_size
    if not options.priority_levels:
        return {"default_queue_policy": policy}
    return {
        "priority_levels": options.priority_levels,
        "default_priority_level": (options.priority_levels + 1) // 2,
        "default_queue_policy": policy,
    }


def _ensemble() -> Message:
    """Preprocessing, engine, postprocessing in a row; what the client gives and gets has its outer name."""
    engine_inputs = {inner_name(tensor): tensor.name for tensor in PARAMETERS}
    engine_inputs |= {IDS: "_input_ids", LENGTHS.name: "_input_lengths"}
    engine_outputs = {inner_name(tensor): tensor.name for tensor in (*ABOUT, TOKEN_IDS)}
    engine_outputs |= {tensor.name: f"_{tensor.name}" for tensor in (*PIECES, TOP)}
    post_inputs = {inner_name(tensor): f"_{tensor.name}" for tensor in (*PIECES, TOP)}
    post_inputs |= {inner_name(tensor): tensor.name for tensor in (TOKEN_IDS, ABOUT[0])}
    return {
        "name": ENSEMBLE,
        "platform": "ensemble",
        "max_batch_size": 1,
        "input": [{**_tensor(tensor), "optional": True} for tensor in CLIENT_INPUTS],
        "output": [_tensor(tensor) for tensor in CLIENT_OUTPUTS],
        "ensemble_scheduling": {
            "step": [
                ensemble_step(
                    PREPROCESSING, {t.name: t.name for t in CLIENT_INPUTS}, {IDS: "_input_ids", LENGTHS.name: "_input_lengths"}
                ),
                ensemble_step(ENGINE, engine_inputs, engine_outputs),
                ensemble_step(POSTPROCESSING, post_inputs, {tensor.name: tensor.name for tensor in POST_OUTPUTS}),
            ]
        },
    }
