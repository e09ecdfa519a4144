"""Engines of one rank, with and without quantization, of two shapes; built once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.checkpoints import TINY, UNLIKE_TINY, Config, random_checkpoint, random_ids, write_samples
from tests.support.engines import build_engine
from tests.support.jobs import quantize
from tests.support.small_tokenizer import write_tokenizer


@dataclass(frozen=True)
class Model:
    """A Hugging Face checkpoint, calibration samples for it, and what was made of it, by a name for each."""

    config: Config
    hf_dir: Path
    samples: Path
    work_dir: Path

    def checkpoint(self, name: str, **recipe: object) -> Path:
        directory = self.work_dir / f"{name}-checkpoint"
        if not directory.exists():
            quantize(self.hf_dir, directory, calib_dataset=str(self.samples), **{"tp_size": 1, **recipe})
        return directory

    def engine(self, name: str, **recipe: object) -> Path:
        directory = self.work_dir / name
        return directory if directory.exists() else build_engine(self.checkpoint(name, **recipe), directory)

    def prompts(self, *lengths: int, seed: int = 5) -> list[list[int]]:
        return random_ids(self.config["vocab_size"], lengths, seed)


def make_model(work_dir: Path, config: Config, seed: int) -> Model:
    hf_dir = random_checkpoint(work_dir / "hf", {**config, "max_position_embeddings": 256}, seed=seed, shards=1)
    write_tokenizer(hf_dir)
    samples = write_samples(work_dir / "samples.jsonl", random_ids(config["vocab_size"], [40] * 6, seed=seed + 1))
    return Model(config, hf_dir, samples, work_dir)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The dimensions of the tiny contracts."""
    return make_model(tmp_path_factory.mktemp("tiny"), TINY, seed=11)


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Fewer KV heads than ranks, and a vocabulary that no number of ranks divides."""
    sizes = {"num_key_value_heads": 2, "vocab_size": 509, "num_hidden_layers": 3, "num_experts_per_tok": 3}
    return make_model(tmp_path_factory.mktemp("narrow"), {**TINY, **sizes}, seed=13)


@pytest.fixture(scope="session")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """7 query heads a KV head, a vocabulary and an ffn that are no powers of two, 16 experts, 3 layers."""
    return make_model(tmp_path_factory.mktemp("unlike"), UNLIKE_TINY, seed=12)
