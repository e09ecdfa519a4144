"""Finding tritonserver, and its command line, environment and needs."""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from arctic_trt.errors import RefusedError
from arctic_trt.triton import server as module
from arctic_trt.triton.server import (
    CONTROL_KEY,
    HTTP_ADDRESS,
    KEY_HEADER,
    MARK,
    STUB,
    Endpoints,
    Run,
    TritonServer,
    check_packages,
    check_ports,
    check_shared_memory,
    check_stub,
    locate_server,
    name_run,
    server_command,
    server_environ,
)
from tests.support.serving import fake_server, free_ports

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
RUN = Run("arctic-trt-12345678", Path("/tmp/run"), "secret")
SERVER = TritonServer(Path("/opt/bin/tritonserver"), Path("l.so"), Path("u.py"), Path("stub"))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """The home of an installed server."""

    def install() -> Path:
        fake_server(tmp_path / "home")
        monkeypatch.setattr(module, "find_tritonserver", lambda: tmp_path / "home" / "bin" / "tritonserver")
        return tmp_path / "home"

    return install


def test_the_stub_of_this_python_comes_first(installed: Callable[[], Path]) -> None:
    home = installed()
    assert locate_server().stub == home / "backends" / "python" / STUB, "the container has one"
    for version in ("3.8", VERSION):
        (home / "python_backend_stubs" / version).mkdir(parents=True)
        (home / "python_backend_stubs" / version / STUB).write_text("")
    assert locate_server().stub == home / "python_backend_stubs" / VERSION / STUB, "the wheel has many"


def test_a_program_that_is_a_link_is_followed_to_its_home(
    installed: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = installed()
    (tmp_path / "link").symlink_to(home / "bin" / "tritonserver")
    monkeypatch.setattr(module, "find_tritonserver", lambda: tmp_path / "link")
    assert locate_server().library == home / "backends" / "python" / "libtriton_python.so"


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_tritonserver", lambda: None)
    with pytest.raises(RefusedError, match=r"There is no tritonserver. pip install 'arctic-trt\[triton\]'"):
        locate_server()


@pytest.mark.parametrize("part", ["libtriton_python.so", "triton_python_backend_utils.py", STUB])
def test_a_server_without_a_python_backend(installed: Callable[[], Path], part: str) -> None:
    (installed() / "backends" / "python" / part).unlink()
    with pytest.raises(RefusedError, match=rf"has no Python backend: .*{part} does not exist"):
        locate_server()


def stub(path: Path, says: str, built_for: str = VERSION) -> Path:
    path.write_text(f"#!/bin/sh\n# libpython{built_for}.so.1.0\necho '{says}' >&2\nexit 1\n")
    path.chmod(0o755)
    return path


def test_a_stub_that_starts(tmp_path: Path) -> None:
    check_stub(stub(tmp_path / "stub", "Expected 9 arguments, found 1 arguments."), os.environ)


def test_a_stub_that_lacks_its_library(tmp_path: Path) -> None:
    lost = "stub: error while loading shared libraries: libpython3.so: cannot open shared object file"
    with pytest.raises(RefusedError, match=r"does not start: libpython3.so: cannot open .*apt-get install libpython"):
        check_stub(stub(tmp_path / "stub", lost), os.environ)


def test_a_stub_of_another_python(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=rf"is for Python 3.7, but arctic-trt is installed for {VERSION}"):
        check_stub(stub(tmp_path / "stub", "", built_for="3.7"), os.environ)


@pytest.mark.parametrize(
    ("versions", "complaint"),
    [
        ({"numpy": "2.1.0"}, "numpy 2.1.0 is installed, but .* pip install 'numpy<2'"),
        ({"fastapi": None}, r"fastapi is not installed, .* pip install 'arctic-trt\[triton\]'"),
        ({"tritonclient": None}, "tritonclient is not installed"),
    ],
)
def test_packages(versions: dict[str, str | None], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "package_version", lambda name: {"numpy": "1.26.4", **versions}.get(name, "1.0"))
    with pytest.raises(RefusedError, match=complaint):
        check_packages()


def test_packages_that_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "package_version", lambda name: "1.26.4")
    check_packages()


def test_free_ports_are_free() -> None:
    check_ports(Endpoints("127.0.0.1", *free_ports()))


def test_a_port_in_use_is_named_with_its_flag() -> None:
    ports = free_ports()
    with (
        socket.create_server(("127.0.0.1", ports[1])),
        pytest.raises(
            RefusedError, match=rf"--grpc_port {ports[1]}: 127.0.0.1:{ports[1]} .*\(Address already in use\)"
        ) as raised,
    ):
        check_ports(Endpoints("127.0.0.1", *ports))
    assert raised.value.exit_code == 3 and "choose another --grpc_port" in str(raised.value)


def test_an_address_that_is_not_this_machine() -> None:
    with pytest.raises(RefusedError, match="Cannot assign requested address"):
        check_ports(Endpoints("192.0.2.1", *free_ports()))


def test_a_host_that_nobody_knows() -> None:
    with pytest.raises(RefusedError, match=r"--http_port \d+: no such host.invalid:\d+ cannot be listened on \("):
        check_ports(Endpoints("no such host.invalid", *free_ports()))


def test_a_connection_that_was_closed_does_not_block_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        served, _ = listener.accept()
        served.close()  # first, so that the server's side has to wait for stragglers
        client.recv(1)
        port = listener.getsockname()[1]
    check_ports(Endpoints("127.0.0.1", port, *free_ports(3)))


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 200 << 20}))
    check_shared_memory(1, tmp_path)
    with pytest.raises(RefusedError, match=r"has 200 MiB free, and 224 MiB are needed for 4 ranks. .*--shm-size"):
        check_shared_memory(4, tmp_path)


@pytest.mark.parametrize(
    ("host", "address", "local"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("localhost", "localhost:8000", True),
        ("0.0.0.0", "127.0.0.1:8000", False),
        ("::", "[::1]:8000", False),
        ("::1", "[::1]:8000", True),
        ("10.1.2.3", "10.1.2.3:8000", False),
    ],
)
def test_where_clients_of_this_machine_find_it(host: str, address: str, local: bool) -> None:
    endpoints = Endpoints(host)
    assert (endpoints.address(8000), endpoints.is_local) == (address, local)
    assert endpoints.urls()["http"] == f"http://{address}" and endpoints.urls()["openai"].endswith(":9000/v1")


def test_the_command_line() -> None:
    endpoints = Endpoints("127.0.0.1", 1, 2, 3, 4)
    words = server_command(SERVER, Path("/models"), Path("/run/backends"), endpoints, RUN, 30)
    assert words[0] == "/opt/bin/tritonserver"
    flags = [tuple(word.removeprefix("--").split("=", 1)) for word in words[1:] if "=" in word]
    settings = [value for name, value in flags if name == "backend-config"]
    assert all(value.startswith("python,") and value.count(",") == 1 for value in settings), "what follows a comma is lost"
    assert "python,shm-region-prefix-name=arctic-trt-12345678" in settings
    once = dict(flag for flag in flags if flag[0] != "backend-config")
    assert len(once) + len(settings) == len(flags)
    assert (once["model-repository"], once["backend-directory"], once["exit-timeout-secs"]) == ("/models", "/run/backends", "30")
    assert (once["model-control-mode"], once["load-model"]) == ("explicit", "*"), "so that a model can be loaded again"
    assert [once[f"{kind}-port"] for kind in ("http", "grpc", "metrics")] == ["1", "2", "3"]
    assert {once[f"{kind}-address"] for kind in ("http", "grpc", "metrics")} == {"127.0.0.1"}
    for guard in ("http-restricted-api", "grpc-restricted-protocol"):
        apis, _, key = once[guard].partition(":")
        assert "model-repository" in apis.split(",") and "inference" not in apis and key == f"{KEY_HEADER}=secret"


def test_the_environment() -> None:
    given = {"OMPI_COMM_WORLD_RANK": "0", "LD_LIBRARY_PATH": "/cuda", "PATH": "/bin", "TMPDIR": "/other"}
    environ = server_environ(given, RUN, Endpoints(http_port=1234))
    assert environ["LD_LIBRARY_PATH"].split(":") == [sysconfig.get_config_var("LIBDIR"), "/cuda"], "this Python's library first"
    assert "OMPI_COMM_WORLD_RANK" not in environ, "ranks of its own are to be started"
    assert (environ["HOME"], environ["PATH"], environ["TMPDIR"]) == ("/tmp", "/bin", "/tmp/run")
    assert (environ[MARK], environ[HTTP_ADDRESS], environ[CONTROL_KEY]) == (RUN.name, "127.0.0.1:1234", "secret")
    assert RUN.mpi_directory.name.startswith(RUN.name), "found by whoever clears up"
    assert server_environ({"HOME": "/home/me"}, RUN, Endpoints())["HOME"] == "/home/me"


def test_no_two_runs_have_a_name() -> None:
    assert len({name_run() for _ in range(100)}) == 100
