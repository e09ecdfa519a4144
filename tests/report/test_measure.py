"""The measurement of this machine: what it leaves behind, what it refuses, and that its figures are rates."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arctic_trt.errors import RefusedError
from arctic_trt.report import measure
from arctic_trt.report.measure import measure_disk, measure_machine, measure_read_bandwidth

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_FILE_BYTES", 24 * MIB)
    monkeypatch.setattr(measure, "FIRST_SYNC_BYTES", 8 * MIB)
    monkeypatch.setattr(measure, "CAST_ELEMENTS", 1 << 16)


def soon(seconds: float = 0.2) -> float:
    return time.perf_counter() + seconds


def test_every_rate_is_positive_and_nothing_is_left(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    rates = measure_machine(tmp_path, seconds=0.5, cores=2)
    assert min(rates.write_bytes, rates.read_bytes, rates.cast_bytes, rates.gemm_flops) > 0
    assert rates.cores == 2
    assert not list(tmp_path.iterdir()) and torch.get_num_threads() == threads


def test_cores_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arctic_trt.report.measure.available_cores", lambda: 3)
    assert measure_machine(tmp_path, seconds=0.1).cores == 3


class Writes:
    """Stands in for ``os.pwrite`` and notes how far the file has grown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.end = 0
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, fd: int, data: bytes, offset: int) -> int:
        self.end = max(self.end, offset + len(data))
        return self._pwrite(fd, data, offset)


@pytest.mark.parametrize(("free", "most"), [(10**12, 24 * MIB), (64 * MIB, 16 * MIB), (16 * MIB, 4 * MIB)])
def test_the_trial_file_is_bounded(free: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    measure_disk(tmp_path, soon(60))
    assert writes.end == most


def test_without_time_one_piece_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    write, read = measure_disk(tmp_path, soon(0))
    assert writes.end == 8 * MIB and min(write, read) > 0


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match=r"too full to measure.*--no_measure"):
        measure_disk(tmp_path, soon())


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RefusedError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["no-space", "ctrl-c"],
)
def test_nothing_is_left_after_a_failure(
    failure: BaseException, expected: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(expected):
        measure_machine(tmp_path, seconds=0.2, cores=1)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(measure.tempfile, "TemporaryFile", deny)
    with pytest.raises(RefusedError, match=r"cannot be measured: Permission denied.*--no_measure"):
        measure_disk(tmp_path, soon())


def test_threads_add_up() -> None:
    """Each thread makes its own work, warms up once and repeats at least once."""
    calls: list[int] = []

    def make() -> Callable[[], int]:
        mine: list[int] = []

        def work() -> int:
            mine.append(1)
            calls.append(len(mine))
            return 5

        return work

    assert measure._per_second(make, 3, 0.0) > 0
    assert sorted(calls) == [1, 1, 1, 2, 2, 2]


def test_a_failing_work_ends_the_others() -> None:
    makers = iter([True, False])

    def make() -> Callable[[], int]:
        fails = next(makers)

        def work() -> int:
            if fails:
                raise ValueError("broken")
            time.sleep(0.001)
            return 1

        return work

    with pytest.raises(ValueError, match="broken"):
        measure._per_second(make, 2, 3600.0)


def test_work_counts_what_it_says() -> None:
    assert measure._cast_work()() == 2 << 16
    assert measure._gemm_work()() == 2 * 512 * 4096 * 2048


@pytest.mark.parametrize(("cache", "threads", "floats"), [(0, 2, 1 << 19), (2 << 20, 1, 2 << 20), (8 << 20, 4, 2 << 20)])
def test_memory_is_read_past_the_cache(cache: int, threads: int, floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads together read at least four times the last-level cache."""
    monkeypatch.setattr(measure, "LEAST_STREAM_BYTES", 4 * MIB)
    monkeypatch.setattr(measure, "last_level_cache", lambda: cache)
    sizes, read_work = [], measure._read_work
    monkeypatch.setattr(measure, "_read_work", lambda count: sizes.append(count) or read_work(count))
    before = torch.get_num_threads()
    assert measure_read_bandwidth(seconds=0.03, threads=threads) > 1e8
    assert sizes == [floats] * threads and torch.get_num_threads() == before


def test_the_median_pass_of_all_threads_is_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest thread ends a pass: its time counts, not the time that each took for itself."""
    waits = [iter([0.0, 0.05, 0.0, 0.2]), iter([0.1, 0.0, 0.1, 0.0])]

    def work_of(floats: int) -> Callable[[], int]:
        mine = waits.pop()
        return lambda: time.sleep(next(mine)) or 100

    monkeypatch.setattr(measure, "_read_work", work_of)
    assert 200 / 0.13 < measure_read_bandwidth(seconds=0, threads=2) <= 200 / 0.1


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass does not count, and of the others the median does."""
    waits = iter([99.0, *range(1, 10)])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        synchronize = record

        def elapsed_time(self, end: Event) -> float:
            return next(waits)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert measure.measure_gpu_bandwidth(torch.device("cpu"), size=MIB) == MIB / 5e-3
    assert next(waits, None) is None


def test_a_gpu_that_is_full_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(RefusedError, match=r"Measuring GPU 3 takes 1\.1 GB of its memory"):
        measure.measure_gpu_bandwidth(torch.device("cuda", 3))


def test_no_thread_is_timed_before_all_are_warm() -> None:
    order: list[str] = []

    def make() -> Callable[[], int]:
        state = iter(["warm", "timed"])

        def work() -> int:
            time.sleep(0.01)
            order.append(next(state))
            return 1

        return work

    measure._per_second(make, 3, 0.0)
    assert order == ["warm"] * 3 + ["timed"] * 3


def test_reading_counts_its_bytes() -> None:
    assert measure._read_work(1000)() == 4000
