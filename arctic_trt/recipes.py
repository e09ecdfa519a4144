"""What a command is asked to do, checked once at the boundary: flags over a YAML file over defaults, unknown keys refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arctic_trt.errors import UsageError


class Recipe(BaseModel):
    """Base of all recipes: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


class _Quantization(Recipe):
    """What decides the bytes of a quantization, and what it may take: common to doing it and to planning it."""

    qformat: Literal["fp8", "full_prec"] = "fp8"
    kv_cache_dtype: Literal["fp8", "none"] | None = None
    tp_size: int = Field(8, ge=1)
    pp_size: int = Field(1, ge=1)
    moe_tp_size: int | None = Field(None, ge=1)
    moe_ep_size: int | None = Field(None, ge=1)
    calib_dataset: str = "default"
    calib_size: int = Field(128, ge=1)
    calib_max_seq_length: int = Field(512, ge=1)
    batch_size: int = Field(1, ge=1)
    calibrator: Literal["streaming", "modelopt"] = "streaming"
    calib_algorithm: Literal["max", "mse", "local_hessian"] = "max"  # those that find maxima and leave the weights alone
    device: Literal["cpu", "cuda"] = "cpu"
    memory_budget: str | None = None

    @model_validator(mode="after")
    def _kv_cache_needs_scales(self) -> _Quantization:
        if self.qformat == "full_prec" and self.kv_cache_dtype == "fp8":
            raise ValueError("--kv_cache_dtype fp8 needs scales, which --qformat full_prec does not calibrate")
        return self

    @model_validator(mode="after")
    def _algorithms_are_modelopts(self) -> _Quantization:
        if self.calibrator == "streaming" and self.calib_algorithm != "max":
            raise ValueError(f"--calib_algorithm {self.calib_algorithm} needs --calibrator modelopt")
        return self

    @property
    def kv_fp8(self) -> bool:
        """FP8 KV cache: what an FP8 checkpoint has unless told otherwise."""
        return self.qformat == "fp8" and self.kv_cache_dtype != "none"


class QuantizeRecipe(_Quantization):
    """A quantization; field names are the flags of ``arctic-trt quantize`` and the keys of its YAML."""

    model_dir: Path
    output_dir: Path
    dtype: Literal["bfloat16", "auto"] = "bfloat16"
    seed: int = 1234
    workers: int = Field(1, ge=1)
    overwrite: bool = False


class PlanRecipe(_Quantization):
    """A forecast; field names are the flags of ``arctic-trt plan`` and the keys of its YAML.

    ``output_dir`` and ``memory_budget`` are refused when they do not suffice; left out, this machine's are reported.
    ``calib_dataset`` is not read: it is here so that a recipe of ``quantize`` can be planned as it is.
    """

    model: Path
    output_dir: Path | None = None
    max_batch_size: int = Field(8, ge=1)
    max_seq_len: int | None = Field(None, ge=1)
    max_num_tokens: int = Field(8192, ge=1)
    seconds: float = Field(10.0, gt=0, le=60)
    no_measure: bool = False


class BuildRecipe(Recipe):
    """A build; field names are the flags of ``arctic-trt build`` and the keys of its YAML.

    The limits default to what the engine's backend makes of their absence; plugins concern TensorRT-LLM alone.
    """

    checkpoint_dir: Path
    output_dir: Path
    backend: Literal["auto", "tensorrt_llm", "torch"] = "auto"
    workers: int | None = Field(None, ge=1)
    gpt_attention_plugin: str | None = None
    gemm_plugin: str | None = None
    moe_plugin: str | None = None
    use_fp8_context_fmha: Literal["enable", "disable"] | None = None
    max_batch_size: int = Field(256, ge=1)
    max_input_len: int | None = Field(None, ge=1)
    max_seq_len: int | None = Field(None, ge=1)
    max_num_tokens: int = Field(8192, ge=1)
    max_beam_width: int = Field(1, ge=1)
    overwrite: bool = False

    @property
    def plugins(self) -> dict[str, str]:
        """The flags about plugins that were given."""
        names = ("gpt_attention_plugin", "gemm_plugin", "moe_plugin", "use_fp8_context_fmha")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def resolve(kind: type[AnyRecipe], flags: Mapping[str, Any], config: Path | None = None) -> AnyRecipe:
    """Merge the flags that were given over the YAML file ``config`` over the defaults.

    Raises :class:`UsageError` naming the flag or the key, its value, and what is allowed.
    """
    from_file = read_yaml(config) if config else {}
    given = {name: value for name, value in flags.items() if value is not None}
    unknown = [key for key in from_file if key not in kind.model_fields]
    if unknown:
        raise UsageError(f"{config} has the unknown key {unknown[0]!r}.", _suggest(unknown[0], list(kind.model_fields)))
    try:
        return kind(**{**from_file, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:
            raise UsageError(f"{problem['msg'].removeprefix('Value error, ')}.") from None
        key = str(problem["loc"][0])
        origin = f"{config} has {key}" if key in from_file and key not in given else f"--{key}"
        if problem["type"] == "missing":
            raise UsageError(f"--{key} is required.") from None
        raise UsageError(f"{origin} {problem['input']!r} is not valid: {_lower(problem['msg'])}.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from disk; raises :class:`UsageError` when it is absent, malformed or no mapping."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.", "--config takes the path of a YAML recipe.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UsageError(f"{path} holds a {type(raw).__name__}, expected a mapping of flag names to values.")
    return raw


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(known)}."


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
