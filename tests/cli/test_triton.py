"""``arctic-trt triton`` from the command line; servers themselves are tested in tests/triton."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.cli.triton import examples
from arctic_trt.errors import RefusedError
from arctic_trt.triton import serve as serving
from arctic_trt.triton.serve import ServeOptions, Watch
from arctic_trt.triton.server import Endpoints
from tests.conftest import Finished
from tests.support.jobs import tree

Run = Callable[..., Finished]
TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-arctic"
MODELS = ["arctic", "arctic_bls", "arctic_gate", "ensemble", "postprocessing", "preprocessing"]


@pytest.fixture
def engine(engines: Callable[[int], Path]) -> Path:
    return engines(2)


@pytest.fixture
def write(arctic_trt: Run, engine: Path, tmp_path: Path) -> Run:
    def run(*words: object) -> Finished:
        return arctic_trt("triton", engine, "--tokenizer_dir", TOKENIZER, "--model_repo", tmp_path / "models", *words)

    return run


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """What would have been served; the server is said to be fine, and to end at once."""
    options: list[ServeOptions] = []

    def serve(server: object, asked: ServeOptions, watch: Watch) -> None:
        options.append(asked)
        watch.model("arctic", False)
        watch.waiting()
        watch.model("arctic", True)
        watch.ready()
        watch.draining()

    monkeypatch.setattr(serving, "check_serving", lambda options: None)
    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.delenv("ARCTIC_TRT_API_KEY", raising=False)
    return options


def test_a_repository_is_written_and_the_next_command_said(write: Run, engine: Path, tmp_path: Path) -> None:
    done = write()
    assert done.code == 0 and ", ".join(MODELS) in done.out
    next_ = done.out.split("next")[1].split()
    assert next_[:3] == ["arctic-trt", "triton", str(engine)] and next_[-1] == "--serve"
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == MODELS


def test_json(write: Run, tmp_path: Path) -> None:
    found = json.loads(write("--json").out)
    assert (found["model_repo"], found["backend"], found["models"]) == (str(tmp_path / "models"), "python", MODELS)
    assert found["files"] == sorted(name for name, data in (tree(tmp_path / "models") or {}).items() if data is not None)


def test_the_same_again_changes_nothing_and_other_content_needs_overwrite(write: Run, tmp_path: Path) -> None:
    write()
    config = tmp_path / "models" / "arctic_bls" / "config.pbtxt"
    before = config.stat().st_mtime_ns
    (tmp_path / "models" / "arctic" / "1" / "__pycache__").mkdir()
    (tmp_path / "models" / "arctic" / "1" / "__pycache__" / "model.pyc").write_bytes(b"left by Python")
    assert write().code == 0 and config.stat().st_mtime_ns == before
    refused = write("--max_queue_size", 7)
    assert refused.code == 3 and "--overwrite" in refused.err
    assert write("--max_queue_size", 7, "--overwrite").code == 0 and "max_queue_size: 7" in config.read_text()


def test_flags_may_come_from_a_file(write: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("max_queue_size: 9\nqueue_timeout: 2.5\n")
    assert write("--config", tmp_path / "recipe.yaml").code == 0
    config = (tmp_path / "models" / "arctic_bls" / "config.pbtxt").read_text()
    assert "max_queue_size: 9" in config and "default_timeout_microseconds: 2500000" in config


def test_serving_says_what_is_loaded_where_it_is_and_what_to_try(write: Run, served: list[ServeOptions], tmp_path: Path) -> None:
    done = write("--serve", "--http_port", 18000, "--drain_timeout", 5)
    assert done.code == 0 and "loaded arctic in" in done.err and "finishing the requests under way" in done.err
    assert "http://127.0.0.1:18000" in done.out and "http://127.0.0.1:9000/v1" in done.out
    commands = [shlex.split(line) for line in done.out.splitlines() if line.startswith("curl")]
    assert [words[2] for words in commands] == [
        "http://127.0.0.1:18000/v2/models/arctic_bls/generate",
        "http://127.0.0.1:9000/v1/chat/completions",
    ]
    assert [json.loads(words[-1])["max_tokens"] for words in commands] == [20, 20]
    (options,) = served
    assert (options.model_repo, options.ranks, options.drain_timeout_s) == (tmp_path / "models", 2, 5)
    assert options.endpoints == Endpoints("127.0.0.1", 18000, 8001, 8002, 9000)
    assert {key: options.gateway[key] for key in ("grpc_url", "port", "api_key")} == {
        "grpc_url": "127.0.0.1:8001",
        "port": 9000,
        "api_key": None,
    }


def test_the_front_end_takes_the_options_that_it_is_given(write: Run, served: list[ServeOptions]) -> None:
    from arctic_trt.triton.openai.options import OpenAiOptions

    write("--serve", "--max_request_bytes", 1000)
    assert OpenAiOptions(**served[0].gateway).max_request_bytes == 1000


def test_json_of_a_server_is_one_object(write: Run, served: list[ServeOptions]) -> None:
    found = json.loads(write("--serve", "--json", "-q").out)
    assert (found["http"], found["grpc"], found["chat"]) == ("http://127.0.0.1:8000", "127.0.0.1:8001", "http://127.0.0.1:9000/")


def test_a_key_may_come_from_the_environment_and_is_not_shown(
    write: Run, served: list[ServeOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCTIC_TRT_API_KEY", "top secret")
    done = write("--serve")
    assert served[0].gateway["api_key"] == "top secret"
    assert "top secret" not in done.out + done.err + repr(served[0]) and "Bearer $ARCTIC_TRT_API_KEY" in done.out


def test_an_open_address_is_warned_about(write: Run, served: list[ServeOptions]) -> None:
    assert "Triton's ports: they ask for no key" in write("--serve", "--host", "0.0.0.0").err
    assert "Triton's ports" not in write("--serve", "--host", "::1").err


def test_nothing_is_written_where_nothing_can_be_served(write: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(options: ServeOptions) -> None:
        raise RefusedError("There is no tritonserver.", "Install one.")

    monkeypatch.setattr(serving, "check_serving", refuse)
    refused = write("--serve")
    assert (refused.code, (tmp_path / "models").exists()) == (3, False)
    assert "There is no tritonserver. Install one." in refused.err


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--grpc_port", "8000"], 2, "--http_port and --grpc_port are both 8000, expected ports of their own."),
        (["--openai_port", "0"], 2, "--openai_port 0 is not valid"),
        (["--drain_timeout", "-1"], 2, "--drain_timeout -1 is not valid"),
        (["--kv_cache_memory", "much"], 2, "--kv_cache_memory 'much' is not a size."),
        (["--backend", "tensorrtllm", "--serve"], 2, "--serve starts repositories of --backend python"),
        (["--backend", "tensorrtllm", "--queue_timeout", "3"], 2, "--queue_timeout is for --backend python alone"),
        (["--backend", "tensorrtllm"], 3, "which Triton's tensorrtllm cannot load"),
        (["--tokenizer_dir", "nowhere"], 2, "nowhere/tokenizer.json does not exist"),
    ],
)
def test_what_is_refused(words: list[str], code: int, complaint: str, write: Run, tmp_path: Path) -> None:
    done = write(*words)
    assert done.code == code and complaint in done.err and not (tmp_path / "models").exists()


def test_an_engine_is_needed(arctic_trt: Run, tmp_path: Path) -> None:
    done = arctic_trt("triton", tmp_path, "--model_repo", tmp_path / "models")
    assert done.code == 2 and "config.json" in done.err
    assert "--model_repo is required" in arctic_trt("triton", tmp_path).err


def test_it_starts_its_ranks_itself(arctic_trt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    done = arctic_trt("triton", tmp_path, "--model_repo", tmp_path / "models")
    assert done.code == 3 and "triton was started as 4 processes, and starts the engine's ranks by itself." in done.err


def test_hidden_commands_are_in_no_help(arctic_trt: Run) -> None:
    shown = arctic_trt("--help").out
    assert " triton " in shown and "gateway" not in shown and "service" not in shown


@pytest.mark.parametrize("key", [False, True])
def test_examples_survive_a_shell(key: bool) -> None:
    def body(command: str) -> Any:
        return json.loads(shlex.split(command)[-1])

    generate, chat = examples(Endpoints().urls(), key)
    assert body(generate)["text_input"] and body(chat)["messages"][0]["role"] == "user"
    assert ("Authorization" in chat) == key and "Authorization" not in generate
