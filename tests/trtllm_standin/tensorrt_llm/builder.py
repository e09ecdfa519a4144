"""Building without TensorRT. Source: ``tensorrt_llm/builder.py`` of 1.0.0, 1.1.0 (a dataclass) and 1.2.1 (a pydantic model)."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from tensorrt_llm.kv_cache_type import KVCacheType
from tensorrt_llm.logger import logger
from tensorrt_llm.models import PretrainedConfig, StandInModel
from tensorrt_llm.play import HAS_AUTO_PARALLEL, IS_PYDANTIC, VERSION, build_fault, record
from tensorrt_llm.plugin import PluginConfig

LORA: dict[str, Any] = {
    "lora_dir": [],
    "lora_ckpt_source": "hf",
    "max_lora_rank": 64,
    "lora_target_modules": [],
    "trtllm_modules_to_hf_modules": {},
}
DEFAULTS: dict[str, Any] = {
    "max_input_len": 1024,
    "max_seq_len": None,
    "opt_batch_size": 8,
    "max_batch_size": 2048,
    "max_beam_width": 1,
    "max_num_tokens": 8192,
    "opt_num_tokens": None,
    "max_prompt_embedding_table_size": 0,
    "kv_cache_type": None,
    "gather_context_logits": False,
    "gather_generation_logits": False,
    "strongly_typed": True,
    "force_num_profiles": None,
    "profiling_verbosity": "layer_names_only",
    "enable_debug_output": False,
    "max_draft_len": 0,
    "speculative_decoding_mode": 1,
    "use_refit": False,
    "input_timing_cache": None,
    "output_timing_cache": "model.cache",
    "lora_config": LORA,
    **({"auto_parallel_config": {"world_size": 1, "gpus_per_node": 8}} if HAS_AUTO_PARALLEL else {}),
    "weight_sparsity": False,
    "weight_streaming": False,
    "plugin_config": None,
    "use_strip_plan": False,
    "max_encoder_input_len": 1024,
    "dry_run": False,
    "visualize_network": None,
    "monitor_memory": False,
    "use_mrope": False,
}
NOT_OF_THE_ENGINE = ("dry_run", "visualize_network")


class BuildConfig(SimpleNamespace):
    """The fields of :data:`DEFAULTS`, and no others."""

    plugin_config: Any
    kv_cache_type: Any

    def __init__(self, **fields: Any) -> None:
        unknown = set(fields) - set(DEFAULTS)
        if unknown:
            raise TypeError(f"BuildConfig got unexpected fields: {', '.join(sorted(unknown))}")
        super().__init__(**{**copy.deepcopy(DEFAULTS), **fields})
        if not isinstance(self.plugin_config, PluginConfig):
            self.plugin_config = PluginConfig.from_arguments(Namespace(**(self.plugin_config or {})))
        if isinstance(self.kv_cache_type, str):
            self.kv_cache_type = KVCacheType(self.kv_cache_type)

    def as_dict(self) -> dict[str, Any]:
        """Every field as JSON has it."""
        fields = copy.deepcopy(vars(self))
        kind = fields["kv_cache_type"]
        fields["kv_cache_type"] = kind and (kind.value if IS_PYDANTIC else kind.name)
        fields["plugin_config"] = self.plugin_config.as_dict()
        return fields

    if IS_PYDANTIC:

        @classmethod
        def from_json_file(cls, config_file: str) -> BuildConfig:
            with open(config_file) as file:
                return cls(**json.load(file))

        def model_dump(self, mode: str = "python") -> dict[str, Any]:
            return self.as_dict()

    else:

        @classmethod
        def from_dict(cls, config: dict[str, Any], plugin_config: PluginConfig | None = None) -> BuildConfig:
            config = copy.deepcopy(config)
            plugins = plugin_config or PluginConfig()
            plugins.update_from_dict(config.pop("plugin_config", {}))
            return cls(**{name: value for name, value in config.items() if name in DEFAULTS}, plugin_config=plugins)

        @classmethod
        def from_json_file(cls, config_file: str, plugin_config: PluginConfig | None = None) -> BuildConfig:
            with open(config_file) as file:
                return cls.from_dict(json.load(file), plugin_config=plugin_config)

        def to_dict(self) -> dict[str, Any]:
            return self.as_dict()

        def update_from_dict(self, config: dict[str, Any]) -> None:
            for name, value in config.items():
                if name not in DEFAULTS:
                    raise AttributeError(f"{self.__class__} object has no attribute {name}")
                setattr(self, name, value)

        def update(self, **kwargs: Any) -> None:
            self.update_from_dict(kwargs)


class EngineConfig:
    """What config.json holds."""

    def __init__(self, pretrained_config: PretrainedConfig, build_config: BuildConfig, version: str) -> None:
        self.pretrained_config = pretrained_config
        self.build_config = build_config
        self.version = version

    @classmethod
    def from_json_file(cls, config_file: str) -> EngineConfig:
        with open(config_file) as file:
            return cls.from_json_str(file.read())

    @classmethod
    def from_json_str(cls, config_str: str) -> EngineConfig:
        config = json.loads(config_str)
        build = {name: value for name, value in config["build_config"].items() if name in DEFAULTS}
        return cls(PretrainedConfig(config["pretrained_config"]), BuildConfig(**build), config["version"])

    def to_dict(self) -> dict[str, Any]:
        build = {name: value for name, value in self.build_config.as_dict().items() if name not in NOT_OF_THE_ENGINE}
        return {"version": self.version, "pretrained_config": self.pretrained_config.to_dict(), "build_config": build}


class Engine:
    """One rank: a line of JSON that tells the rank and what it was built with."""

    def __init__(
        self,
        config: EngineConfig,
        engine: bytes | None,
        managed_weights: dict[str, Any] = {},  # noqa: B006 -- as in TensorRT-LLM
    ) -> None:
        self.config = config
        self.engine = engine
        self.managed_weights = managed_weights or {}

    def save(self, engine_dir: str) -> None:
        """Write ``rank{r}.engine``, and on rank 0 ``config.json``; what else is in the directory stays."""
        rank = self.config.pretrained_config.mapping.rank
        record("Engine.save", rank=rank, engine_dir=engine_dir)
        os.makedirs(engine_dir, exist_ok=True)
        if rank == 0:
            with open(os.path.join(engine_dir, "config.json"), "w", encoding="utf-8") as file:
                json.dump(self.config.to_dict(), file, indent=4)
        if self.engine is not None:
            with open(os.path.join(engine_dir, f"rank{rank}.engine"), "wb") as engine:
                engine.write(self.engine)

    @classmethod
    def from_dir(cls, engine_dir: str, rank: int = 0) -> Engine:
        with open(os.path.join(engine_dir, f"rank{rank}.engine"), "rb") as file:
            buffer = file.read()
        config = EngineConfig.from_json_file(os.path.join(engine_dir, "config.json"))
        config.pretrained_config.set_rank(rank)
        return cls(config, buffer)


def get_engine_version(engine_dir: str) -> str | None:
    """The version of TensorRT-LLM that built an engine."""
    with open(os.path.join(engine_dir, "config.json")) as file:
        version: str | None = json.load(file).get("version")
    return version


def build(model: StandInModel, build_config: BuildConfig) -> Engine:
    """An engine for one rank. As in TensorRT-LLM, every rank reads the timing cache and rank 0 alone writes one."""
    config = copy.deepcopy(build_config)
    rank = model.config.mapping.rank
    _resolve(config, model.config)
    if config.input_timing_cache is not None and not os.path.exists(config.input_timing_cache):
        logger.warning("Invalid timing cache, using freshly created one")
    logger.info(f"Build TensorRT engine Unnamed Network 0 (rank {rank})")
    build_fault(rank)
    line = json.dumps({"rank": rank, "digest": _digest(config, model.config)}) + "\n"
    engine = Engine(EngineConfig(model.config, config, VERSION), None if config.dry_run else line.encode())
    if config.output_timing_cache is not None and rank == 0:
        with open(config.output_timing_cache, "wb") as file:
            file.write(b"stand-in timing cache\n")
        logger.info(f"Timing cache serialized to {config.output_timing_cache}")
    return engine


def _resolve(config: BuildConfig, model: PretrainedConfig) -> None:
    """What TensorRT-LLM settles before it builds: lengths, the KV cache, attention over prompts in FP8."""
    plugins = config.plugin_config
    plugins.dtype = model.dtype
    paged = plugins.paged_kv_cache
    if config.kv_cache_type is None:
        config.kv_cache_type = KVCacheType.CONTINUOUS if paged is False else KVCacheType.PAGED
    assert paged is None or paged == (config.kv_cache_type is KVCacheType.PAGED)
    plugins.paged_kv_cache = config.kv_cache_type is KVCacheType.PAGED
    plugins.paged_state = False
    if config.max_seq_len is None:
        config.max_seq_len = int(model.max_position_embeddings or 2048)
    config.max_input_len = min(config.max_input_len, config.max_seq_len)
    config.opt_num_tokens = config.opt_num_tokens or min(config.max_batch_size * config.max_beam_width, config.max_num_tokens)
    fp8 = model.quantization.quant_algo == "FP8"
    fp8_cache = model.quantization.kv_cache_quant_algo == "FP8"
    if not plugins.context_fmha:
        plugins.use_fp8_context_fmha = plugins.use_paged_context_fmha = False
    elif not fp8:
        plugins.use_fp8_context_fmha = False
    elif plugins.use_paged_context_fmha:
        plugins.use_fp8_context_fmha = fp8_cache
    plugins.nccl_plugin = model.dtype if model.mapping.world_size > 1 else None


def _digest(config: BuildConfig, model: PretrainedConfig) -> str:
    """Over everything that the engine depends on, and no path."""
    fields = {name: value for name, value in config.as_dict().items() if not name.endswith("timing_cache")}
    return hashlib.sha256(json.dumps([VERSION, fields, model.to_dict()], sort_keys=True).encode()).hexdigest()
