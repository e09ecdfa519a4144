"""What this machine has: GPUs, the links between them, memory, packages. Asked without torch, CUDA or any of those packages.

Everything about GPUs comes from ``nvidia-smi``, which every driver brings: loading CUDA itself takes seconds and, in a process
that forks or joins an MPI job later, harm.
"""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arctic_trt.errors import RefusedError

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
NO_LIMIT = 2**63
UNLIMITED_V1 = 1 << 60
"""What version 1 of control groups writes for "no limit" is a little less than 2**63; nobody means an exbibyte."""

NVIDIA_SMI_PATIENCE_S = 10.0
"""A node of eight GPUs without persistence mode takes several seconds to answer: each GPU is woken up for it."""
GPU_FIELDS = ("index", "uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version")
INSTALL_TRITONSERVER = (
    "pip install 'arctic-trt[triton]' (x86-64, Python 3.10 to 3.12), or use NVIDIA's container of Triton Inference Server."
)
LINK = re.compile(r"NV\d+")
ANSI = re.compile(r"\x1b\[[0-9;]*m")

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where this user's caches of ours lie."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "arctic-trt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as the driver sees it.

    ``memory_bytes`` and ``free_bytes`` are 0 and ``compute_capability`` is (0, 0) where the driver does not say: memory that is
    the host's own (GB10), or a GPU that is divided (MIG).
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    driver: str

    @property
    def sm(self) -> int:
        """The architecture as compilers write it: 90 for (9, 0)."""
        major, minor = self.compute_capability
        return 10 * major + minor


def query_gpus() -> list[Gpu]:
    """The GPUs that a CUDA program started here would see, in its order; none where there is no ``nvidia-smi``.

    Indices are the driver's, by PCI bus, which is CUDA's order too wherever all GPUs are alike.
    """
    text = ask_nvidia_smi(f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    if not text:
        return []
    found = parse_gpus(text)
    return select_visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(text: str) -> list[tuple[str, Gpu]]:
    """Each GPU with its UUID, from the CSV of ``nvidia-smi``; lines of another shape are passed over with a warning."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(GPU_FIELDS) or not cells[0].isdigit():
            logger.warning("nvidia-smi gave a line that describes no GPU: %s", line.strip())
            continue
        index, uuid, name, capability, total, free, driver = cells
        found.append(
            (
                uuid,
                Gpu(
                    index=int(index),
                    name=name,
                    compute_capability=_capability(capability),
                    memory_bytes=_mebibytes(total),
                    free_bytes=_mebibytes(free),
                    driver=driver,
                ),
            )
        )
    return found


def select_visible(found: Sequence[tuple[str, Gpu]], visible: str | None) -> list[Gpu]:
    """What ``CUDA_VISIBLE_DEVICES`` leaves of ``found``: indices or beginnings of UUIDs, in the order they are named.

    As CUDA does, the list ends at the first word that names no GPU; an empty one, or -1, leaves none.
    """
    if visible is None:
        return [gpu for _, gpu in found]
    chosen: list[Gpu] = []
    for word in (word.strip() for word in visible.split(",")):
        match = [gpu for uuid, gpu in found if word == str(gpu.index) or (word.startswith("GPU-") and uuid.startswith(word))]
        if len(match) != 1:
            if word not in ("", "-1"):
                logger.warning("CUDA_VISIBLE_DEVICES=%s: %s names no GPU here, and hides what follows it.", visible, word)
            break
        if match[0] not in chosen:
            chosen.append(match[0])
    return chosen


def query_links() -> str | None:
    """How the GPUs are connected, such as ``NV18 between all 8`` or ``PCIe only``; None for fewer than two."""
    text = ask_nvidia_smi("topo", "-m")
    return describe_links(parse_topology(text)) if text else None


def parse_topology(text: str) -> list[list[str]]:
    """The square of connections between GPUs in ``nvidia-smi topo -m``, network cards and affinities left out."""
    lines = [ANSI.sub("", line).split() for line in text.splitlines()]
    rows = [cells[1:] for cells in lines if len(cells) > 1 and re.fullmatch(r"GPU\d+", cells[0]) and "X" in cells[1:]]
    return [row[: len(rows)] for row in rows]


def describe_links(matrix: Sequence[Sequence[str]]) -> str | None:
    """One phrase for all pairs of GPUs; ``NV18`` is 18 NVLinks, everything else passes through PCIe."""
    pairs = [cell for number, row in enumerate(matrix) for cell in row[number + 1 :]]
    if not pairs:
        return None
    links = [cell for cell in pairs if LINK.fullmatch(cell)]
    kinds = sorted(set(links), key=lambda kind: int(kind[2:]))
    if not links:
        return "PCIe only"
    if len(links) < len(pairs):
        return f"{'/'.join(kinds)} between {len(links)} of {len(pairs)} pairs, the others by PCIe"
    return f"{'/'.join(kinds)} between all {len(matrix)}"


def query_driver_cuda() -> str | None:
    """The newest CUDA version that the installed driver supports, such as ``13.0``."""
    text = ask_nvidia_smi()  # the table that it prints by default; --version is not known to drivers before 550
    match = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", text or "")
    return match.group(1) if match else None


def query_fabric() -> str | None:
    """State of the fabric that joins GPUs through NVSwitches (``Completed`` when it is up); None where there is none."""
    text = ask_nvidia_smi("--query-gpu=fabric.state", "--format=csv,noheader", optional=True)
    states = {line.strip() for line in (text or "").splitlines()} - {"", "N/A", "[N/A]", "[Not Supported]"}
    return "/".join(sorted(states)) or None


def ask_nvidia_smi(*arguments: str, optional: bool = False) -> str | None:
    """What ``nvidia-smi`` prints; None where it is absent or fails. A failure is logged unless the question is ``optional``."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=NVIDIA_SMI_PATIENCE_S,
            check=False,
        )
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    else:
        if done.returncode == 0:
            return done.stdout
        # It explains itself on stdout as often as on stderr.
        failure = " ".join((done.stderr.strip() or done.stdout.strip()).split()) or f"exit code {done.returncode}"
    if not optional:
        logger.warning("nvidia-smi failed, so that no GPU is seen: %s", failure)
    return None


def available_memory() -> int:
    """Bytes that a process may still take, also inside a container. Raises :class:`RefusedError` where Linux does not say."""
    limit = memory_limit()
    return min(_meminfo("MemAvailable"), NO_LIMIT if limit is None else limit[1])


def total_memory() -> int:
    """Bytes that all processes may take together: the machine's memory, or the container's part of it."""
    limit = memory_limit()
    return min(_meminfo("MemTotal"), NO_LIMIT if limit is None else limit[0])


def memory_limit() -> tuple[int, int] | None:
    """The tightest limit that control groups set on this process, and the bytes that it leaves; None without one.

    Files that the kernel keeps in memory and would drop at once do not count as taken: after a download they fill any limit.
    """
    found = []
    for directory in _groups("memory"):
        version_2 = (directory / "memory.max").exists()
        names = ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        try:
            limit, used = (directory / names[0]).read_text().strip(), int((directory / names[1]).read_text())
        except OSError:  # the root of all groups has no limit, and hence no such file
            continue
        if limit != "max" and int(limit) < UNLIMITED_V1:
            droppable = _droppable(directory, "inactive_file" if version_2 else "total_inactive_file")
            found.append((int(limit), max(0, int(limit) - max(0, used - droppable))))
    return (min(limit for limit, _ in found), min(left for _, left in found)) if found else None


def available_cores(processes: int = 1) -> int:
    """Cores for one of ``processes`` that share the machine, or a container's part of it, and no more than it is allowed on."""
    shares = [math.ceil(share) for share in map(_cpu_share, _groups("cpu")) if share is not None]
    return max(1, min(len(os.sched_getaffinity(0)), min([os.cpu_count() or 1, *shares]) // processes))


def last_level_cache() -> int:
    """Bytes of all caches of the last level together; 0 where the kernel does not say."""
    sizes: dict[str, int] = {}
    for index in CPUS.glob("cpu[0-9]*/cache/index3"):
        try:
            size, shared_by = ((index / name).read_text().strip() for name in ("size", "shared_cpu_list"))
        except OSError:  # a core that has been switched off meanwhile
            continue
        sizes[shared_by] = int(size.removesuffix("K")) * 1024 if size.endswith("K") else 0
    return sum(sizes.values())


def find_tritonserver() -> Path | None:
    """The program of Triton Inference Server: the wheel ``nvidia-pytriton``'s, else PATH's or the container's."""
    import importlib.util  # here, as above all a command line has to be quick
    import shutil

    wheel = importlib.util.find_spec("pytriton")  # finds, but does not import
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        program = Path(folder) / "tritonserver" / "bin" / "tritonserver"
        if program.is_file():
            return program
    found = shutil.which("tritonserver", path=f"{os.environ.get('PATH', '')}:/opt/tritonserver/bin")
    return Path(found) if found else None


def package_version(name: str) -> str | None:
    """The installed version of a distribution, from its metadata alone; None where it is absent."""
    from importlib import metadata  # here: it takes longer than all of this module

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_share(directory: Path) -> float | None:
    """Cores' worth of time that a control group may take, None without a limit."""
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota, period = ((directory / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return int(quota) / int(period) if quota not in ("max", "-1") else None


def _groups(controller: str) -> list[Path]:
    """The control group of this process and those around it, the outermost first, as far as they are visible from here."""
    try:
        lines = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    places = {CGROUPS: None, CGROUPS / controller: None}  # in a container, its own group is mounted there
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "" or controller in controllers.split(","):
            root = CGROUPS / controllers
            parts = Path(path.lstrip("/")).parts
            places.update({root.joinpath(*parts[:count]): None for count in range(1, len(parts) + 1)})
    return list(places)


def _droppable(directory: Path, key: str) -> int:
    try:
        return int(_table(directory / "memory.stat").get(key, "0"))
    except OSError:
        return 0


def _meminfo(key: str) -> int:
    try:
        value = _table(PROC / "meminfo").get(f"{key}:", "")
    except OSError:
        value = ""
    if not value.isdigit():
        what = "is available" if key == "MemAvailable" else "there is"
        raise RefusedError(f"/proc/meminfo does not say how much memory {what}.", "Pass --memory_budget.")
    return int(value) * 1024


def _table(path: Path) -> Mapping[str, str]:
    """The first two words of each line."""
    rows = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdigit() else 0
