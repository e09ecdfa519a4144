"""Plugin settings. Source: ``tensorrt_llm/plugin/plugin.py`` of 1.0.0, 1.1.0 (a dataclass) and 1.2.1 (a pydantic model).

All three have the same fields; what differs is how a configuration is made, written out, and what a wrong value raises.
"""

from __future__ import annotations

import argparse
from typing import Any

from tensorrt_llm.play import IS_PYDANTIC, sm_version

DTYPES = ("auto", "float16", "float32", "bfloat16", "int32")
GEMM = (*DTYPES, "fp8", "nvfp4")
FP8 = ("fp8",)
HALVES = ("float16", "bfloat16")

PLUGINS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "bert_attention_plugin": (DTYPES, "auto"),
    "gpt_attention_plugin": (DTYPES, "auto"),
    "gemm_plugin": (GEMM, None),
    "gemm_swiglu_plugin": (FP8, None),
    "fp8_rowwise_gemm_plugin": (DTYPES, None),
    "qserve_gemm_plugin": (DTYPES, None),
    "identity_plugin": (DTYPES, None),
    "nccl_plugin": (DTYPES, "auto"),
    "lora_plugin": (DTYPES, None),
    "weight_only_groupwise_quant_matmul_plugin": (DTYPES, None),
    "weight_only_quant_matmul_plugin": (DTYPES, None),
    "smooth_quant_gemm_plugin": (DTYPES, None),
    "layernorm_quantization_plugin": (DTYPES, None),
    "rmsnorm_quantization_plugin": (DTYPES, None),
    "moe_plugin": (DTYPES, "auto"),
    "mamba_conv1d_plugin": (DTYPES, "auto"),
    "low_latency_gemm_plugin": (FP8, None),
    "low_latency_gemm_swiglu_plugin": (FP8, None),
    "gemm_allreduce_plugin": (HALVES, None),
}
"""Values of a plugin besides None, and its default."""

FEATURES: dict[str, bool] = {
    "dora_plugin": False,
    "smooth_quant_plugins": True,
    "quantize_per_token_plugin": False,
    "quantize_tensor_plugin": False,
    "context_fmha": True,
    "bert_context_fmha_fp32_acc": False,
    "remove_input_padding": True,
    "norm_quant_fusion": False,
    "reduce_fusion": False,
    "user_buffer": False,
    "use_paged_context_fmha": True,
    "use_fp8_context_fmha": True,
    "fuse_fp4_quant": False,
    "multiple_profiles": False,
    "paged_state": True,
    "streamingllm": False,
    "manage_weights": False,
    "use_fused_mlp": True,
    "pp_reduce_scatter": False,
}

OTHERS: dict[str, Any] = {"dtype": "float16", "paged_kv_cache": None, "tokens_per_block": 32}
DEFAULTS: dict[str, Any] = {**OTHERS, **{name: default for name, (_, default) in PLUGINS.items()}, **FEATURES}

NOT_FLAGS = {
    "dtype",
    "qserve_gemm_plugin",
    "identity_plugin",
    "weight_only_groupwise_quant_matmul_plugin",
    "weight_only_quant_matmul_plugin",
    "smooth_quant_plugins",
    "smooth_quant_gemm_plugin",
    "layernorm_quantization_plugin",
    "rmsnorm_quantization_plugin",
    "quantize_per_token_plugin",
    "quantize_tensor_plugin",
    "paged_kv_cache",
    "manage_weights",
}
cli_plugin_args = [name for name in DEFAULTS if name not in NOT_FLAGS]
LACKING_ON_SM100 = ("gemm_swiglu_plugin", "fp8_rowwise_gemm_plugin", "low_latency_gemm_plugin", "low_latency_gemm_swiglu_plugin")


class PluginConfig:
    """The fields of :data:`DEFAULTS`, and no others. ``auto`` reads as the value of ``dtype``."""

    def __init__(self, **fields: Any) -> None:
        unknown = set(fields) - (set(DEFAULTS) if IS_PYDANTIC else {"_explicitly_disable_gemm_plugin"})
        if unknown:
            raise TypeError(f"PluginConfig got unexpected fields: {', '.join(sorted(unknown))}")
        object.__setattr__(self, "_fields", dict(DEFAULTS))
        object.__setattr__(self, "_explicitly_disable_gemm_plugin", fields.pop("_explicitly_disable_gemm_plugin", False))
        for name, value in fields.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in DEFAULTS:
            raise AttributeError(name)
        value = self._fields[name]
        return self._fields["dtype"] if value == "auto" else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_explicitly_disable_gemm_plugin":
            object.__setattr__(self, name, value)
            return
        if name not in DEFAULTS:
            raise (ValueError if IS_PYDANTIC else AttributeError)(f"PluginConfig has no field {name!r}")
        if IS_PYDANTIC:
            value = _switched(name, value)
        if not _fits(name, value):
            raise (ValueError if IS_PYDANTIC else AssertionError)(f"Plugin {name} got {value!r}")
        self._fields[name] = value

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> PluginConfig:
        """From parsed flags; those that are not plugins are passed over."""
        config = cls()
        for name, value in vars(args).items():
            if name in DEFAULTS:
                setattr(config, name, _switched(name, value))
        config._explicitly_disable_gemm_plugin = getattr(args, "gemm_plugin", None) == "disable"
        return config

    def validate(self) -> None:
        """Refuse what the GPU lacks."""
        for name in LACKING_ON_SM100 if sm_version() == 100 else ():
            if getattr(self, name):
                raise NotImplementedError(f"{name}={getattr(self, name)} is not supported on SM 100.")

    def as_dict(self) -> dict[str, Any]:
        """Every field as it is stored, under the name that the played version gives it in config.json."""
        fields = dict(self._fields)
        return fields if IS_PYDANTIC else {**fields, "explicitly_disable_gemm_plugin": self._explicitly_disable_gemm_plugin}

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    if IS_PYDANTIC:

        def model_dump(self, mode: str = "python") -> dict[str, Any]:
            return self.as_dict()

    else:

        def to_dict(self) -> dict[str, Any]:
            return self.as_dict()

        def update_from_dict(self, config: dict[str, Any]) -> None:
            for name in set(config) & set(DEFAULTS):
                setattr(self, name, _switched(name, config[name]))

        @classmethod
        def from_dict(cls, config: dict[str, Any]) -> PluginConfig:
            made = cls()
            made.update_from_dict(config)
            return made


def add_plugin_argument(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a flag for every field in :data:`cli_plugin_args`."""
    for name in cli_plugin_args:
        default = DEFAULTS[name]
        if name in PLUGINS:
            shown = default if name == "gemm_plugin" else default or "disable"
            parser.add_argument(f"--{name}", type=str, default=shown, choices=[*PLUGINS[name][0], "disable"])
        elif name in FEATURES:
            parser.add_argument(f"--{name}", type=str, default="enable" if default else "disable", choices=["enable", "disable"])
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def _switched(name: str, value: Any) -> Any:
    """``enable`` and ``disable`` as the values that the field holds."""
    if value == "enable":
        return True
    if value == "disable":
        return None if name in PLUGINS else False
    return value


def _fits(name: str, value: Any) -> bool:
    if name in PLUGINS:
        return value is None or value in PLUGINS[name][0]
    if name in FEATURES:
        return isinstance(value, bool)
    if name == "dtype":
        return value not in ("auto", None)
    return isinstance(value, int) or (name == "paged_kv_cache" and value is None)
