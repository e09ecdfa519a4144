"""An output directory that is either complete, or marked as unfinished work of ours, or not there.

A marker with the job's fingerprint is written before anything else and removed last, after everything has been made durable; the
directory is locked while a process works. What it may be cleared of is decided by name, so that nobody's files are ever deleted.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from arctic_trt.checkpoint.tensors import PARTIAL
from arctic_trt.errors import ArcticTrtError, CheckpointError, RefusedError, UsageError
from arctic_trt.model import tokenizer

logger = logging.getLogger(__name__)

MARKER = ".arctic-trt-unfinished"
JOURNAL = ".arctic-trt-journal"
CARD = "README.md"
CARD_MARK = "# Written by arctic-trt, which replaces this file. Remove this line to keep the file as it is."
"""Second line of a model card of ours, a comment in its front matter; without it a README.md is somebody's own."""
OWN_DIRECTORIES = ("report", "logs", JOURNAL)
OWN_NAMES = re.compile(
    r"rank\d+\.safetensors|rank\d+\.engine|rank\d+_managed_weights\.safetensors|quant_cfg\.json|config\.json|build\.json|"
    rf"logs/rank\d+\.log|report/[a-z_]+\.(json|html|png|yaml)|{re.escape(JOURNAL)}/[a-z0-9_.-]+|{re.escape(JOURNAL)}/rank\d+/[A-Za-z0-9_./-]+|"
    + "|".join(re.escape(name) for name in tokenizer.FILES)
)


class OutputDir:
    """Context manager around the writing of one checkpoint or engine.

    Entering claims the directory; ``resuming`` then says whether it holds unfinished work with the same ``fingerprint``. Leaving
    normally completes it. Leaving with an exception removes what was written, unless ``keep`` was set because there is something
    to resume and the inputs are not to blame: what was made from a damaged checkpoint is not kept. Raises
    :class:`RefusedError` when the directory holds anything that this job must not touch.
    """

    def __init__(self, path: Path, *, kind: str, fingerprint: Mapping[str, Any] | None = None, overwrite: bool = False) -> None:
        self.path = path
        self.overwrite = overwrite
        self.resuming = False
        self.keep = False
        self._marker = {"kind": kind, "fingerprint": dict(fingerprint or {})}
        self._created: list[Path] = []
        self._lock = -1

    def check(self) -> None:
        """Refuse what entering would refuse, without touching anything."""
        if self.path.is_dir():
            os.close(lock_directory(self.path))
        self._check_content()

    def is_ours(self) -> bool:
        """Whether nobody, or a run of this very job, has left a marker there."""
        return read_marker(self.path) in (None, self._marker)

    def _check_content(self) -> None:
        found = read_marker(self.path)
        differs = found is not None and found.get("fingerprint") and found != self._marker
        if differs and not self.overwrite:
            raise mismatch(self.path, found or {}, self._marker)
        check_occupied(self.path, overwrite=self.overwrite)

    def __enter__(self) -> OutputDir:
        self.check()
        self._created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.path)
            self._claim()
        except OSError as error:
            self._give_up()
            raise RefusedError(f"{self.path} cannot be written: {error.strerror}.", "Choose another --output_dir.") from None
        except BaseException:
            if self._lock >= 0:
                self._give_up()
            raise
        return self

    def _claim(self) -> None:
        """Mark the directory, now that no other process can; what an earlier run left stays only if it can be continued."""
        self._check_content()
        self.resuming = bool(self._marker["fingerprint"]) and read_marker(self.path) == self._marker
        if not self.resuming:
            shutil.rmtree(self.path / JOURNAL, ignore_errors=True)  # before the marker, which would otherwise vouch for it
            write_json(self.path / MARKER, self._marker)
            self.start_over()

    def start_over(self) -> None:
        """Delete what an earlier run has left: nothing of it can be continued."""
        clear(self.path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._unmark()
            elif not self.keep or isinstance(error, (CheckpointError, UsageError)):
                with suppress(ArcticTrtError, OSError):  # the error under way says more
                    clear(self.path)
                    self._unmark(durably=False)
        finally:
            if error is None:
                os.close(self._lock)
            else:
                self._give_up()

    def settle(self) -> None:
        """Unmark a directory that an earlier run completed, but had no time to unmark."""
        if read_marker(self.path) is None:
            return
        self._lock = lock_directory(self.path)
        try:
            self._unmark()
        finally:
            os.close(self._lock)

    def _unmark(self, *, durably: bool = True) -> None:
        shutil.rmtree(self.path / JOURNAL, ignore_errors=True)
        with named_errors(self.path):
            if durably:
                sync_directory(self.path)
            (self.path / MARKER).unlink()

    def _give_up(self) -> None:
        """Unlock; remove the directories that this job made, unless something is in them."""
        if self._lock >= 0:
            os.close(self._lock)
        with suppress(OSError):
            (self.path / (MARKER + PARTIAL)).unlink(missing_ok=True)
            for path in self._created:
                path.rmdir()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``name``, a path relative to the directory, atomically."""
        with named_errors(self.path / name):
            (self.path / name).parent.mkdir(exist_ok=True)
            write_json(self.path / name, value)

    def copy(self, source: Path, name: str) -> None:
        """Copy a small file into the directory, atomically."""
        data = source.read_bytes()
        with named_errors(self.path / name):
            write_bytes(self.path / name, data)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one sentence that names ``path``."""
    try:
        yield
    except OSError as error:
        raise ArcticTrtError(
            f"{path} cannot be written: {error.strerror}.", "Make room and run the same command again."
        ) from None


def read_marker(path: Path) -> dict[str, Any] | None:
    """The marker of unfinished work in ``path``, if there is one."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}  # written by something else than write_json; nothing in it can be trusted
    return marker if isinstance(marker, dict) else {}


def lock_directory(path: Path, *, shared: bool = False) -> int:
    """Lock the directory for as long as the returned descriptor is open, which no crash outlives.

    ``shared`` keeps out those who lock it for themselves, and only those. It is the directory that is locked, not the marker:
    whoever comes second must find the lock before there is a marker, and before replacing it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RefusedError(f"Another process is writing {path}.", "Wait for it, or choose another --output_dir.") from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no other process writes there.", path, error.strerror)
    return descriptor


def mismatch(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> RefusedError:
    """The refusal to continue ``found``, a marker, as the job of ``wanted``, naming what differs."""
    shown = differences(found["fingerprint"], wanted["fingerprint"]) or "kind"
    return RefusedError(
        f"{path} holds unfinished work that differs in {shown}.",
        "Repeat the command that began it to resume, or pass --overwrite to start over.",
    )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys in which two fingerprints differ, with their values where these are short; empty if they are equal."""
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return ", ".join(f"{key} ({then[key]} then, {now[key]} now)" if _is_short(then, now, key) else key for key in changed)


def _is_short(then: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    return key in then and key in now and max(len(str(then[key])), len(str(now[key]))) < 40


def entries(path: Path) -> list[str]:
    """Relative names of all files below ``path``, in order."""
    return sorted(str(item.relative_to(path)) for item in path.rglob("*") if not item.is_dir())


def is_own(path: Path, name: str) -> bool:
    """Whether ``name``, a file in the directory ``path``, is one that checkpoints and engines consist of."""
    if name == CARD:
        return is_own_card(path / name)
    stem = name.removesuffix(PARTIAL)
    return stem in (MARKER, CARD) or OWN_NAMES.fullmatch(stem) is not None


def is_own_card(path: Path) -> bool:
    """Whether a README.md is the model card that we wrote, and nobody has taken it over since."""
    try:
        with path.open(encoding="utf-8") as file:
            return [file.readline().rstrip(), file.readline().rstrip()] == ["---", CARD_MARK]
    except (OSError, ValueError):
        return False


def check_occupied(path: Path, *, overwrite: bool) -> None:
    """Refuse a file, a directory that holds finished work without ``overwrite``, or anything foreign in any case."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, expected a directory.", "Choose another --output_dir.")
    present = [name for name in entries(path) if name != MARKER + PARTIAL] if path.exists() else []
    if MARKER in present:
        overwrite = True
    foreign = [name for name in present if not is_own(path, name)]
    if foreign:
        raise RefusedError(
            f"{path} already holds {foreign[0]}, which is not part of a checkpoint or an engine.",
            "Choose an empty or new --output_dir; --overwrite never deletes such files.",
        )
    if present and not overwrite:
        raise RefusedError(f"{path} is not empty: it holds {present[0]}.", "Choose another --output_dir, or pass --overwrite.")


def check_space(path: Path, needed_bytes: int) -> None:
    """Refuse before starting when the disk cannot hold the output; what :func:`clear` would delete counts as free."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    own_bytes = (
        sum((path / name).lstat().st_blocks * 512 for name in entries(path) if is_own(path, name)) if existing == path else 0
    )
    free = shutil.disk_usage(existing).free + own_bytes
    if free < needed_bytes:
        raise RefusedError(
            f"{path} needs {needed_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free.",
            "Free some space or choose another --output_dir.",
        )


def clear(path: Path) -> None:
    """Delete what :func:`is_own` tells, except the marker; first the file that makes a directory count as complete."""
    for name in sorted(entries(path), key=lambda name: name != "config.json"):
        if name != MARKER and is_own(path, name):
            (path / name).unlink()
        if name == "config.json":
            sync_directory(path)
    for directory in sorted((item for item in path.rglob("*") if item.is_dir()), reverse=True):
        if directory.relative_to(path).parts[0] in OWN_DIRECTORIES:
            with suppress(OSError):
                directory.rmdir()  # unless somebody else's files are in it


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, make it durable, rename."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that it appears whole or not at all, also after a power loss."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and removals in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
