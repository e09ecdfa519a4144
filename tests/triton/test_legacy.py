"""The repository for TensorRT-LLM's C++ backend: what its loader asks for is there, and Triton itself can read it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.engine.config import BuildConfig, EngineConfig
from arctic_trt.errors import RefusedError
from arctic_trt.triton.legacy import LegacyOptions, launch_command, plan_legacy_repository

LIMITS = BuildConfig(max_batch_size=64, max_input_len=2048, max_seq_len=4096, max_num_tokens=8192, max_beam_width=1)
OPTIONS = LegacyOptions(engine_dir=Path("/engines/arctic"), tokenizer_dir=Path("/models/arctic"))
MODELS = {"preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls"}
UNGUARDED = {"gpt_model_type", "tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"}
"""Keys whose absence the backend's loader does not survive, in 1.0, 1.1 and 1.2 alike; one of the two paths besides."""
BOOLEANS = {"true", "false"}
NUMBERS = {
    **dict.fromkeys(("max_beam_width", "num_nodes", "cancellation_check_period_ms", "stats_check_period_ms"), int),
    **dict.fromkeys(("iter_stats_max_iterations", "request_stats_max_iterations", "kv_cache_host_memory_bytes"), int),
    **dict.fromkeys(("gpu_weights_percent", "kv_cache_free_gpu_mem_fraction"), float),
    "max_tokens_in_paged_kv_cache": int,
}
SWITCHES = (
    *("enable_kv_cache_reuse", "kv_cache_onboard_blocks", "exclude_input_in_output", "normalize_log_probs"),
    *("enable_chunked_context", "multi_block_mode", "enable_context_fmha_fp32_acc", "cuda_graph_mode"),
)
"""The loader takes what is neither of these for "not specified", without a word to the user."""


def engine(version: str = "1.2.1", backend: str = "tensorrt_llm", **limits: int) -> EngineConfig:
    return EngineConfig(version=version, backend=backend, pretrained_config={}, build_config=replace(LIMITS, **limits))


def plan(config: EngineConfig | None = None, **options: Any) -> dict[str, str]:
    return plan_legacy_repository(config or engine(), replace(OPTIONS, **options))


def parse(files: dict[str, str], model: str) -> Any:
    """``config.pbtxt`` as Triton's own description of it reads it: unknown fields and wrong words are errors."""
    config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(files[f"{model}/config.pbtxt"], config.ModelConfig())


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.1"])
def test_all_that_the_loader_requires_is_there(version: str) -> None:
    config = parse(plan(engine(version)), "tensorrt_llm")
    given = parameters(config)
    assert given.keys() >= UNGUARDED
    assert given["gpt_model_type"] in ("V1", "v1", "inflight_batching", "inflight_fused_batching")
    assert given["gpt_model_path"] == "/engines/arctic"
    assert given["guided_decoding_backend"] == "", "anything else asks for a file"
    assert given["batch_scheduler_policy"] in ("guaranteed_no_evict", "max_utilization")
    assert given.get("decoding_mode") != "lookahead", "which has three more required keys"
    assert {given[name] for name in SWITCHES} <= BOOLEANS
    assert all(kind(given[name]) >= 0 for name, kind in NUMBERS.items() if name in given)
    assert (config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == ("tensorrtllm", 64, True)
    required = {item.name for item in config.input if not item.optional}
    assert required == {"input_lengths", "request_output_len"}
    assert {"output_ids", "sequence_length"} <= {item.name for item in config.output}
    logits = [item.data_type for item in config.output if item.name.endswith("_logits")]
    assert logits == [config.output[2].data_type] * 2, "the loader takes their dtype from here: TYPE_FP32"


def test_nothing_is_left_to_fill_in() -> None:
    for path, text in plan().items():
        assert "${" not in text, path


def test_every_model_can_be_read_and_has_a_version() -> None:
    files = plan()
    assert {path.split("/")[0] for path in files} == MODELS
    for model in MODELS:
        assert parse(files, model).name == model
        assert any(path.startswith(f"{model}/1/") for path in files)


def test_the_ensemble_joins_tensors_that_exist_and_are_of_one_kind() -> None:
    files = plan()
    ensemble = parse(files, "ensemble")
    kinds = {item.name: item.data_type for item in (*ensemble.input, *ensemble.output)}
    made = {item.name for item in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = parse(files, step.model_name)
        assert model.max_batch_size >= ensemble.max_batch_size
        inputs, outputs = ({item.name: item for item in items} for items in (model.input, model.output))
        assert {name for name, item in inputs.items() if not item.optional} <= step.input_map.keys()
        for inner, outer in step.input_map.items():
            assert outer in made and kinds[outer] == inputs[inner].data_type
        for inner, outer in step.output_map.items():
            made.add(outer)
            assert kinds.setdefault(outer, outputs[inner].data_type) == outputs[inner].data_type
    assert {item.name for item in ensemble.output} <= made
    bls = parse(files, "tensorrt_llm_bls")
    assert list(bls.input) == list(ensemble.input) and list(bls.output) == list(ensemble.output)
    assert bls.model_transaction_policy.decoupled


def test_settings_arrive() -> None:
    files = plan(
        engine(max_batch_size=8),
        environment=Path("/opt/arctic"),
        max_queue_size=100,
        kv_cache_free_gpu_mem_fraction=0.8,
        max_tokens_in_paged_kv_cache=4096,
        enable_chunked_context=True,
        batch_scheduler_policy="max_utilization",
    )
    config = parse(files, "tensorrt_llm")
    assert config.max_batch_size == 8
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 100
    given = parameters(config)
    assert given["kv_cache_free_gpu_mem_fraction"] == "0.8"
    assert given["max_tokens_in_paged_kv_cache"] == "4096"
    assert given["enable_chunked_context"] == "true"
    assert given["batch_scheduler_policy"] == "max_utilization"
    assert parameters(parse(files, "preprocessing"))["EXECUTION_ENV_PATH"] == "/opt/arctic"
    assert "EXECUTION_ENV_PATH" not in given, "of Python models alone"
    assert "EXECUTION_ENV_PATH" not in parameters(parse(plan(), "postprocessing"))


def test_paths_with_quotes_survive() -> None:
    odd = Path('/engines/a "b"\\c/é')
    assert parameters(parse(plan(engine_dir=odd), "tensorrt_llm"))["gpt_model_path"] == str(odd)


def test_engines_that_the_backend_cannot_load_are_refused() -> None:
    with pytest.raises(RefusedError, match=r"/engines/arctic is an engine of the torch backend.*Use --backend python"):
        plan(engine(backend="torch"))
    with pytest.raises(RefusedError, match=r"built by TensorRT-LLM 1\.3\.0, expected 1\.0 to 1\.2"):
        plan(engine("1.3.0"))
    with pytest.raises(RefusedError, match=r"built by TensorRT-LLM 0\.17\.0"):
        plan(engine("0.17.0"))


def test_a_server_for_each_rank_of_which_one_loads_all_models() -> None:
    command = launch_command(Path("repo"), 3)
    servers = command.removeprefix("mpirun --allow-run-as-root ").split(" : ")
    assert len(servers) == 3
    assert all(server.startswith("-n 1 tritonserver --model-repository=repo ") for server in servers)
    assert ["--model-control-mode=explicit --load-model=tensorrt_llm" in server for server in servers] == [False, True, True]
    prefixes = re.findall("shm-region-prefix-name=([^ ]+)", command)
    assert len(set(prefixes)) == 3
