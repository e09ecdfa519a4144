"""From flags to a target: what fits together, and whose prompts are taken."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_trt import launch
from arctic_trt.engine.config import read_engine_config
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.report.bench import session as module
from arctic_trt.report.bench.plan import plan_batches
from arctic_trt.report.bench.run import Round, plan_batch_rounds
from arctic_trt.report.bench.session import BenchOptions, Session, measure_memory
from arctic_trt.report.bench.target import EngineTarget, ServerTarget
from tests.support.checkpoints import TINY
from tests.support.engines import build_engine
from tests.support.jobs import quantize
from tests.support.small_tokenizer import write_tokenizer

URL = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def engine_dir(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("session")
    quantize(tiny_model, directory / "checkpoint", calib_dataset=str(tiny_samples), tp_size=1)
    write_tokenizer(directory / "checkpoint")
    return build_engine(directory / "checkpoint", directory / "engine", max_batch_size=3, max_input_len=40, max_seq_len=60)


def session(**options: Any) -> Session:
    return Session(BenchOptions(**{"max_new_tokens": 8, **options}))


def rounds_of(made: Session, *numbers: int, length: int = 16) -> list[Round]:
    return plan_batch_rounds(made.workload, plan_batches(numbers or (1,), [length]), max_new_tokens=8, repeat=1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "No target is given, expected one of --engine_dir, --triton_url, --openai_url"),
        ({"triton_url": URL, "openai_url": URL}, "--triton_url and --openai_url are given, expected one of"),
        ({"triton_url": URL}, "--triton_url needs --model"),
        ({"openai_url": URL, "model": "arctic"}, "--openai_url needs --tokenizer_dir"),
        ({"engine_dir": Path("absent")}, r"absent/config\.json does not exist"),
    ],
)
def test_what_does_not_fit_together(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        session(**options)


def test_an_engine_of_several_ranks_is_refused_alone(tiny_model: Path, tiny_samples: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "checkpoint", calib_dataset=str(tiny_samples), tp_size=2)
    with pytest.raises(RefusedError, match=r"needs 2 ranks.*mpirun -n 2"):
        session(engine_dir=build_engine(tmp_path / "checkpoint", tmp_path / "engine"))


def test_an_engine_gets_random_tokens_of_its_vocabulary(engine_dir: Path) -> None:
    made = session(engine_dir=engine_dir, prompt_length=(16, 24), warmup=2, seed=5)
    assert made.lengths == (16, 24) and made.framework == "arctic-trt"
    assert [len(arrival.prompt.token_ids) for arrival in made.warmup] == [16, 16]
    tokens = {token for prompt in made.workload.take(50, 30) for token in prompt.token_ids}
    assert max(tokens) < TINY["vocab_size"] and len(tokens) > 450
    with made.open(rounds_of(made)) as place:
        assert place and isinstance(place.target, EngineTarget) and place.tensor_parallel == 1
        assert made.as_dict(place)["target"] == str(engine_dir)


def test_a_server_gets_text_or_ids_of_its_tokenizer(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    triton = session(triton_url=URL, model="arctic", tokenizer_dir=directory, framework="theirs")
    openai = session(openai_url=URL, model="arctic", tokenizer_dir=directory, tensor_parallel=8)
    assert (triton.framework, openai.framework, triton.lengths) == ("theirs", "openai", (2048,))
    (spelled,), (ids,) = triton.workload.take(1, 9), openai.workload.take(1, 9)
    assert spelled.text and re.fullmatch(r"[a-z ]+", spelled.text) and len(spelled.token_ids) == len(ids.token_ids) == 9
    assert ids.text is None
    with openai.open(rounds_of(openai)) as place:
        assert place and isinstance(place.target, ServerTarget) and (place.engine, place.tensor_parallel) == (None, 8)


def test_prompts_of_a_file(engine_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"input_ids": [1, 2, 3]}\n{"prompt": "the sea"}\n')
    made = session(engine_dir=engine_dir, tokenizer_dir=engine_dir, input_file=file)
    assert made.lengths == (None,)
    ids, text = made.workload.take(2, None)
    assert ids.token_ids == (1, 2, 3) and text.token_ids == tuple(Tokenizer(engine_dir).encode("the sea"))
    file.write_text(json.dumps({"input_ids": [1, TINY["vocab_size"]]}))
    wrong = session(engine_dir=engine_dir, input_file=file)
    with pytest.raises(UsageError, match="Prompt 0 has token id 512, expected 0 to 511"), wrong.open(rounds_of(wrong)):
        pass


def test_what_the_engine_was_not_built_for(engine_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = session(engine_dir=engine_dir, prompt_length=(16,))
    with pytest.raises(UsageError, match="A prompt has 41 tokens"), made.open(rounds_of(made, length=41)):
        pass
    other = session(engine_dir=engine_dir, tensor_parallel=8)
    with pytest.raises(UsageError, match="-tp 8 is not the engine's tp_size 1"), other.open(rounds_of(other)):
        pass
    with caplog.at_level(logging.WARNING), made.open(rounds_of(made, 2, 5)):
        assert "--max_batch_size 3: of 5 prompts at once the others wait" in caplog.text


@pytest.mark.parametrize(
    ("environ", "tp_size", "threads", "machines"),
    [
        ({"OMP_NUM_THREADS": ""}, 1, 16, 1),
        ({"OMP_NUM_THREADS": "1"}, 1, 1, 1),
        ({"OMP_NUM_THREADS": "64"}, 1, 16, 1),
        ({"OMP_NUM_THREADS": "3", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4, 12, 1),
        ({"OMP_NUM_THREADS": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 4, 2, 2),
    ],
    ids=str,
)
def test_memory_is_read_by_the_cores_that_the_engine_may_use(
    environ: dict[str, str], tp_size: int, threads: int, machines: int, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    for cores in (module, launch):
        monkeypatch.setattr(cores, "available_cores", lambda processes=1: 16 // processes)
    monkeypatch.setattr(module, "measure_read_bandwidth", lambda *, threads: asked.append(threads) or 5e9)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    engine = read_engine_config(engine_dir)
    mapping = {"world_size": tp_size, "tp_size": tp_size, "pp_size": 1, "moe_tp_size": tp_size, "moe_ep_size": 1}
    engine = replace(engine, pretrained_config={**engine.pretrained_config, "mapping": mapping})
    memory = measure_memory(engine, torch.device("cpu"))
    assert asked == [threads] and (memory.bandwidth, memory.max_batch_size) == (machines * 5e9, 3)
    assert memory.traffic.mapping.tp_size == tp_size
    monkeypatch.setattr(module, "measure_gpu_bandwidth", lambda device: 7e9 if device.index == 0 else 0)
    assert measure_memory(engine, torch.device("cuda", 0)).bandwidth == tp_size * 7e9, "a GPU a rank"
