"""As much of a model as building needs: its configuration, and that its rank file exists.

Source: ``tensorrt_llm/models/modeling_utils.py``, ``tensorrt_llm/models/__init__.py``, ``tensorrt_llm/mapping.py`` of 1.0 to 1.2.
"""

from __future__ import annotations

import copy
import json
import os
from types import SimpleNamespace
from typing import Any

from tensorrt_llm.play import record


class PretrainedConfig:
    """A checkpoint's config.json, with a rank. ``mapping`` and ``quantization`` are read by attribute."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.architecture: str = fields["architecture"]
        self.dtype: str = fields["dtype"]
        self.logits_dtype: str = fields.get("logits_dtype", "float32")
        self.max_position_embeddings: int | None = fields.get("max_position_embeddings")
        mapping = {"tp_size": 1, "pp_size": 1, "cp_size": 1, "gpus_per_node": 8, **fields.get("mapping", {})}
        self.mapping = SimpleNamespace(**mapping, rank=0)
        if self.mapping.world_size != mapping["tp_size"] * mapping["pp_size"] * mapping["cp_size"]:
            raise ValueError("world_size must equal tp_size * pp_size * cp_size")
        quantization = fields.get("quantization") or {}
        self.quantization = SimpleNamespace(**{"quant_algo": None, "kv_cache_quant_algo": None, **quantization})

    @classmethod
    def from_json_file(cls, config_file: str) -> PretrainedConfig:
        with open(config_file) as file:
            return cls(json.load(file))

    def set_rank(self, rank: int) -> None:
        self.mapping.rank = rank

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it; the rank is not part of it."""
        mapping = {name: value for name, value in vars(self.mapping).items() if name != "rank"}
        return {**copy.deepcopy(self.fields), "logits_dtype": self.logits_dtype, "mapping": mapping}

    def as_dict(self) -> dict[str, Any]:
        return self.to_dict()


class StandInModel:
    """A model of any architecture; its weights are not read."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str, config: PretrainedConfig | None = None) -> StandInModel:
        """Raises AssertionError where the rank's weights are missing."""
        config = config or PretrainedConfig.from_json_file(os.path.join(ckpt_dir, "config.json"))
        weights = os.path.join(ckpt_dir, f"rank{config.mapping.rank}.safetensors")
        record("from_checkpoint", rank=config.mapping.rank, ckpt_dir=ckpt_dir)
        assert os.path.isfile(weights), f"{weights} does not exist"
        return cls(config)


ARCHITECTURES = ("ArcticForCausalLM", "LlamaForCausalLM", "MixtralForCausalLM", "MistralForCausalLM")
MODEL_MAP: dict[str, type[StandInModel]] = dict.fromkeys(ARCHITECTURES, StandInModel)
