"""The supervision of a server, with programs in the place of tritonserver and the front end that start at once."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.serving import Served, start_supervisor, wait_until

Start = Callable[..., Served]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Served] = []

    def begin(*models: str, **options: object) -> Served:
        started.append(start_supervisor(tmp_path, *models, **options))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for served in started:
        served.kill()


def stream(served: Served, count: int) -> tuple[threading.Thread, list[bytes]]:
    """A request for ``count`` events that is under way, and what has come of it."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.endpoints.http_port}/v2/models/arctic/generate_stream", json.dumps({"count": count}).encode()
    )
    answer, pieces = urllib.request.urlopen(request, timeout=20), []

    def read() -> None:
        pieces.extend(line for line in answer if line.strip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return reader, pieces


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_end_and_leaves_nothing(start: Start, number: int) -> None:
    served = start().wait_ready()
    assert len(served.leftovers()) > 4, "processes, and files in /dev/shm and /tmp, while it serves"
    reader, pieces = stream(served, 20)
    wait_until(lambda: pieces, "the first event")
    assert served.end(number) == 0
    reader.join(5)
    assert len(pieces) == 20 and served.leftovers() == []
    shown = [line for line in served.lines if line.split()[0] in ("model", "ready", "draining")]
    loads = [f"model {model} {loaded}" for model in ("arctic", "arctic_gate") for loaded in (False, True)]
    assert shown == [*loads, "ready", "draining"]
    assert not served.said("CudaDriver") and not served.said("NVML"), "a machine without a GPU is no news"


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    served = start().wait_ready()
    _, pieces = stream(served, 400)
    wait_until(lambda: pieces, "the first event")
    served.process.send_signal(signal.SIGINT)
    wait_until(lambda: served.said("draining"), "draining")
    assert served.end(signal.SIGINT) == 130 and served.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_is_ready_ends_it_at_once(start: Start, number: int) -> None:
    served = start("arctic", "slow")
    wait_until(lambda: served.said("model slow False"), "the start")
    served.run = served.name()
    assert served.end(number) == 130 and served.leftovers() == []


def test_a_killed_server_ends_everything_with_a_sentence(start: Start) -> None:
    served = start().wait_ready()
    os.kill(served.children("fake_tritonserver")[0], signal.SIGKILL)
    assert served.end() == 1 and served.leftovers() == []
    assert served.said("ArcticTrtError: tritonserver was ended by SIGKILL, and did not say why.")


def test_a_killed_supervisor_leaves_nothing(start: Start) -> None:
    served = start().wait_ready()
    assert served.end(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not served.leftovers(), "the end of everything", 5)


def test_a_killed_group_of_processes_leaves_nothing(start: Start) -> None:
    served = start().wait_ready()
    os.killpg(served.process.pid, signal.SIGKILL)
    served.end()
    wait_until(lambda: not served.leftovers(), "the end of everything", 5)


def test_a_model_that_does_not_load(start: Start) -> None:
    served = start("arctic", "broken")
    assert served.end() == 1
    assert served.said("tritonserver ended with exit code 1: broken did not load: RefusedError: The ranks did not start.")


def test_a_dead_stub_is_replaced_and_the_gate_is_none_of_its_business(start: Start) -> None:
    served = start("arctic", "arctic_gate").wait_ready()
    (triton,) = served.children("fake_tritonserver")
    for model in ("arctic_gate", "arctic"):
        (stub,) = served.children(f"/{model}/1/model.py", triton)
        os.kill(stub, signal.SIGKILL)
    wait_until(lambda: served.said("The model arctic is loaded again."), "a new stub")
    assert served.get(served.endpoints.http_port, "/loads") == {"arctic": 2, "arctic_gate": 1}
    (again,) = served.children("/arctic/1/model.py", triton)
    assert again != stub and served.end(signal.SIGTERM) == 0 and served.leftovers() == []


def test_a_dead_stub_whose_requests_never_end_takes_another_server(start: Start) -> None:
    served = start("arctic", "stuck").wait_ready()
    (triton,) = served.children("fake_tritonserver")
    (stub,) = served.children("/stuck/1/model.py", triton)
    os.kill(stub, signal.SIGKILL)
    wait_until(lambda: served.said("The new tritonserver is ready."), "another server")
    (other,) = served.children("fake_tritonserver")
    assert other != triton and served.get(served.endpoints.http_port, "/loads") == {"arctic": 1, "stuck": 1}


def test_a_front_end_that_dies_is_replaced(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    served = start(api_key="secret").wait_ready()
    port = served.endpoints.openai_port
    first = served.get(port, "/health")
    assert first["api_key"] == "secret" and b"secret" not in Path(f"/proc/{first['pid']}/cmdline").read_bytes()
    os.kill(first["pid"], signal.SIGKILL)
    code = served.end()
    assert code == 1 and served.said("The OpenAI front end was ended by SIGKILL right after its start."), (
        "within its first seconds"
    )
    assert served.leftovers() == []


def test_a_front_end_that_does_not_start(start: Start) -> None:
    served = start(fails=True)
    assert served.end() == 1
    assert served.said("the front end has something to complain of")
    assert served.said("The OpenAI front end ended with exit code 1 right after its start. What it wrote is above.")


def test_clients_that_keep_their_connections_are_not_waited_for(start: Start) -> None:
    served = start("arctic", "arctic_bls", "patient").wait_ready()
    reader, pieces = stream(served, 10)
    wait_until(lambda: pieces, "the first event")
    assert served.end(signal.SIGTERM) == 0 and served.leftovers() == []
    reader.join(5)
    assert len(pieces) == 10


def test_a_server_that_does_not_end_is_killed(start: Start) -> None:
    served = start("arctic", "stuck", grace_s=0.2).wait_ready()
    assert served.end(signal.SIGTERM) == 1 and served.leftovers() == []
    assert served.said("tritonserver did not end within 1 s, and was killed.")
