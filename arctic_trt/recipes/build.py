"""What ``arctic-trt build`` is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from arctic_trt.recipes.base import Recipe
from arctic_trt.recipes.trtllm_build import REMOVED, TrtLlmBuildFlags, trtllm_flags


class Expects(Recipe):
    """What a recipe for a machine was computed for; a checkpoint of another kind is refused."""

    machine: str
    tp_size: int = Field(ge=1)
    pp_size: int = Field(1, ge=1)
    qformat: Literal["fp8", "full_prec"] = "fp8"
    kv_cache_dtype: Literal["fp8", "none"] = "fp8"


class BuildRecipe(TrtLlmBuildFlags):
    """A build; field names are the flags of ``arctic-trt build`` and the keys of its YAML.

    What :class:`TrtLlmBuildFlags` contributes, ``ranks`` and ``timing_cache_dir`` concern TensorRT-LLM alone. ``expects`` has
    no flag: it belongs to recipes for a machine.
    """

    removed: ClassVar[Mapping[str, str]] = REMOVED

    checkpoint_dir: Path
    output_dir: Path
    backend: Literal["auto", "tensorrt_llm", "torch"] = "auto"
    workers: int | None = Field(None, ge=1)
    ranks: str | None = None
    timing_cache_dir: Path | None = None
    max_batch_size: int = Field(256, ge=1)
    max_input_len: int | None = Field(None, ge=1)
    max_seq_len: int | None = Field(None, ge=1)
    max_num_tokens: int = Field(8192, ge=1)
    max_beam_width: int = Field(1, ge=1)
    overwrite: bool = False
    expects: Expects | None = None

    @field_validator("ranks", mode="before")
    @classmethod
    def _one_rank_is_a_list(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @property
    def trtllm_only(self) -> list[str]:
        """The flags that were given and mean nothing to the torch backend."""
        names = (*trtllm_flags(), "ranks", "timing_cache_dir")
        return [name for name in names if getattr(self, name) is not None]
