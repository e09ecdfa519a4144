"""Machines on which TensorRT-LLM seems to be installed: package metadata, the stand-in, GPUs that ``nvidia-smi`` shows.

``tests/conftest.py`` hands the fixture to every test.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PACKAGE_PARENT = Path(__file__).parent
TENSORRT = {"1.0": "10.11.0", "1.1": "10.13.3", "1.2": "10.14.1"}
"""What each release of TensorRT-LLM requires, from its package metadata."""
NVIDIA_SMI = Path(__file__).with_name("nvidia_smi.py")


@dataclass(frozen=True)
class StandIn:
    """An installed stand-in. ``changes`` are the environment variables that differ from this process's."""

    directory: Path
    version: str
    changes: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """The environment for a process that is to see it."""
        return {**os.environ, **self.changes}

    def calls(self, name: str | None = None) -> list[dict[str, Any]]:
        """What was called so far, by all processes: dicts of call, arguments, rank and pid."""
        log = Path(self.changes["TRTLLM_STANDIN_LOG"])
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return [call for call in map(json.loads, lines) if name in (None, call["call"])]

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have this process see it too, until the test ends."""
        for name, value in self.changes.items():
            monkeypatch.setenv(name, value)
        for path in reversed(self.changes["PYTHONPATH"].split(os.pathsep)[:2]):
            monkeypatch.syspath_prepend(path)
        forget_package()


def install_standin(
    directory: Path,
    version: str = "1.2.1",
    *,
    gpus: int = 8,
    gpu_name: str = "NVIDIA H100 80GB HBM3",
    capability: str = "9.0",
    total_mib: int = 81559,
    free_mib: int = 81000,
    fail_rank: int | str | None = None,
    die_rank: int | str | None = None,
    sleep: float | None = None,
) -> StandIn:
    """Prepare ``directory``. ``fail_rank`` and ``die_rank`` are ranks whose build fails, or is killed; ``sleep`` its seconds."""
    site, programs = directory / "site-packages", directory / "bin"
    release = ".".join(version.split(".")[:2])
    write_metadata(site, "tensorrt_llm", version)
    write_metadata(site, "tensorrt", TENSORRT[release])
    programs.mkdir(parents=True, exist_ok=True)
    program = programs / "nvidia-smi"
    program.write_text(f"#!{sys.executable} -SE\n" + NVIDIA_SMI.read_text(encoding="utf-8"), encoding="utf-8")
    program.chmod(0o755)
    faults = {"FAIL_RANK": fail_rank, "DIE_RANK": die_rank, "SLEEP": sleep}
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(site), str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")))),
        "PATH": os.pathsep.join((str(programs), os.environ.get("PATH", os.defpath))),
        "TRTLLM_STANDIN_VERSION": version,
        "TRTLLM_STANDIN_LOG": str(directory / "calls.jsonl"),
        "TRTLLM_STANDIN_GPUS": str(gpus),
        "TRTLLM_STANDIN_SM": capability.replace(".", ""),
        **{f"TRTLLM_STANDIN_{name}": str(value) for name, value in faults.items() if value is not None},
        "FAKE_GPUS": str(gpus),
        "FAKE_GPU_NAME": gpu_name,
        "FAKE_GPU_CAPABILITY": capability,
        "FAKE_GPU_TOTAL_MIB": str(total_mib),
        "FAKE_GPU_FREE_MIB": str(free_mib),
    }
    return StandIn(directory, version, changes)


def write_metadata(site: Path, name: str, version: str) -> None:
    """A distribution as ``importlib.metadata`` finds it."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def forget_package() -> None:
    """Unload the stand-in from this process, so that the next import plays what the environment says then."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture
def trtllm_standin(tmp_path: Path) -> Iterator[Callable[..., StandIn]]:
    """``trtllm_standin(version, ...)`` installs one below the test's directory; arguments are :func:`install_standin`'s."""
    made = 0

    def install(version: str = "1.2.1", **machine: Any) -> StandIn:
        nonlocal made
        made += 1
        return install_standin(tmp_path / f"standin{made}", version, **machine)

    yield install
    forget_package()
