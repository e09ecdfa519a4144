"""How fast this machine reads, writes, casts and multiplies: a few seconds that turn sizes into hours.

The casts and the matrix products run as ``quantize`` runs them: one thread a core, torch's own threads off.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arctic_trt.errors import RefusedError
from arctic_trt.machine import available_cores, last_level_cache

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 4 << 20
FIRST_SYNC_BYTES = 32 << 20
MAX_FILE_BYTES = 1 << 30
FREE_SHARE = 4
"""The trial file takes at most this part of the free space."""
CAST_ELEMENTS = 4 << 20
GEMM_ROWS, GEMM_INNER, GEMM_COLUMNS = 512, 4096, 2048
LEAST_STREAM_BYTES = 512 << 20
CACHES = 4
"""What is read to measure memory is so many times larger than the last-level cache."""
LEAST_PASSES = 3
GPU_STREAM_BYTES, GPU_PASSES = 1 << 30, 9
WRITE_SHARE, READ_SHARE, CAST_SHARE = 0.4, 0.3, 0.5
"""Of the time that is left when each begins; the matrix products take the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per second: bytes to and from disk, bytes of bf16 scaled and cast to e4m3, floating-point operations of bf16 products."""

    write_bytes: float
    read_bytes: float
    cast_bytes: float
    gemm_flops: float
    cores: int


def measure_machine(directory: Path, *, seconds: float = 10.0, cores: int | None = None) -> Rates:
    """Measure the disk that holds ``directory`` (which must exist) and the cores, in about ``seconds`` altogether.

    The trial file has no name, so that it is gone when the process is, however that ends. Raises :class:`RefusedError` when the
    disk cannot be written.
    """
    cores = cores or available_cores()
    deadline = time.perf_counter() + seconds
    import torch  # part of the time: it takes a second where files are cold

    write, read = measure_disk(directory, deadline)
    threads = torch.get_num_threads()
    try:
        cast = _per_second(_cast_work, cores, CAST_SHARE * _left(deadline))
        gemm = _per_second(_gemm_work, cores, _left(deadline))
    finally:
        torch.set_num_threads(threads)
    return Rates(write_bytes=write, read_bytes=read, cast_bytes=cast, gemm_flops=gemm, cores=cores)


def measure_disk(directory: Path, deadline: float) -> tuple[float, float]:
    """Bytes a second written (and made durable) to, and read back from, a trial file of at most 1 GiB."""
    limit = min(MAX_FILE_BYTES, shutil.disk_usage(directory).free // FREE_SHARE)
    if limit < CHUNK_BYTES:
        raise RefusedError(f"The disk of {directory} is too full to measure.", "Free some space, or pass --no_measure.")
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            write = _write(file.fileno(), limit, WRITE_SHARE * _left(deadline))
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return write, _read(file.fileno(), READ_SHARE * _left(deadline))
    except OSError as error:
        raise RefusedError(
            f"{directory} cannot be measured: {error.strerror}.", "Choose another --output_dir, or pass --no_measure."
        ) from None


def measure_read_bandwidth(*, seconds: float = 0.9, threads: int | None = None) -> float:
    """Bytes a second that ``threads`` cores (all of them, unless given) read from memory together: the median of some passes.

    In a pass each thread sums float32 numbers of its own, and all have to be done; their numbers together are at least four times
    the last-level cache. Nothing is written.
    """
    import torch

    threads = threads or available_cores()
    floats = max(LEAST_STREAM_BYTES, CACHES * last_level_cache()) // (4 * threads)
    rates: list[float] = []
    before, until = torch.get_num_threads(), time.perf_counter() + seconds
    try:
        with ThreadPoolExecutor(threads, "measure", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            works = list(pool.map(lambda _: _read_work(floats), range(threads)))
            while len(rates) < LEAST_PASSES or time.perf_counter() < until:
                began = time.perf_counter()
                done = sum(pool.map(lambda work: work(), works))
                rates.append(done / (time.perf_counter() - began))
    finally:
        torch.set_num_threads(before)
    return statistics.median(rates)


def measure_gpu_bandwidth(device: torch.device, *, size: int = GPU_STREAM_BYTES) -> float:
    """Bytes a second that a GPU reads from its memory: the median of some sums of ``size`` bytes of float32.

    Raises :class:`RefusedError` where the GPU has no room for them.
    """
    import torch

    try:
        numbers = torch.ones(size // 4, device=device)
    except torch.cuda.OutOfMemoryError:
        raise RefusedError(f"Measuring GPU {device.index} takes {size / 1e9:.1f} GB of its memory.", "Free that much.") from None
    times = []
    for _ in range(1 + GPU_PASSES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        numbers.sum()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return numbers.nbytes / statistics.median(times[1:])


def _write(fd: int, limit_bytes: int, seconds: float) -> float:
    """Sync after ever larger pieces, as many as fit the time: one sync at the end could take any time."""
    block = os.urandom(CHUNK_BYTES)
    done, piece, began = 0, min(FIRST_SYNC_BYTES, limit_bytes), time.perf_counter()
    while piece >= CHUNK_BYTES:
        for _ in range(piece // CHUNK_BYTES):
            done += os.pwrite(fd, block, done)
        os.fdatasync(fd)
        elapsed = time.perf_counter() - began
        piece = min(2 * piece, int(done / elapsed * (seconds - elapsed)), limit_bytes - done)
    return done / elapsed


def _read(fd: int, seconds: float) -> float:
    buffer = bytearray(CHUNK_BYTES)
    done, began = 0, time.perf_counter()
    while count := os.preadv(fd, [buffer], done):
        done += count
        if time.perf_counter() - began > seconds:
            break
    return done / (time.perf_counter() - began)


def _per_second(make_work: Callable[[], Callable[[], int]], threads: int, seconds: float) -> float:
    """Units a second of ``threads`` threads that each repeat a work of their own; at least two rounds each, one to warm up.

    All are warm before the first is timed, so that none is timed alone.
    """
    import torch

    stop = threading.Event()

    def prepare() -> Callable[[], int]:
        work = make_work()
        work()
        return work

    def repeat(work: Callable[[], int]) -> float:
        units, began = 0, time.perf_counter()
        while True:
            units += work()
            elapsed = time.perf_counter() - began
            if elapsed >= seconds or stop.is_set():
                return units / elapsed

    with ThreadPoolExecutor(threads, "measure", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            works = [future.result() for future in [pool.submit(prepare) for _ in range(threads)]]
            return sum(future.result() for future in [pool.submit(repeat, work) for work in works])
        finally:
            stop.set()


def _cast_work() -> Callable[[], int]:
    """One round finds the maximum and casts: returns bytes of bf16."""
    import torch

    from arctic_trt.quantize.fp8 import amax, cast_e4m3, scale_from_amax

    weights = torch.randn(CAST_ELEMENTS).bfloat16()

    def work() -> int:
        cast_e4m3(weights, scale_from_amax(amax(weights)))
        return weights.nbytes

    return work


def _gemm_work() -> Callable[[], int]:
    """One round multiplies some rows with a matrix: returns floating-point operations."""
    import torch

    rows_TD = torch.randn(GEMM_ROWS, GEMM_INNER).bfloat16()
    weight_FD = torch.randn(GEMM_COLUMNS, GEMM_INNER).bfloat16()

    def work() -> int:
        torch.nn.functional.linear(rows_TD, weight_FD)
        return 2 * GEMM_ROWS * GEMM_INNER * GEMM_COLUMNS

    return work


def _read_work(floats: int) -> Callable[[], int]:
    """One round adds up ``floats`` numbers: returns the bytes read."""
    import torch

    numbers = torch.ones(floats)

    def work() -> int:
        numbers.sum()
        return numbers.nbytes

    return work


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.perf_counter())
