"""What every test may use. Torch runs on one thread, so that the order of additions does not depend on the machine."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from arctic_trt.cli.main import run_cli
from arctic_trt.triton.text import WITHOUT_TORCH
from tests.support.checkpoints import SMALL, TINY, random_checkpoint, random_ids, write_samples
from tests.support.jobs import Job
from tests.trtllm_standin.fixtures import trtllm_standin

__all__ = ["trtllm_standin"]  # pytest finds fixtures in the namespace of a conftest

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, whoever does that first
for name in WITHOUT_TORCH:  # the controller's environment, if this is one of its workers
    os.environ.pop(name, None)
importlib.import_module("transformers")  # with torch, for tests that compare with its models
os.environ.update(WITHOUT_TORCH)  # programs that tests start only tokenize, and start a second sooner without
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background, and inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("busy", deadline=None)  # how long an example takes says more about the machine than about the code
settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the one server comes first: so one worker gets all of it, and none waits for another's turn."""
    items.sort(key=lambda item: item.path.name != "test_served.py")


@dataclass(frozen=True)
class Finished:
    """One command line that has run in this process: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def package_logger() -> Iterator[logging.Logger]:
    """Commands configure the package's logger, those too that fixtures of a session run; every test finds it untouched."""
    logger = logging.getLogger("arctic_trt")
    reset_logger(logger)
    yield logger
    reset_logger(logger)


def reset_logger(logger: logging.Logger) -> None:
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture
def arctic_trt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run ``arctic-trt WORDS...`` in this process."""

    def run(*words: object) -> Finished:
        capsys.readouterr()
        code = run_cli([str(word) for word in words])
        return Finished(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with the dimensions of the tiny contracts; nobody may change it."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny") / "model", TINY)


@pytest.fixture(scope="session")
def tiny_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration samples for :func:`tiny_model`, of two lengths."""
    rows = random_ids(TINY["vocab_size"], [24, 24, 24, 17, 17])
    return write_samples(tmp_path_factory.mktemp("samples") / "samples.jsonl", rows)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest random checkpoint that has everything; nobody may change it."""
    return random_checkpoint(tmp_path_factory.mktemp("small") / "model", SMALL)


@pytest.fixture
def job(small_model: Path, tmp_path: Path) -> Job:
    """A quantization that succeeds unless the test spoils it."""
    model_dir = Path(shutil.copytree(small_model, tmp_path / "model"))
    samples = write_samples(tmp_path / "calib.jsonl", random_ids(SMALL["vocab_size"], [8, 8, 5]))
    return Job(model_dir, samples, tmp_path / "out")
