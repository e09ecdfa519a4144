"""The program ``tritonserver``: whether it can start here, with which files, environment and command line.

It comes with the wheel ``nvidia-pytriton`` or with NVIDIA's container. Either way its Python backend is put together anew, in a
folder of the run: the wheel keeps the stub, the process that a Python model lives in, elsewhere than the server looks for it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arctic_trt.errors import RefusedError
from arctic_trt.launch import without_launcher
from arctic_trt.machine import INSTALL_TRITONSERVER, find_tritonserver, package_version

LIBRARY, UTILITIES, STUB = "libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub"
MODEL_SHM_BYTES = 32 << 20
"""What each stub takes of /dev/shm. It adds when tensors need more, but other threads of the stub do not survive that: with 1 MiB
sixteen clients brought the server down within a minute."""
LEAST_SHM_BYTES, RANK_SHM_BYTES = 6 * MODEL_SHM_BYTES, 8 << 20
"""Of /dev/shm: for the stubs of all models, and for what a rank exchanges with the others through Open MPI."""
GUARDED_APIS = "shared-memory,model-repository,trace,logging"
"""What a client of a model has no use for, and must not have: loading a model runs the Python that the request brings along."""

SHARED_MEMORY = Path("/dev/shm")
MARK = "ARCTIC_TRT_TRITON_RUN"
"""Environment variable that every process of a server inherits: the name of its run, by which what is left over is found."""
HTTP_ADDRESS, CONTROL_KEY = "ARCTIC_TRT_TRITON_HTTP", "ARCTIC_TRT_TRITON_KEY"
"""What the models find the server by: ``HOST:PORT``, and the value of :data:`KEY_HEADER` that opens :data:`GUARDED_APIS`."""
KEY_HEADER = "arctic-trt-key"


@dataclass(frozen=True, slots=True)
class TritonServer:
    """The files of a server: the program, and the three parts of its Python backend, of which ``stub`` depends on Python."""

    program: Path
    library: Path
    utilities: Path
    stub: Path


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a server listens."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    openai_port: int = 9000

    @property
    def ports(self) -> Mapping[str, int]:
        """Each port by its flag."""
        return {name: getattr(self, name) for name in ("http_port", "grpc_port", "metrics_port", "openai_port")}

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host == "localhost" or self.host == "::1" or self.host.startswith("127.")

    def address(self, port: int) -> str:
        """``HOST:PORT`` as a client on this machine reaches it; an IPv6 address is in brackets."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def urls(self) -> dict[str, str]:
        """What clients are given."""
        openai = f"http://{self.address(self.openai_port)}"
        return {
            "http": f"http://{self.address(self.http_port)}",
            "grpc": self.address(self.grpc_port),
            "metrics": f"http://{self.address(self.metrics_port)}/metrics",
            "openai": f"{openai}/v1",
            "chat": f"{openai}/",
        }


@dataclass(frozen=True, slots=True)
class Run:
    """One life of a server: its name, a folder for its temporary files, and the secret that opens :data:`GUARDED_APIS`."""

    name: str
    directory: Path
    key: str

    @property
    def mpi_directory(self) -> Path:
        """Where ranks share memory; like the stubs' files it is named after the run, so that nothing has to be guessed later."""
        return SHARED_MEMORY / f"{self.name}-mpi"


def name_run() -> str:
    """A name that no other run has, fit for files in /dev/shm."""
    return f"arctic-trt-{secrets.token_hex(4)}"


def locate_server() -> TritonServer:
    """The installed server with a Python backend for this Python; raises :class:`RefusedError` where there is none."""
    program = find_tritonserver()
    if program is None:
        raise RefusedError("There is no tritonserver.", INSTALL_TRITONSERVER)
    home = program.resolve().parents[1]
    backend, version = home / "backends" / "python", f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = (home / "python_backend_stubs" / version / STUB, backend / STUB)
    stub = next((path for path in stubs if path.is_file()), None)
    missing = next((path for path in (backend / LIBRARY, backend / UTILITIES) if not path.is_file()), None)
    if stub is None or missing:
        raise RefusedError(f"{program} has no Python backend: {missing or stubs[-1]} does not exist.", INSTALL_TRITONSERVER)
    return TritonServer(program, backend / LIBRARY, backend / UTILITIES, stub)


def check_stub(stub: Path, environ: Mapping[str, str]) -> None:
    """Raise :class:`RefusedError` unless ``stub`` was built for this Python, and finds its library."""
    built_for = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if built_for and built_for[1].decode() != version:
        raise RefusedError(
            f"{stub} is for Python {built_for[1].decode()}, but arctic-trt is installed for {version}.",
            f"Install arctic-trt for Python {built_for[1].decode()}, or take the tritonserver of arctic-trt[triton].",
        )
    started = subprocess.run([stub], env=dict(environ), capture_output=True, text=True, errors="replace", check=False)
    if "error while loading shared libraries" in started.stderr:
        lost = started.stderr.partition("libraries:")[2].strip()
        raise RefusedError(
            f"{stub} does not start: {lost}.",
            f"Install the shared library of Python {version} (apt-get install libpython{version}).",
        )


def check_packages() -> None:
    """Raise :class:`RefusedError` where the models would not load, or fail with the first request."""
    numpy = package_version("numpy")
    if numpy and int(numpy.split(".")[0]) >= 2:
        raise RefusedError(
            f"numpy {numpy} is installed, but tritonserver's Python backend was built for numpy 1.", "pip install 'numpy<2'"
        )
    for package in ("tritonclient", "fastapi", "uvicorn"):
        if package_version(package) is None:
            raise RefusedError(f"{package} is not installed, which serving needs.", "pip install 'arctic-trt[triton]'")


def check_ports(endpoints: Endpoints) -> None:
    """Raise :class:`RefusedError` naming the first port that cannot be listened on."""
    for flag, port in endpoints.ports.items():
        if reason := why_not_free(endpoints.host, port):
            raise RefusedError(
                f"--{flag} {port}: {endpoints.host}:{port} cannot be listened on ({reason}).",
                f"End what listens there, or choose another --{flag}.",
            )


def why_not_free(host: str, port: int) -> str | None:
    """Why ``port`` cannot be listened on, None if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that closed connections do not count
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error.strerror
    return None


def check_shared_memory(ranks: int, directory: Path = SHARED_MEMORY) -> None:
    """Raise :class:`RefusedError` where ``directory`` has too little room for the stubs and ``ranks``."""
    needed = LEAST_SHM_BYTES + (RANK_SHM_BYTES * ranks if ranks > 1 else 0)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RefusedError(
            f"{directory} has {free >> 20} MiB free, and {needed >> 20} MiB are needed for {ranks} ranks.",
            "Start the container with --shm-size=1g, or delete what is left over there.",
        )


def server_environ(environ: Mapping[str, str], run: Run, endpoints: Endpoints) -> dict[str, str]:
    """The environment of the server, and of the stubs and ranks that inherit it.

    Their temporary files go to the run's folder. The stub loads the very libpython that this process runs: another build
    of the same version would find this one's modules, and might not fit them.
    """
    libraries = [sysconfig.get_config_var("LIBDIR"), environ.get("LD_LIBRARY_PATH")]
    return {
        "HOME": "/tmp",  # mpirun does not start without one
        **without_launcher(environ),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "TMPDIR": str(run.directory),
        "OMPI_MCA_btl_sm_backing_directory": str(run.mpi_directory),
        MARK: run.name,
        HTTP_ADDRESS: endpoints.address(endpoints.http_port),
        CONTROL_KEY: run.key,
    }


def server_command(
    server: TritonServer, model_repo: Path, backends: Path, endpoints: Endpoints, run: Run, exit_timeout_s: int
) -> list[str]:
    """The command line that serves all models of ``model_repo``; after SIGTERM requests have ``exit_timeout_s`` to end."""
    key = f"{GUARDED_APIS}:{KEY_HEADER}={run.key}"
    return [
        str(server.program),
        f"--model-repository={model_repo.resolve()}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",  # without it a model whose stub has died cannot be loaded again
        "--load-model=*",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={exit_timeout_s}",
        *(f"--{kind}-address={endpoints.host}" for kind in ("http", "grpc", "metrics")),
        *(f"--{kind}-port={endpoints.ports[f'{kind}_port']}" for kind in ("http", "grpc", "metrics")),
        f"--http-restricted-api={key}",
        f"--grpc-restricted-protocol={key}",
        f"--backend-config=python,shm-default-byte-size={MODEL_SHM_BYTES}",  # a flag each: what follows a comma is lost
        f"--backend-config=python,shm-region-prefix-name={run.name}",
        "--pinned-memory-pool-byte-size=0",
        "--allow-gpu-metrics=false",
    ]
