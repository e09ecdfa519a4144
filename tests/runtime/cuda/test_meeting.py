"""How ranks find rank 0, and what is said where they do not."""

from __future__ import annotations

import socket

import pytest

from arctic_trt.errors import RefusedError
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.cuda import meeting
from arctic_trt.runtime.cuda.meeting import addresses_towards, check_backend, find_reachable, join


def test_alone_no_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname_ex", lambda host: pytest.fail("a name was asked for"))
    assert addresses_towards([socket.gethostname()] * 4) == ["127.0.0.1"]


def test_other_hosts_hear_the_address_on_the_way_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"here": ["127.0.1.1", "10.0.0.1"], "there": ["10.0.0.2"], "beyond": ["192.168.0.3"]}
    ways = {"10.0.0.2": "10.0.0.1", "192.168.0.3": "192.168.0.1"}

    class Probe:
        def __init__(self, family: int, kind: int) -> None:
            assert kind == socket.SOCK_DGRAM

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...

        def connect(self, address: tuple[str, int]) -> None:
            self.way = ways[address[0]]

        def getsockname(self) -> tuple[str, int]:
            return self.way, 5

    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(socket, "gethostbyname_ex", lambda host: (host, [], names[host]))
    monkeypatch.setattr(socket, "socket", Probe)
    assert addresses_towards(["here", "there", "here", "beyond"]) == ["192.168.0.1", "10.0.0.1"]


def test_a_host_without_a_name_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str) -> tuple[str, list[str], list[str]]:
        raise socket.gaierror("not known")

    monkeypatch.setattr(socket, "gethostbyname_ex", unknown)
    assert addresses_towards([socket.gethostname(), "elsewhere"]) == []


def test_the_first_address_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.2", 0)) as deaf:
        port = listener.getsockname()[1]
        deaf.close()
        assert find_reachable(["127.0.0.2", "127.0.0.1"], port) == "127.0.0.1"
    with pytest.raises(RefusedError) as refused:
        find_reachable(["127.0.0.1", "127.0.0.2"], port)
    assert f"cannot reach rank 0 at 127.0.0.1 or 127.0.0.2, port {port}. Its host needs a name" in str(refused.value)
    with pytest.raises(RefusedError, match="cannot reach rank 0 at any address"):
        find_reachable([], port)


def test_a_torch_without_nccl_is_refused() -> None:
    check_backend("gloo")
    with pytest.raises(RefusedError, match="has no FLOCK, by which several GPUs would exchange tensors"):
        check_backend("flock")


def test_what_torch_says_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.distributed.DistBackendError("NCCL error: Duplicate GPU detected\nException raised from\nframe #0")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(RefusedError) as refused:
        join(SoloCommunicator(), torch.device("cpu"), "gloo")
    message = str(refused.value)
    assert "cannot join the other ranks over GLOO: NCCL error: Duplicate GPU detected. NCCL_DEBUG=INFO says more" in message
    assert "\n" not in message and meeting.PATIENCE.total_seconds() >= 60
