"""``trtllm-build``. Source of names, signatures, order of checks and messages: ``tensorrt_llm/commands/build.py`` of 1.0 to 1.2.

``python -m tensorrt_llm.commands.build`` stands for the command.
"""

from __future__ import annotations

import argparse
import copy
import os
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.machinery import SourceFileLoader
from multiprocessing import get_context
from typing import Any

from tensorrt_llm.builder import LORA, BuildConfig, Engine, build
from tensorrt_llm.commands.flags import add_build_arguments
from tensorrt_llm.logger import logger
from tensorrt_llm.models import MODEL_MAP, PretrainedConfig
from tensorrt_llm.play import (
    HAS_AUTO_PARALLEL,
    IS_PYDANTIC,
    device_count,
    mpi_comm,
    mpi_rank,
    mpi_world_size,
    record,
    set_device,
)
from tensorrt_llm.plugin import PluginConfig, add_plugin_argument

FAILED = "Engine building failed, please check error log."
OF_THE_BUILD_CONFIG = (
    *("max_input_len", "max_seq_len", "max_batch_size", "max_beam_width", "max_num_tokens", "opt_num_tokens"),
    *("max_prompt_embedding_table_size", "gather_context_logits", "gather_generation_logits", "weight_sparsity"),
    *("profiling_verbosity", "enable_debug_output", "max_draft_len", "input_timing_cache", "output_timing_cache", "dry_run"),
    *("visualize_network", "max_encoder_input_len", "weight_streaming", "monitor_memory"),
)
FOR_BUILD_MODEL = (
    *("logits_dtype", "use_fused_mlp", "lora_dir", "lora_ckpt_source", "max_lora_rank", "lora_target_modules", "strip_plan"),
)
SPECULATIVE = {
    None: 1,
    "draft_tokens_external": 2,
    "medusa": 4,
    "lookahead_decoding": 8,
    "explicit_draft_tokens": 16,
    "eagle": 32,
}


def parse_arguments() -> argparse.ArgumentParser:
    """The parser, whatever the name says."""
    parser = argparse.ArgumentParser(prog="trtllm-build", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_build_arguments(parser)
    add_plugin_argument(parser.add_argument_group("Plugin config arguments"))  # type: ignore[arg-type]
    return parser


def build_model(
    build_config: BuildConfig,
    rank: int = 0,
    ckpt_dir: str | None = None,
    model_config: Any = None,
    model_cls: Any = None,
    dry_run: bool = False,
    **kwargs: Any,
) -> Engine:
    """One rank's engine, not saved."""
    record("build_model", rank=rank, build_config=build_config, ckpt_dir=ckpt_dir, dry_run=dry_run, **kwargs)
    config: PretrainedConfig = copy.deepcopy(model_config)
    config.logits_dtype = kwargs.get("logits_dtype") or config.logits_dtype
    assert not build_config.plugin_config.streamingllm, "StreamingLLM is no longer supported."
    assert not build_config.plugin_config.pp_reduce_scatter or config.architecture == "MixtralForCausalLM", (
        "PP reduce scatter is only supported in the mixtral model."
    )
    assert rank < config.mapping.world_size
    config.set_rank(rank)
    if model_cls is None:
        assert config.architecture in MODEL_MAP, f"Unsupported model architecture: {config.architecture}"
        model_cls = MODEL_MAP[config.architecture]
    model = model_cls(config) if ckpt_dir is None else model_cls.from_checkpoint(ckpt_dir, config=config)
    if build_config.plugin_config.lora_plugin is not None:
        lora = {"lora_dir": kwargs["lora_dir"] or [], "max_lora_rank": kwargs["max_lora_rank"]}
        build_config.lora_config = {**LORA, **lora, "lora_ckpt_source": kwargs["lora_ckpt_source"]}
    build_config.use_strip_plan = build_config.use_strip_plan or kwargs.pop("strip_plan", False)
    build_config.use_refit = kwargs.get("refit", False)
    return build(model, build_config)


def build_and_save(
    rank: int,
    gpu_id: int,
    ckpt_dir: str | None,
    build_config: BuildConfig,
    output_dir: str,
    log_level: str,
    model_config: PretrainedConfig,
    model_cls: Any,
    **kwargs: Any,
) -> bool:
    """Build one rank on one GPU and save it."""
    record("build_and_save", rank=rank, gpu_id=gpu_id, ckpt_dir=ckpt_dir, output_dir=output_dir, log_level=log_level, **kwargs)
    set_device(gpu_id)
    logger.set_level(log_level)
    engine = build_model(build_config, rank, ckpt_dir, model_config, model_cls=model_cls, **kwargs)
    assert engine is not None
    engine.save(output_dir)
    return True


def parallel_build(
    model_config: PretrainedConfig,
    ckpt_dir: str | None,
    build_config: BuildConfig,
    output_dir: str,
    workers: int = 1,
    log_level: str = "info",
    model_cls: Any = None,
    **kwargs: Any,
) -> None:
    """Build every rank: one after the other, in a pool, or shared among the processes of an MPI job."""
    record("parallel_build", ckpt_dir=ckpt_dir, output_dir=output_dir, workers=workers, log_level=log_level, **kwargs)
    ranks = range(model_config.mapping.world_size)
    rest = (ckpt_dir, build_config, output_dir, log_level, model_config, model_cls)
    if mpi_world_size() > 1:
        _build_under_mpi(ranks, rest, kwargs)
    elif workers == 1:
        for rank in ranks:
            assert build_and_save(rank, rank % workers, *rest, **kwargs), FAILED
    else:
        with ProcessPoolExecutor(mp_context=get_context("spawn"), max_workers=workers) as pool:
            futures = [pool.submit(build_and_save, rank, rank % workers, *rest, **kwargs) for rank in ranks]
            failures = 0
            for future in as_completed(futures):
                try:
                    future.result()
                except Exception:
                    traceback.print_exc()
                    failures += 1
            assert not failures, FAILED


def _build_under_mpi(ranks: range, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    failures = 0
    for rank in ranks[mpi_rank() :: mpi_world_size()]:
        try:
            build_and_save(rank, mpi_rank() % device_count(), *rest, **kwargs)
        except Exception:
            traceback.print_exc()
            failures += 1
    mpi_comm().Barrier()
    if failures:
        print(FAILED, flush=True)
        mpi_comm().Abort()


def main() -> None:
    """Parse ``sys.argv`` and build; the checks come in TensorRT-LLM's order, and raise what it raises."""
    args = parse_arguments().parse_args()
    record("main", **vars(args))
    logger.warning("Option --gather_generation_logits is deprecated, a build flag is not required anymore.")
    if args.gather_all_token_logits:
        args.gather_context_logits = args.gather_generation_logits = True
    if args.gather_context_logits and args.max_draft_len > 0:
        raise RuntimeError("Gather context logits is not support with draft len > 0. ")
    logger.set_level(args.log_level)
    os.makedirs(args.output_dir, exist_ok=True)
    model_cls = None
    if args.model_cls_file is not None:
        assert args.model_cls_name is not None
        model_cls = getattr(SourceFileLoader("models", args.model_cls_file).load_module(), args.model_cls_name)
    workers = min(device_count(), args.workers)
    plugin_config = PluginConfig.from_arguments(args)
    plugin_config.validate()
    if args.fast_build:
        plugin_config.manage_weights = True
    kwargs = {**{name: getattr(args, name) for name in FOR_BUILD_MODEL}, "refit": False}
    source = args.checkpoint_dir if args.checkpoint_dir is not None else args.model_config
    is_file = source.lower().endswith(".json")
    model_config = PretrainedConfig.from_json_file(source if is_file else os.path.join(source, "config.json"))
    if model_config.quantization.quant_algo not in (None, "FP8", "MIXED_PRECISION"):
        kwargs["use_fused_mlp"] = False
    build_config = _build_config(args, plugin_config)
    ckpt_dir = None if is_file else source
    parallel_build(model_config, ckpt_dir, build_config, args.output_dir, workers, args.log_level, model_cls, **kwargs)
    logger.info("Total time of building all engines: 00:00:00")


def _build_config(args: argparse.Namespace, plugin_config: PluginConfig) -> BuildConfig:
    """From the flags or from a file; 1.2 takes the plugins from the flags even then."""
    if args.build_config is not None:
        if not IS_PYDANTIC:
            return BuildConfig.from_json_file(args.build_config, plugin_config=plugin_config)  # type: ignore[call-arg, unused-ignore]
        config = BuildConfig.from_json_file(args.build_config)
        config.plugin_config = plugin_config
        return config
    if args.multiple_profiles == "enable" and args.opt_num_tokens is not None:
        raise RuntimeError("multiple_profiles is enabled, while opt_num_tokens is set. ")
    fields = {name: getattr(args, name) for name in OF_THE_BUILD_CONFIG}
    if HAS_AUTO_PARALLEL:
        fields["auto_parallel_config"] = {"world_size": args.auto_parallel, "gpus_per_node": args.gpus_per_node}
    return BuildConfig(
        **fields,
        kv_cache_type=getattr(args, "kv_cache_type", None),
        speculative_decoding_mode=SPECULATIVE[args.speculative_decoding_mode],
        force_num_profiles=os.environ.get("BUILDER_FORCE_NUM_PROFILES"),
        plugin_config=plugin_config,
    )


if __name__ == "__main__":
    main()
