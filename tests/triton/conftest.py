"""One server for all tests that only ask it; xdist's workers take turns, so that what one does to it no other sees."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import Server, build_tiny_arctic, serving


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of all workers."""
    base = tmp_path_factory.getbasetemp()
    directory = (base if worker_id == "master" else base.parent) / "served"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture
def turn(shared_dir: Path) -> Iterator[None]:
    """No other worker's test has the server, or this fixture, meanwhile."""
    with (shared_dir / "turn").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def own_servers() -> Iterator[ExitStack]:
    """Servers that this worker has started."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def tiny_engine(shared_dir: Path, turn: None) -> Path:
    """The tiny Arctic on two ranks, for servers of their own."""
    engine = shared_dir / "engine"
    return engine if engine.exists() else build_tiny_arctic(shared_dir)


@pytest.fixture
def served(shared_dir: Path, tiny_engine: Path, own_servers: ExitStack) -> Server:
    """The running server; whoever needs it first starts it, and stops it when its tests are done."""
    known = shared_dir / "server.json"
    if known.exists():
        raw: dict[str, Any] = json.loads(known.read_text())
        return Server(**{**raw, "log": Path(raw["log"])})
    own_servers.callback(known.unlink)
    _, server = own_servers.enter_context(serving(tiny_engine, shared_dir))
    known.write_text(json.dumps({**asdict(server), "log": str(server.log)}))
    return server
