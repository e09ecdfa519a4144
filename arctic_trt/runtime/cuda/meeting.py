"""How the ranks of an MPI job become a group of torch.distributed: rank 0 listens, the others hear where over MPI.

The port is the system's choice, and listened at from then on: nobody else can take it in between.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch

from arctic_trt.errors import RefusedError
from arctic_trt.runtime.communicator import Communicator, agreement

PATIENCE = timedelta(minutes=5)
"""For ranks to join, and for a collective that some never start: then NCCL ends the process, and with it the job."""
CONNECT_S = 10.0
LOOPBACK = "127.0.0.1"


def join(control: Communicator, device: torch.device, backend: str) -> Any:
    """Make this process a rank of torch's world; all ranks of ``control`` do so together.

    Returns what rank 0 has to keep for as long as any of the others are in that world. Raises :class:`RefusedError` on all of
    them where torch lacks ``backend``, or where one cannot reach rank 0.
    """
    from torch import distributed

    host = socket.gethostname()
    hosts = control.gather_all(host)
    listener: Any = None
    with agreement(control):
        check_backend(backend)
        if control.rank == 0:
            listener = _store(LOOPBACK, 0, is_master=True)
    addresses, port = control.gather_all((addresses_towards(hosts), listener.port) if listener else None)[0]
    with agreement(control):
        try:
            distributed.init_process_group(
                backend,
                store=listener or _store(find_reachable(addresses, port), port, is_master=False),
                rank=control.rank,
                world_size=control.world_size,
                timeout=PATIENCE,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".!")
            raise RefusedError(
                f"{host} cannot join the other ranks over {backend.upper()}: {reason}.",
                "NCCL_DEBUG=INFO says more; NCCL_SOCKET_IFNAME names the network between hosts.",
            ) from None
    return listener


def check_backend(backend: str) -> None:
    """Raise :class:`RefusedError` where this torch has no ``backend``."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_backend_available(backend):
        raise RefusedError(
            f"torch {torch.__version__} has no {backend.upper()}, by which several GPUs would exchange tensors.",
            "Install a CUDA build of torch.",
        )


def addresses_towards(hosts: Sequence[str]) -> list[str]:
    """Where those ``hosts`` may reach this one, the likeliest first; nothing but this host needs no network."""
    here = socket.gethostname()
    others = sorted(set(hosts) - {here})
    if not others:
        return [LOOPBACK]
    found = [*(_route_to(host) for host in others), *_resolve(here)]
    return list(dict.fromkeys(address for address in found if address and not address.startswith("127.")))


def find_reachable(addresses: Iterable[str], port: int) -> str:
    """The first of ``addresses`` where somebody listens at ``port``; raises :class:`RefusedError` for none."""
    tried = list(addresses)
    for address in tried:
        try:
            socket.create_connection((address, port), timeout=CONNECT_S).close()
        except OSError:
            continue
        return address
    raise RefusedError(
        f"{socket.gethostname()} cannot reach rank 0 at {' or '.join(tried) or 'any address'}, port {port}.",
        "Its host needs a name that other hosts resolve to an address they can reach, and no firewall in between.",
    )


def _store(address: str, port: int, *, is_master: bool) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(address, port, is_master=is_master, timeout=PATIENCE, wait_for_workers=False)


def _route_to(host: str) -> str | None:
    """The address of this host's interface towards ``host``; nothing is sent."""
    for address in _resolve(host):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return None


def _resolve(host: str) -> list[str]:
    try:
        return socket.gethostbyname_ex(host)[2]
    except OSError:
        return []
