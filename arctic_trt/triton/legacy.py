"""A model repository for TensorRT-LLM's C++ backend of Triton, ``tensorrtllm``, releases 1.0 to 1.2: nothing is left to fill in.

``tensorrt_llm`` is the C++ backend on the engine; the models around it are ours, under the tensor names that its clients know.
Streaming goes through ``tensorrt_llm_bls``, which keeps each sequence's text: an ensemble's steps know one response at a time,
and cannot tell whether it begins with a space or in the middle of a character.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from arctic_trt.engine.config import TENSORRT_LLM, EngineConfig
from arctic_trt.engine.tensorrt_llm.versions import NEWEST, OLDEST, TOO_NEW, release_of
from arctic_trt.errors import RefusedError
from arctic_trt.triton.pbtxt import Message, Value, Word, ensemble_step, render, string_parameters

ENGINE_MODEL, BLS_MODEL = "tensorrt_llm", "tensorrt_llm_bls"
TEXT_MODELS = ("preprocessing", "postprocessing", BLS_MODEL)
MODEL_FILES = Path(__file__).with_name("legacy_models")
SHM_PREFIX = "arctic_trt_rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyOptions:
    """Where things are, and settings of the C++ backend; None keeps its default.

    ``environment`` is a virtual environment that has arctic-trt, for the Python models; None is the server's own Python.
    """

    engine_dir: Path
    tokenizer_dir: Path
    environment: Path | None = None
    max_queue_size: int = 0
    kv_cache_free_gpu_mem_fraction: float | None = None
    max_tokens_in_paged_kv_cache: int | None = None
    enable_chunked_context: bool = False
    batch_scheduler_policy: str = "guaranteed_no_evict"
    text_instances: int = 1


def tensor(name: str, dtype: str, *dims: int, optional: bool = False, scalar: bool = False, ragged: bool = False) -> Message:
    """One input or output of a ``config.pbtxt``; a ``scalar`` reaches the backend without its dimension of 1."""
    fields: dict[str, Value] = {"name": name, "data_type": Word(f"TYPE_{dtype}"), "dims": list(dims)}
    if scalar:
        fields["reshape"] = {"shape": []}
    if ragged:
        fields["allow_ragged_batch"] = True
    if optional:
        fields["optional"] = True
    return fields


def each(names: str, dtype: str, *, scalar: bool = False) -> tuple[Message, ...]:
    """Optional inputs of one number each."""
    return tuple(tensor(name, dtype, 1, optional=True, scalar=scalar) for name in names.split())


ENGINE_INPUTS = (
    tensor("input_ids", "INT32", -1, optional=True, ragged=True),
    tensor("input_lengths", "INT32", 1, scalar=True),
    tensor("request_output_len", "INT32", 1, scalar=True),
    tensor("stop_words_list", "INT32", 2, -1, optional=True, ragged=True),
    tensor("bad_words_list", "INT32", 2, -1, optional=True, ragged=True),
    tensor("embedding_bias", "FP32", -1, optional=True, ragged=True),
    *each("end_id pad_id num_return_sequences beam_width runtime_top_k min_tokens", "INT32", scalar=True),
    *each("temperature runtime_top_p len_penalty repetition_penalty presence_penalty frequency_penalty", "FP32", scalar=True),
    *each("seed", "UINT64", scalar=True),
    *each("return_log_probs return_context_logits return_generation_logits", "BOOL", scalar=True),
    *each("exclude_input_in_output stop streaming", "BOOL", scalar=True),
)
LOG_PROBS = (tensor("cum_log_probs", "FP32", -1), tensor("output_log_probs", "FP32", -1, -1))
INDICES = (tensor("batch_index", "INT32", 1), tensor("sequence_index", "INT32", 1))
LENGTHS = tensor("sequence_length", "INT32", -1)
LOGITS = (tensor("context_logits", "FP32", -1, -1), tensor("generation_logits", "FP32", -1, -1, -1))
"""The backend takes the logits' dtype from these; Arctic's engines compute them in float32."""
ENGINE_OUTPUTS = (tensor("output_ids", "INT32", -1, -1), LENGTHS, *LOG_PROBS, *LOGITS, *INDICES)

SAMPLING = {
    "num_return_sequences": "num_return_sequences",
    "beam_width": "beam_width",
    "top_k": "runtime_top_k",
    "min_tokens": "min_tokens",
    "temperature": "temperature",
    "top_p": "runtime_top_p",
    "length_penalty": "len_penalty",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "return_log_probs": "return_log_probs",
}
"""What clients send, and what the engine's model calls it."""
TEXT_INPUTS = (
    tensor("text_input", "STRING", 1),
    tensor("max_tokens", "INT32", 1),
    tensor("stop_words", "STRING", -1, optional=True),
    tensor("bad_words", "STRING", -1, optional=True),
    *each("end_id pad_id num_return_sequences beam_width top_k min_tokens", "INT32"),
    *each("temperature top_p length_penalty repetition_penalty presence_penalty frequency_penalty", "FP32"),
    *each("seed", "UINT64"),
    *each("return_log_probs exclude_input_in_output stream", "BOOL"),
)
TEXT_OUTPUTS = (tensor("text_output", "STRING", -1), LENGTHS, *LOG_PROBS, *INDICES)
PREPROCESSING_INPUTS = (
    tensor("QUERY", "STRING", 1),
    tensor("REQUEST_OUTPUT_LEN", "INT32", 1),
    tensor("STOP_WORDS_DICT", "STRING", -1, optional=True),
    tensor("BAD_WORDS_DICT", "STRING", -1, optional=True),
    *each("END_ID PAD_ID", "INT32"),
    *each("STREAM", "BOOL"),
)
PREPROCESSED = {
    "input_ids": "INPUT_ID",
    "input_lengths": "REQUEST_INPUT_LEN",
    "request_output_len": "OUT_REQUEST_OUTPUT_LEN",
    "stop_words_list": "STOP_WORDS_IDS",
    "bad_words_list": "BAD_WORDS_IDS",
    "end_id": "OUT_END_ID",
    "pad_id": "OUT_PAD_ID",
}
"""What the engine's model takes from preprocessing, and what that calls it."""
PREPROCESSING_OUTPUTS = tuple(
    tensor(PREPROCESSED[name], "INT32", *dims)
    for name, dims in ((str(given["name"]), given["dims"]) for given in ENGINE_INPUTS)
    if name in PREPROCESSED and isinstance(dims, list)
)
POSTPROCESSING_INPUTS = (
    tensor("TOKENS_BATCH", "INT32", -1, -1),
    tensor("SEQUENCE_LENGTH", "INT32", -1),
    tensor("STOP_WORDS_DICT", "STRING", -1, optional=True),
)
FIXED = {
    "exclude_input_in_output": "true",
    "enable_kv_cache_reuse": "true",
    "kv_cache_onboard_blocks": "true",
    "kv_cache_host_memory_bytes": "0",
    "normalize_log_probs": "true",
    "multi_block_mode": "true",
    "enable_context_fmha_fp32_acc": "false",
    "cuda_graph_mode": "false",
    "gpu_weights_percent": "1.0",
    "num_nodes": "1",
    "cancellation_check_period_ms": "100",
    "stats_check_period_ms": "100",
    "iter_stats_max_iterations": "1000",
    "request_stats_max_iterations": "0",
    "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
}
"""Mostly the backend's own defaults, written out so that whoever opens the file sees what can be changed."""


def plan_legacy_repository(engine: EngineConfig, options: LegacyOptions) -> dict[str, str]:
    """The files of the repository, by their paths in it. ``engine`` is what ``options.engine_dir`` says of itself.

    Raises :class:`RefusedError` for an engine of the torch backend, and for a version of TensorRT-LLM without this backend.
    """
    if engine.backend != TENSORRT_LLM:
        raise RefusedError(
            f"{options.engine_dir} is an engine of the {engine.backend} backend, which Triton's tensorrtllm cannot load.",
            "Use --backend python, or build the engine with TensorRT-LLM 1.0 to 1.2.",
        )
    if not OLDEST <= release_of(engine.version) < TOO_NEW:
        raise RefusedError(
            f"{options.engine_dir} was built by TensorRT-LLM {engine.version}, expected 1.0 to 1.2.",
            f"Build the engine again with tensorrt-llm=={NEWEST}, or with --backend torch.",
        )
    python = {name: (MODEL_FILES / name / "1" / "model.py").read_text(encoding="utf-8") for name in TEXT_MODELS}
    configs = {
        ENGINE_MODEL: _engine_model(engine, options),
        "ensemble": _ensemble(),
        "preprocessing": _python_model("preprocessing", PREPROCESSING_INPUTS, PREPROCESSING_OUTPUTS, options),
        "postprocessing": _python_model("postprocessing", POSTPROCESSING_INPUTS, (tensor("OUTPUT", "STRING", -1),), options),
        BLS_MODEL: _python_model(BLS_MODEL, TEXT_INPUTS, TEXT_OUTPUTS, options, decoupled=True),
    }
    files = {f"{name}/config.pbtxt": render(config) for name, config in configs.items()}
    files |= {f"{name}/1/model.py": text for name, text in python.items()}
    # Triton loads only models with a version folder, which exists where a file does.
    return files | {f"{name}/1/.keep": "" for name in (ENGINE_MODEL, "ensemble")}


def launch_command(model_repo: Path, world_size: int) -> str:
    """The command that serves ``model_repo``: under mpirun a server for each rank, of which the first one answers."""
    common = f"tritonserver --model-repository={model_repo} --disable-auto-complete-config"
    ranks = [
        f"-n 1 {common} --backend-config=python,shm-region-prefix-name={SHM_PREFIX}{rank}_"
        + (f" --model-control-mode=explicit --load-model={ENGINE_MODEL}" if rank else "")
        for rank in range(world_size)
    ]
    return "mpirun --allow-run-as-root " + " : ".join(ranks)


def _engine_model(engine: EngineConfig, options: LegacyOptions) -> dict[str, Value]:
    limits = engine.build_config
    return {
        "name": ENGINE_MODEL,
        "backend": "tensorrtllm",
        "max_batch_size": limits.max_batch_size,
        "model_transaction_policy": {"decoupled": True},
        "dynamic_batching": {
            "preferred_batch_size": [limits.max_batch_size],
            "max_queue_delay_microseconds": 0,
            "default_queue_policy": {"max_queue_size": options.max_queue_size},
        },
        "input": list(ENGINE_INPUTS),
        "output": list(ENGINE_OUTPUTS),
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
        "parameters": string_parameters(_engine_parameters(engine, options)),
    }


def _engine_parameters(engine: EngineConfig, options: LegacyOptions) -> dict[str, str]:
    """What the backend is told; a fraction or a number of tokens that is not given is its own decision.

    It reads ``tokenizer_dir`` and the two about guided decoding without asking whether they are there; empty, they switch it off.
    """
    given = {
        "kv_cache_free_gpu_mem_fraction": options.kv_cache_free_gpu_mem_fraction,
        "max_tokens_in_paged_kv_cache": options.max_tokens_in_paged_kv_cache,
    }
    return {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(options.engine_dir),
        "encoder_model_path": "",
        "tokenizer_dir": str(options.tokenizer_dir),
        "guided_decoding_backend": "",
        "xgrammar_tokenizer_info_path": "",
        "max_beam_width": str(engine.build_config.max_beam_width),
        "batch_scheduler_policy": options.batch_scheduler_policy,
        "enable_chunked_context": str(options.enable_chunked_context).lower(),
        **{name: str(value) for name, value in given.items() if value is not None},
        **FIXED,
    }


def _python_model(
    name: str, inputs: Iterable[Message], outputs: Iterable[Message], options: LegacyOptions, *, decoupled: bool = False
) -> dict[str, Value]:
    parameters = {"tokenizer_dir": str(options.tokenizer_dir)}
    if options.environment is not None:
        parameters["EXECUTION_ENV_PATH"] = str(options.environment)
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": 1,
        "model_transaction_policy": {"decoupled": decoupled},
        "input": list(inputs),
        "output": list(outputs),
        "instance_group": [{"count": options.text_instances, "kind": Word("KIND_CPU")}],
        "parameters": string_parameters(parameters),
    }


def _ensemble() -> dict[str, Value]:
    steps = [
        ensemble_step(
            "preprocessing",
            {
                "QUERY": "text_input",
                "REQUEST_OUTPUT_LEN": "max_tokens",
                "STOP_WORDS_DICT": "stop_words",
                "BAD_WORDS_DICT": "bad_words",
                "END_ID": "end_id",
                "PAD_ID": "pad_id",
                "STREAM": "stream",
            },
            {name: f"_{name}" for name in PREPROCESSED.values()},
        ),
        ensemble_step(
            ENGINE_MODEL,
            {
                **{name: f"_{output}" for name, output in PREPROCESSED.items()},
                "exclude_input_in_output": "exclude_input_in_output",
                **{theirs: ours for ours, theirs in SAMPLING.items()},
            },
            {"output_ids": "_TOKENS_BATCH", **{str(output["name"]): str(output["name"]) for output in TEXT_OUTPUTS[1:]}},
        ),
        ensemble_step(
            "postprocessing",
            {"TOKENS_BATCH": "_TOKENS_BATCH", "SEQUENCE_LENGTH": "sequence_length", "STOP_WORDS_DICT": "stop_words"},
            {"OUTPUT": "text_output"},
        ),
    ]
    return {
        "name": "ensemble",
        "platform": "ensemble",
        "max_batch_size": 1,
        "input": list(TEXT_INPUTS),
        "output": list(TEXT_OUTPUTS),
        "ensemble_scheduling": {"step": steps},
    }
