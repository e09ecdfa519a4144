"""Bytes of a decode step, held to the sizes of the tensors in built engines' files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from arctic_trt.checkpoint.tensors import TensorFile
from arctic_trt.engine.config import read_engine_config
from arctic_trt.report.bench.roofline import distinct_experts, mean_context, traffic_of
from tests.support.checkpoints import TINY
from tests.support.engines import build_engine
from tests.support.jobs import quantize

DIM, FFN, LAYERS, VOCAB = (TINY[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
HEADS, KV_HEADS = TINY["num_attention_heads"], TINY["num_key_value_heads"]
EXPERTS, CHOSEN = TINY["num_local_experts"], TINY["num_experts_per_tok"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(tiny_model, tiny_samples, tmp_path_factory.mktemp("one"))


def make_engine(model: Path, samples: Path, directory: Path, **recipe: object) -> Path:
    quantize(model, directory / "checkpoint", calib_dataset=str(samples), **{"tp_size": 1, **recipe})
    return build_engine(directory / "checkpoint", directory / "engine")


def file_bytes(engine_dir: Path) -> dict[str, int]:
    """Bytes of each tensor, summed over ranks."""
    sizes: dict[str, int] = {}
    for path in engine_dir.glob("rank*.safetensors"):
        file = TensorFile(path)
        for name, stored in file.tensors.items():
            sizes[name] = sizes.get(name, 0) + stored.spec.num_bytes
        file.close()
    return sizes


def test_a_step_of_one_sequence_by_hand(engine: Path) -> None:
    """FP8 matrices a byte an element, head and embedding two, router and norms as the files have them, 2 of 8 experts."""
    attention = DIM * (DIM + 2 * KV_HEADS * (DIM // HEADS)) + DIM * DIM
    expert = 3 * DIM * FFN
    residual = 3 * DIM * DIM
    sizes = file_bytes(engine)
    small = sum(size for name, size in sizes.items() if size <= 4096 and ".expert_" not in name)  # norms, scales
    routers = LAYERS * EXPERTS * DIM * 4
    head_and_row = 2 * VOCAB * DIM + 2 * DIM
    alphas = LAYERS * 2 * CHOSEN * 4
    inputs = LAYERS * 2 * 4
    small -= sum(size for name, size in sizes.items() if name.endswith("router") and size <= 4096)
    expected = LAYERS * (attention + CHOSEN * expert + residual) + routers + head_and_row + small + alphas + inputs
    assert traffic_of(read_engine_config(engine)).weight_bytes(1) == pytest.approx(expected, abs=0.5)


def test_all_experts_and_all_rows_are_the_whole_file(engine: Path) -> None:
    sizes = file_bytes(engine)
    assert traffic_of(read_engine_config(engine)).weight_bytes(VOCAB) == pytest.approx(sum(sizes.values()), rel=1e-9)


@pytest.mark.parametrize(
    "recipe", [{"tp_size": 2}, {"tp_size": 4, "moe_ep_size": 2}, {"tp_size": 2, "pp_size": 2}, {"qformat": "full_prec"}], ids=str
)
def test_ranks_read_what_their_files_have(
    recipe: dict[str, object], tiny_model: Path, tiny_samples: Path, tmp_path: Path
) -> None:
    engine = make_engine(tiny_model, tiny_samples, tmp_path, **recipe)
    sizes, traffic = file_bytes(engine), traffic_of(read_engine_config(engine))
    experts = sum(size for name, size in sizes.items() if ".expert_" in name and not name.endswith("input_scale"))
    others = sum(sizes.values()) - experts - sizes["embedding"]
    for batch in (1, 3):
        share = distinct_experts(EXPERTS, CHOSEN, batch) / EXPERTS
        assert traffic.weight_bytes(batch) == pytest.approx(others + share * experts + batch * 2 * DIM)


def test_the_cache_is_read_once_a_sequence(engine: Path) -> None:
    traffic = traffic_of(read_engine_config(engine))
    a_token = 2 * LAYERS * KV_HEADS * (DIM // HEADS)  # FP8
    assert traffic.kv_bytes(100) == 100 * a_token
    assert traffic.step_bytes(3, 50.5) == pytest.approx(traffic.weight_bytes(3) + 3 * 50.5 * a_token)


def test_expected_distinct_experts_against_drawing_them() -> None:
    assert distinct_experts(128, 2, 1) == pytest.approx(2)
    assert distinct_experts(8, 8, 5) == 8
    rng, tokens = random.Random(1), 6
    drawn = [len({e for _ in range(tokens) for e in rng.sample(range(16), 2)}) for _ in range(4000)]
    assert distinct_experts(16, 2, tokens) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)


def test_the_context_grows_while_decoding() -> None:
    steps = range(1, 128)  # the first token comes from the prompt, each later one from a step that reads all before it
    assert mean_context(512, 128) == sum(512 + step for step in steps) / len(steps)
