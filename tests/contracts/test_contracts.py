"""What TensorRT-LLM's own network expects of every rank: names, shapes, dtypes, and the keys of config.json.

Each JSON file lists the parameters that TensorRT-LLM's ``LLaMAForCausalLM`` creates for an Arctic of these dimensions, on one
pipeline stage; all its layers and all the ranks listed have the same. What TensorRT-LLM makes of others while it loads, the
reciprocals of the KV scales, is not listed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from arctic_trt.checkpoint.contract import QuantFormat, parse_pretrained_config, plan_config, plan_rank
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.mapping import Mapping, plan_mapping
from tests.support.checkpoints import TINY
from tests.support.jobs import quantize

Contents = dict[str, tuple[str, tuple[int, ...]]]

FILES = sorted(Path(__file__).parent.glob("*.json"))
SPELLING = {"F8_E4M3": "FP8", "BF16": "BF16", "F32": "FLOAT"}


class Contract:
    def __init__(self, path: Path) -> None:
        raw = json.loads(path.read_text())
        self.raw_config: dict[str, Any] = {**TINY, **raw["config"]}
        sizes = {key: raw[key] for key in ("tp_size", "pp_size", "moe_ep_size") if key in raw}
        self.mapping: Mapping = plan_mapping(self.config, **sizes)
        self.fp8: bool = raw["fp8"]
        self.ranks: list[int] = raw["ranks"]
        layers = range(raw.get("layers", self.config.num_hidden_layers))
        every = {f"transformer.layers.{i}.{name}": entry for i in layers for name, entry in raw["every_layer"].items()}
        self.contents: Contents = {name: (dtype, tuple(shape)) for name, (dtype, *shape) in {**raw["other"], **every}.items()}

    @property
    def config(self) -> ArcticConfig:
        return parse_config(self.raw_config)

    @property
    def quant(self) -> QuantFormat:
        return QuantFormat(fp8=self.fp8, kv_fp8=self.fp8)


def test_all_contracts_are_here() -> None:
    assert [path.stem for path in FILES] == [
        "arctic_bf16_tp8_pp2_stage0",
        "arctic_bf16_tp8_pp2_stage1",
        "arctic_fp8_tp1",
        "arctic_fp8_tp2",
        "arctic_fp8_tp4_pp2_stage0",
        "arctic_fp8_tp4_pp2_stage1",
        "arctic_fp8_tp8_ep8",
        "arctic_fp8_tp8_rank0",
        "tiny_bf16_tp2",
        "tiny_fp8_tp1",
        "tiny_fp8_tp2",
        "tiny_fp8_tp2_pp2_stage0",
        "tiny_fp8_tp2_pp2_stage1",
        "tiny_fp8_tp4_ep4",
        "tiny_fp8_tp8",
    ]


def test_an_uneven_pipeline_has_its_longer_stage_first() -> None:
    """TensorRT-LLM 1.x cuts 35 layers into 18 and 17; versions before that into 17 and 17, and lost one."""
    for stem, mapping in (("arctic_fp8_tp4_pp2", "18 17"), ("arctic_bf16_tp8_pp2", "18 17"), ("tiny_fp8_tp2_pp2", "1 1")):
        files = [json.loads((Path(__file__).parent / f"{stem}_stage{stage}.json").read_text()) for stage in (0, 1)]
        assert " ".join(str(raw["layers"]) for raw in files) == mapping


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_plan_of_a_rank_is_its_contract(path: Path) -> None:
    contract = Contract(path)
    for rank in contract.ranks:
        specs = plan_rank(contract.config, contract.mapping.rank(rank), contract.quant)
        assert {spec.name: (SPELLING[spec.dtype], spec.shape) for spec in specs} == contract.contents
        assert len(specs) == len(contract.contents)


@pytest.mark.parametrize("path", [path for path in FILES if "tiny" in path.stem], ids=lambda path: path.stem)
def test_the_written_files_hold_exactly_the_contract(path: Path, tmp_path: Path, tiny_model: Path, tiny_samples: Path) -> None:
    contract = Contract(path)
    out = tmp_path / "out"
    report = quantize(
        tiny_model,
        out,
        tp_size=contract.mapping.tp_size,
        pp_size=contract.mapping.pp_size,
        moe_ep_size=contract.mapping.moe_ep_size,
        qformat="fp8" if contract.fp8 else "full_prec",
        calib_dataset=str(tiny_samples),
    )
    world = range(contract.mapping.world_size)
    assert sorted(p.name for p in out.iterdir()) == sorted(["config.json", "report", *(f"rank{r}.safetensors" for r in world)])
    for rank in contract.ranks:
        assert stored(out / f"rank{rank}.safetensors") == contract.contents
    if contract.mapping.pp_size == 1:
        assert report["tensors"] == len(contract.ranks) * len(contract.contents)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == ("FP8" if contract.fp8 else None)
    assert config["quantization"]["kv_cache_quant_algo"] == ("FP8" if contract.fp8 else None)


def stored(path: Path) -> Contents:
    """What the safetensors library says is in a file."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        return {name: (SPELLING[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}


def arctic_config_json() -> dict[str, Any]:
    contract = Contract(Path(__file__).with_name("arctic_fp8_tp8_rank0.json"))
    return plan_config(contract.config, plan_mapping(contract.config, tp_size=8), contract.quant)


def test_config_json_of_the_real_arctic() -> None:
    """TensorRT-LLM builds moe, mapping and quantization from their keys and refuses one that it does not know."""
    assert arctic_config_json() == {
        "architecture": "ArcticForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": 32000,
        "hidden_size": 7168,
        "num_hidden_layers": 35,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "head_size": 128,
        "intermediate_size": 4864,
        "hidden_act": "swiglu",
        "norm_epsilon": 1e-05,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": 4096,
        "rotary_base": 10000.0,
        "rotary_scaling": None,
        "attn_bias": False,
        "mlp_bias": False,
        "residual_mlp": True,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "moe": {"num_experts": 128, "top_k": 2, "normalization_mode": 1},
        "mapping": {"world_size": 8, "tp_size": 8, "pp_size": 1, "moe_tp_size": 8, "moe_ep_size": 1},
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": [
                "*lm_head",
                "*router",
                "*vocab_embedding",
                "*position_embedding",
                "*block_embedding",
                "*shared_expert_gate",
            ],
        },
    }


def test_config_json_reads_back_to_what_it_was_made_of() -> None:
    contract = Contract(Path(__file__).with_name("arctic_fp8_tp8_rank0.json"))
    raw = json.loads(json.dumps(arctic_config_json()))
    assert parse_pretrained_config(raw, "config.json") == (
        contract.config,
        plan_mapping(contract.config, tp_size=8),
        contract.quant,
    )
