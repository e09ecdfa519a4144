"""The repository's files, as protobuf reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint.contract import QuantFormat, plan_config
from arctic_trt.engine.config import TORCH, plan_build_config, plan_engine_config
from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from arctic_trt.model.config import parse_config
from arctic_trt.model.mapping import plan_mapping
from arctic_trt.triton.names import BLS, ENGINE, ENSEMBLE, GATE, POSTPROCESSING, PREPROCESSING
from arctic_trt.triton.repository import RepositoryOptions, plan_repository, write_repository
from arctic_trt.triton.tensors import CLIENT_INPUTS, CLIENT_OUTPUTS
from tests.support.checkpoints import TINY

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-arctic"
STATELESS = (PREPROCESSING, POSTPROCESSING, ENSEMBLE, GATE)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an engine, what says how it is to be served."""
    arctic = parse_config(TINY)
    raw = plan_config(arctic, plan_mapping(arctic, tp_size=2), QuantFormat(fp8=True, kv_fp8=True))
    engine = tmp_path_factory.mktemp("engine")
    (engine / "config.json").write_text(json.dumps(plan_engine_config(TORCH, raw, plan_build_config(arctic, max_batch_size=6))))
    return engine


def options(engine_dir: Path, **changes: Any) -> RepositoryOptions:
    return RepositoryOptions(**{"engine_dir": engine_dir, "tokenizer_dir": TOKENIZER, "environment": Path("/env"), **changes})


def configs(files: dict[str, str]) -> dict[str, Any]:
    """As Triton's own description of them reads them: unknown fields and wrong words are errors."""
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    texts = {name.split("/")[0]: text for name, text in files.items() if name.endswith("config.pbtxt")}
    return {name: text_format.Parse(text, messages.ModelConfig()) for name, text in texts.items()}


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def test_every_model_has_a_configuration_and_a_version(engine_dir: Path) -> None:
    files = plan_repository(options(engine_dir))
    found = configs(files)
    assert found.keys() == {PREPROCESSING, ENGINE, POSTPROCESSING, ENSEMBLE, BLS, GATE}
    for name, config in found.items():
        assert config.name == name and config.max_batch_size == 1
        assert any(file.startswith(f"{name}/1/") for file in files)
        if name != ENSEMBLE:
            compile(files[f"{name}/1/model.py"], name, "exec")
            assert config.backend == "python" and parameters(config)["EXECUTION_ENV_PATH"] == "/env"
    assert not any("${" in text for text in files.values())


def test_clients_see_the_same_of_both_ways(engine_dir: Path) -> None:
    found = configs(plan_repository(options(engine_dir)))
    for name in (ENSEMBLE, BLS):
        assert [(each.name, list(each.dims)) for each in found[name].input] == [(t.name, list(t.dims)) for t in CLIENT_INPUTS]
        assert [(each.name, list(each.dims)) for each in found[name].output] == [(t.name, list(t.dims)) for t in CLIENT_OUTPUTS]
        assert all(each.optional for each in found[name].input)


def test_the_ensemble_joins_what_exists_and_is_of_one_kind(engine_dir: Path) -> None:
    found = configs(plan_repository(options(engine_dir)))
    kinds = {each.name: (each.data_type, tuple(each.dims)) for each in found[ENSEMBLE].input}
    for step in found[ENSEMBLE].ensemble_scheduling.step:
        model = found[step.model_name]
        taken, given_ = ({each.name: (each.data_type, tuple(each.dims)) for each in side} for side in (model.input, model.output))
        for inner, outer in step.input_map.items():
            assert taken[inner] == kinds[outer], (step.model_name, inner)
        for inner, outer in step.output_map.items():
            assert outer not in kinds, f"{outer} is made twice"
            kinds[outer] = given_[inner]
    assert all(kinds[each.name] == (each.data_type, tuple(each.dims)) for each in found[ENSEMBLE].output)


def test_engine_and_tokenizer_are_named_in_full(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine_dir.parent)
    given = {"kv_cache_memory": "1GB", "device": "cuda", "request_timeout_s": 2.5, "exclude_input_in_output": False}
    relative = options(Path(engine_dir.name), **given)
    found = parameters(configs(plan_repository(relative))[ENGINE])
    assert found["engine_dir"] == str(engine_dir) and found["tokenizer_dir"] == str(TOKENIZER.resolve())
    assert (found["world_size"], found["capacity"], found["exclude_input_in_output"]) == ("2", "6", "false")
    assert (found["kv_cache_memory"], found["request_timeout_s"], found["device"]) == ("1GB", "2.5", "cuda")
    assert "max_tokens_in_paged_kv_cache" not in found


def test_queues(engine_dir: Path) -> None:
    found = configs(plan_repository(options(engine_dir, max_queue_size=10, queue_timeout_s=1.5, priority_levels=4)))
    for name, size in ((BLS, 10), (ENGINE, 16)):  # of arctic_bls, none is turned away that it has let in
        batching = found[name].dynamic_batching
        policy = batching.default_queue_policy
        assert (batching.priority_levels, batching.default_priority_level) == (4, 2)
        assert (policy.max_queue_size, policy.default_timeout_microseconds, policy.allow_timeout_override) == (
            size,
            1_500_000,
            True,
        )
        assert found[name].model_transaction_policy.decoupled
    assert not any(found[name].HasField("dynamic_batching") for name in STATELESS)


def test_by_default_queues_have_no_end(engine_dir: Path) -> None:
    batching = configs(plan_repository(options(engine_dir)))[BLS].dynamic_batching
    assert (batching.priority_levels, batching.default_queue_policy.max_queue_size) == (0, 0)
    assert batching.default_queue_policy.default_timeout_microseconds == 0


def test_an_engine_of_another_backend_and_a_missing_tokenizer(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json does not exist"):
        plan_repository(options(engine_dir, tokenizer_dir=tmp_path))
    config = (engine_dir / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"backend": "torch"', '"backend": "tensorrt_llm"'))
    with pytest.raises(UsageError, match="backend tensorrt_llm, expected torch"):
        plan_repository(options(tmp_path))


FILES = {"m/config.pbtxt": "a", "m/1/model.py": "b", "e/1/.keep": ""}


def read(model_repo: Path) -> dict[str, str]:
    return {str(path.relative_to(model_repo)): path.read_text() for path in model_repo.rglob("*") if path.is_file()}


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_repo = tmp_path / "deep" / "models"
    write_repository(FILES, model_repo, overwrite=False)
    assert read(model_repo) == FILES
    with pytest.raises(RefusedError, match="is not empty"):
        write_repository(FILES, model_repo, overwrite=False)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(ArcticTrtError, match="No space left"):
            write_repository({**FILES, "m/config.pbtxt": "c"}, model_repo, overwrite=True)
    assert read(model_repo) == FILES
    write_repository({**FILES, "m/config.pbtxt": "c"}, model_repo, overwrite=True)
    assert read(model_repo)["m/config.pbtxt"] == "c"
    assert [path.name for path in model_repo.parent.iterdir()] == ["models"]


def test_bytecode_is_nobodys_work_and_anything_else_is(tmp_path: Path) -> None:
    model_repo = tmp_path / "models"
    write_repository(FILES, model_repo, overwrite=False)
    (model_repo / "m/1/__pycache__").mkdir()
    (model_repo / "m/1/__pycache__/model.cpython-311.pyc").write_bytes(b"")
    write_repository(FILES, model_repo, overwrite=True)
    assert read(model_repo) == FILES
    (model_repo / "mine.txt").write_text("x")
    with pytest.raises(RefusedError, match=r"holds mine\.txt, which is not part"):
        write_repository(FILES, model_repo, overwrite=True)
    assert read(model_repo) == {**FILES, "mine.txt": "x"}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        write_repository(FILES, tmp_path / "models", overwrite=True)
