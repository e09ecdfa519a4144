"""Load for a served engine: clients that ask without a pause, what became of each request, and how processes grow meanwhile."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

PATIENCE_S = 120.0
SAMPLE_S = 2.0
KEPT_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of so many tokens, no fewer; ``stream`` asks for them in pieces."""

    prompt: tuple[int, ...]
    max_tokens: int
    stream: bool = False

    @property
    def body(self) -> dict[str, Any]:
        return {"input_ids": list(self.prompt), "max_tokens": self.max_tokens, "end_id": -1, "stream": self.stream}


def make_asks(count: int, vocab_size: int, input_tokens: int, output_tokens: int, seed: int = 1) -> list[Ask]:
    """Requests of unequal lengths, from a quarter of the given ones up; every other one streams."""
    draw = random.Random(seed)
    return [
        Ask(
            tuple(draw.randrange(5, vocab_size) for _ in range(draw.randint(max(1, input_tokens // 4), input_tokens))),
            draw.randint(max(1, output_tokens // 4), output_tokens),
            stream=index % 2 == 1,
        )
        for index in range(count)
    ]


class ServedModel:
    """``generate`` and ``generate_stream`` of one model; not for several threads at once."""

    def __init__(self, address: str, model: str) -> None:
        self._connection = HTTPConnection(address, timeout=PATIENCE_S)
        self._path = f"/v2/models/{model}/generate"

    def complete(self, ask: Ask) -> tuple[int, ...]:
        """The tokens of the answer; raises ``OSError``, ``HTTPException`` or ``ValueError`` for anything else."""
        self._connection.request("POST", self._path + "_stream" * ask.stream, json.dumps(ask.body))
        response = self._connection.getresponse()
        said = response.read().decode()
        events = [line[6:] for line in said.splitlines() if line.startswith("data: ")] if ask.stream else [said]
        answers = [json.loads(event) for event in events]
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors or response.status != 200:
            raise ValueError(f"{response.status}: {errors[0] if errors else said}")
        return tuple(token for answer in answers for token in _numbers(answer["output_token_ids"]))

    def close(self) -> None:
        self._connection.close()


def _numbers(value: int | list[int]) -> list[int]:
    """Triton prints an array of one number as that number."""
    return value if isinstance(value, list) else [value]


@dataclass
class Tally:
    """What became of the requests that were sent; ``latencies`` in seconds, of those that were answered."""

    sent: int = 0
    answered: int = 0
    differing: int = 0
    tokens: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        return self.sent - self.answered

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        waits = sorted(self.latencies) or [0.0]
        return {
            **{name: getattr(self, name) for name in ("sent", "answered", "lost", "differing", "tokens", "seconds")},
            "tokens_per_second": self.tokens_per_s,
            "latency_s": {"median": statistics.median(waits), "p99": waits[int(0.99 * (len(waits) - 1))], "longest": waits[-1]},
            "errors": dict(self.errors.most_common(KEPT_ERRORS)),
        }


def send_all(make_model: Callable[[], ServedModel], asks: Iterator[tuple[Ask, tuple[int, ...] | None]], clients: int) -> Tally:
    """Have ``clients`` ask at once, each the next request as soon as its last is answered, until there are no more.

    An answer is held to the one that comes with its request.
    """
    tally, lock = Tally(), threading.Lock()

    def work() -> None:
        model = make_model()
        while True:
            with lock:
                ask, expected = next(asks, (None, None))
                tally.sent += ask is not None
            if ask is None:
                model.close()
                return
            began = time.perf_counter()
            try:
                tokens = model.complete(ask)
            except (OSError, HTTPException, ValueError, KeyError) as error:
                model.close()
                with lock:
                    tally.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                continue
            with lock:
                tally.answered += 1
                tally.differing += expected is not None and tokens != expected
                tally.tokens += len(tokens)
                tally.latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.seconds = time.perf_counter() - began
    return tally


def until(deadline: float, asks: Sequence[tuple[Ask, tuple[int, ...]]]) -> Iterator[tuple[Ask, tuple[int, ...]]]:
    """``asks`` over and over, as long as ``time.perf_counter()`` is below ``deadline``."""
    return itertools.takewhile(lambda _: time.perf_counter() < deadline, itertools.cycle(asks))


@dataclass(frozen=True, slots=True)
class Growth:
    """Private and shared memory of a process, in bytes, in the load's second quarter and in its last."""

    name: str
    before: float
    after: float

    @property
    def bytes(self) -> float:
        return self.after - self.before

    @property
    def grew(self) -> bool:
        """More than what allocators keep back."""
        return self.bytes > max(4e6, 0.02 * self.before)


@contextmanager
def watching(root: int) -> Iterator[dict[int, tuple[str, list[int]]]]:
    """Sample the memory of all processes below ``root`` while the context is open: by process id its name and samples."""
    samples: dict[int, tuple[str, list[int]]] = {}
    over = threading.Event()

    def sample() -> None:
        while not over.is_set():
            for pid in descendants(root):
                with suppress(OSError, StopIteration):  # it may end at any moment
                    samples.setdefault(pid, (name_of(pid), []))[1].append(memory_of(pid))
            over.wait(SAMPLE_S)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def growth_of(samples: dict[int, tuple[str, list[int]]]) -> list[Growth]:
    """Of processes that lived all the time, the largest first."""
    longest = max((len(values) for _, values in samples.values()), default=0)
    lived = [(name, values) for name, values in samples.values() if len(values) >= max(4, longest - 1)]
    found = [
        Growth(
            name, statistics.median(values[len(values) // 4 : len(values) // 2]), statistics.median(values[-len(values) // 4 :])
        )
        for name, values in lived
    ]
    return sorted(found, key=lambda growth: -growth.after)


def descendants(root: int) -> list[int]:
    """The process ids of ``root`` and of all processes that came of it and are still attached to it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def memory_of(pid: int) -> int:
    """Bytes of memory that only exist for this process: not those of mapped files, such as weights."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem") if key in status)


def name_of(pid: int) -> str:
    """The program, and what it was started for as far as that tells it from others."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    program = Path(words[0]).name
    told = [word for word in words[1:] if word in ("service", "triton") or "openai" in word]
    if program == "triton_python_backend_stub":
        told = [Path(words[1]).parents[1].name]
    return " ".join([program, *told[:1]])
