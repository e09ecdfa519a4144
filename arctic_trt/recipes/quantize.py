"""What ``arctic-trt quantize`` and ``arctic-trt plan`` are asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from arctic_trt.recipes.base import Recipe


class _Quantization(Recipe):
    """What decides the bytes of a quantization, and what it may take: common to doing it and to planning it."""

    qformat: Literal["fp8", "full_prec"] = "fp8"
    kv_cache_dtype: Literal["fp8", "none"] | None = None
    exclude_modules: tuple[str, ...] = ()
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
    def _exclusion_needs_fp8(self) -> _Quantization:
        if self.qformat == "full_prec" and self.exclude_modules:
            raise ValueError("--exclude_modules keeps parts of an FP8 checkpoint in bf16; with --qformat full_prec all of it is")
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
