"""A directory into which several processes, on this machine or on others, build the ranks of one engine.

As :class:`arctic_trt.checkpoint.output_dir.OutputDir`, except that it is shared: whoever comes with the same fingerprint joins.
A rank belongs to whoever holds its lock; a finished rank is in the journal; whoever finds that all ranks are finished completes
the directory: tokenizer, ``build.json``, at last ``config.json``, without which it is not an engine.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from arctic_trt import __version__
from arctic_trt.checkpoint.output_dir import (
    JOURNAL,
    MARKER,
    check_occupied,
    clear,
    lock_directory,
    mismatch,
    named_errors,
    read_marker,
    sync_directory,
    write_bytes,
    write_json,
)
from arctic_trt.engine.tensorrt_llm.worker import digest_of
from arctic_trt.errors import CheckpointError, RefusedError

RECORD = "build.json"
LOGS = "logs"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """A finished rank: the file that it was built from, and what came of it. Times in seconds, sizes in bytes."""

    rank: int
    digest: str
    shard_bytes: int
    shard_mtime_ns: int
    engine_bytes: int
    seconds: float

    def is_of(self, shard: Path) -> bool:
        """Whether ``shard`` still is what this rank was built from: by size and time of change, in doubt by its bytes."""
        stat = shard.stat()
        if (stat.st_size, stat.st_mtime_ns) == (self.shard_bytes, self.shard_mtime_ns):
            return True
        return stat.st_size == self.shard_bytes and digest_of(shard) == self.digest


class SharedEngineDir:
    """Context manager around one process's part of a build. Raises :class:`RefusedError` for a directory that is not ours."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], shards: Sequence[Path], *, overwrite: bool = False) -> None:
        self.path = path
        self._marker = {"kind": "engine", "fingerprint": dict(fingerprint)}
        self._shards = tuple(shards)
        self._overwrite = overwrite
        self._lock = -1
        self._rank_locks: dict[int, int] = {}

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    def completed(self) -> dict[int, RankRecord] | None:
        """The records of a finished engine of this very fingerprint, all shards unchanged; None for anything else."""
        if read_marker(self.path) is not None or not (self.path / "config.json").is_file():
            return None
        records = self._recorded()
        if len(records) < len(self._shards) or not all(self._holds(record) for record in records.values()):
            return None
        return records

    def _recorded(self) -> dict[int, RankRecord]:
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            if record["fingerprint"] != self._marker["fingerprint"]:
                return {}
            return {raw["rank"]: RankRecord(**raw) for raw in record["ranks"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # not built by us, or not any more

    def _holds(self, record: RankRecord) -> bool:
        engine = self.path / engine_file(record.rank)
        fits = engine.is_file() and engine.stat().st_size == record.engine_bytes
        return fits and record.is_of(self._shards[record.rank])

    def check(self) -> None:
        """Refuse what entering would refuse, without touching anything."""
        if self.path.is_dir():
            os.close(lock_directory(self.path, shared=True))
        found = read_marker(self.path)
        empty = found is not None and found.get("kind") == "engine" and not any(self.path.glob("rank*.engine"))
        if found is not None and found != self._marker and not empty and not self._overwrite:
            raise mismatch(self.path, found if "fingerprint" in found else {"fingerprint": {}}, self._marker)
        check_occupied(self.path, overwrite=self._overwrite)

    def __enter__(self) -> SharedEngineDir:
        self.check()
        with named_errors(self.path):
            self.journal.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.path, shared=True)
            with self._alone():
                self._claim()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in (*self._rank_locks.values(), self._lock):
            os.close(descriptor)

    def _claim(self) -> None:
        """Join what others have begun; begin otherwise, with those ranks of a finished engine that still hold."""
        if read_marker(self.path) == self._marker:
            return
        self._refuse_company()
        kept = [record for record in self._recorded().values() if self._holds(record)]
        if not kept:
            clear(self.path)
            self.journal.mkdir(exist_ok=True)
        write_json(self.path / MARKER, self._marker)
        for record in kept:
            write_json(self._record_path(record.rank), asdict(record))
        if kept:
            os.replace(self.path / "config.json", self.journal / "config.json")

    def _refuse_company(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(f"Another process is building something else in {self.path}.", "Wait for it.") from None
        except OSError:
            return  # this file system has no locks, which has been said
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock under which markers are written and directories completed; it is never held for long."""
        descriptor = os.open(self.journal / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def take(self, rank: int) -> bool:
        """Whether this process may build ``rank``: False while another one does."""
        descriptor = os.open(self.journal / f"rank{rank}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            logger.warning("Rank %d cannot be locked (%s): make sure that nobody else builds it.", rank, error.strerror)
        self._rank_locks[rank] = descriptor
        return True

    def finished(self) -> dict[int, RankRecord]:
        """Ranks that are done and whose shards are unchanged, by rank."""
        records = {}
        for path in sorted(self.journal.glob("rank*.json")):
            record = RankRecord(**json.loads(path.read_text(encoding="utf-8")))
            if self._holds(record):
                records[record.rank] = record
        return records

    def scratch(self, rank: int) -> Path:
        """An empty directory for TensorRT-LLM to save ``rank`` in."""
        path = self.journal.absolute() / f"rank{rank}"
        with named_errors(path):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        return path

    def log(self, rank: int) -> Path:
        """The file for everything that the build of ``rank`` prints."""
        path = self.path / LOGS / f"rank{rank}.log"
        with named_errors(path):
            path.parent.mkdir(exist_ok=True)
        return path

    def accept(self, rank: int, digest: str, seconds: float) -> RankRecord:
        """Move what was saved in :meth:`scratch` to its place and record it; :class:`CheckpointError` if part is missing."""
        scratch, name = self.scratch_of(rank), engine_file(rank)
        expected = [name, "config.json"] if rank == 0 else [name]
        for needed in expected:
            if not (scratch / needed).is_file():
                raise CheckpointError(f"TensorRT-LLM said that rank {rank} was built, but there is no {needed} in {scratch}.")
        stat = self._shards[rank].stat()
        record = RankRecord(
            rank=rank,
            digest=digest,
            shard_bytes=stat.st_size,
            shard_mtime_ns=stat.st_mtime_ns,
            engine_bytes=(scratch / name).stat().st_size,
            seconds=round(seconds, 3),
        )
        with named_errors(self.path):
            for file in sorted(scratch.iterdir()):
                _sync(file)
                keep_back = file.name in ("config.json", "quant_cfg.json")
                if keep_back or file.name.startswith(f"rank{rank}"):
                    os.replace(file, (self.journal if keep_back else self.path) / file.name)
            sync_directory(self.path)
            write_json(self._record_path(rank), asdict(record))
            shutil.rmtree(scratch)
        return record

    def scratch_of(self, rank: int) -> Path:
        """The directory that :meth:`scratch` made."""
        return self.journal.absolute() / f"rank{rank}"

    def _record_path(self, rank: int) -> Path:
        return self.journal / f"rank{rank}.json"

    def complete(self, side_files: Sequence[Path]) -> bool:
        """Make this an engine if all ranks are finished; False while some are not, here or elsewhere."""
        if read_marker(self.path) is None:
            return True  # another process has just done it
        with named_errors(self.path), self._alone():
            if read_marker(self.path) is None:
                return True
            records = self.finished()
            if len(records) < len(self._shards):
                return False
            for source in side_files:
                write_bytes(self.path / source.name, source.read_bytes())
            ranks = [asdict(records[rank]) for rank in sorted(records)]
            write_json(
                self.path / RECORD, {"arctic_trt": __version__, "fingerprint": self._marker["fingerprint"], "ranks": ranks}
            )
            for name in ("quant_cfg.json", "config.json"):
                if (self.journal / name).is_file():
                    os.replace(self.journal / name, self.path / name)
            sync_directory(self.path)
            (self.path / MARKER).unlink()
            shutil.rmtree(self.journal, ignore_errors=True)
            sync_directory(self.path)
        return True


def engine_file(rank: int) -> str:
    """Name of a rank's engine, TensorRT-LLM's convention."""
    return f"rank{rank}.engine"


def _sync(path: Path) -> None:
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
