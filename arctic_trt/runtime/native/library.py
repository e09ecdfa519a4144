"""The shared library of C kernels, compiled on first use for the very processor it runs on.

The user's cache keeps one library for each combination of sources, compiler and processor, so that a home directory may be
shared by unlike machines. No compiler is needed to install or to run: without one the portable kernels do the work.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from arctic_trt.machine import cache_dir

SOURCES = ("pool.c", "matmul.c", "attention.c", "ops.c", "layer.c")
HEADERS = ("pool.h", "vec.h", "tables.h", "matmul.h", "ops.h")
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden"),
    # neither changes a result: errno is not read, and floating point exceptions are not trapped
    *("-fno-math-errno", "-fno-trapping-math"),
)
NATIVE = ("-march=native", "-mcpu=native")
"""What makes compilers use all that this processor has; which of the two they know depends on the architecture."""

P, L, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "rms_norm": (P, P, P, L, L, F),
    "rotary": (P, P, P, L, L, L, L),
    "project": (P, L, P, L, L, L, P, P, P),
    "route": (P, L, P, L, L, L, L, P, P),
    "gated_mlp": (P, L, L, L, P, L, P, P, P, L, P, P, P),
    "experts": (P, L, L, L, P, P, L, L, L, P, L, P, P, P, L, P, P, P),
    "store_kv": (P, P, P, P, L, L, L, L, L, L, P),
    "attention_part": (P, P, L, P, P, P, P, P, P, L, L, P, L, L, P),
    "mlp_part": (P, P, P, L, P),
    "attend": (P, P, L, L, L, L, L, P, P, P, L, L, L, P, P),
}

logger = logging.getLogger(__name__)


class NotCompiledError(Exception):
    """There is no library, for the reason given."""


@cache
def load() -> ctypes.CDLL:
    """The library, compiled unless this user's cache has it. Raises :class:`NotCompiledError` where that cannot be done."""
    compiler = find_compiler(os.environ)
    if compiler is None:
        raise NotCompiledError("no C compiler is installed: cc, gcc, clang, or the one that CC names")
    directory = cache_dir() / "kernels"
    path = directory / f"{_digest(compiler)}.so"
    try:
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            _compile_once(compiler, path)
        return open_library(path)
    except OSError as error:
        raise NotCompiledError(f"{path} cannot be made or loaded: {error.strerror or error}") from None


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """Path of the C compiler: the one that ``CC`` names, else the first that is on ``PATH``."""
    return next((path for path in map(shutil.which, (environ.get("CC", ""), "cc", "gcc", "clang")) if path), None)


def _digest(compiler: str) -> str:
    here, digest = Path(__file__).parent, hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((here / name).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest.update(b"\0".join([*map(str.encode, FLAGS), version, _processor().encode()]))
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What decides which instructions a compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(features))])


def _compile_once(compiler: str, path: Path) -> None:
    """Compile under a lock: the ranks of a job all come here at the same time."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            began = time.perf_counter()
            compile_library(compiler, path, NATIVE)
            logger.info("Compiled the CPU kernels in %.1f s into %s.", time.perf_counter() - began, path)


def compile_library(compiler: str, path: Path, targets: Sequence[str]) -> None:
    """Make ``path`` with the first of ``targets`` (flags that choose instructions) that the compiler knows, whole or not at all.

    Raises :class:`NotCompiledError` with the compiler's words.
    """
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        made = Path(work) / "kernels.so"
        for target in targets:
            sources = [str(here / name) for name in SOURCES]
            command = [compiler, *FLAGS, *target.split(), *sources, "-o", str(made), "-lpthread", "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(made, path)
                return
    raise NotCompiledError(f"{compiler} failed: {' '.join(done.stderr.split())[:300]}")


def open_library(path: Path) -> ctypes.CDLL:
    """The library at ``path`` with the types of its functions; raises ``OSError`` for what is none."""
    library = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.read_memory.argtypes, library.read_memory.restype = (P, L), L
    library.set_threads.argtypes, library.set_threads.restype = (ctypes.c_int,), ctypes.c_int
    return library
