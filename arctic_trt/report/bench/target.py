"""What is measured, behind one verb: an engine of this machine, or a server behind a URL."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Protocol

from arctic_trt.report.bench.clients import Client, ServerError
from arctic_trt.report.bench.plan import Arrival
from arctic_trt.report.bench.stats import Trace
from arctic_trt.runtime.batcher import Batcher
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.open_engine import OpenEngine
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling

OnDone = Callable[[Trace], None]


class Target(Protocol):
    """Something that completes prompts."""

    def serve(self, arrivals: Sequence[Arrival], *, concurrency: int, on_done: OnDone) -> list[Trace]:
        """Let ``arrivals`` (in the order of their times) come when it is time and return what became of them, in their order.

        At most ``concurrency`` are under way at once, the others wait; ``on_done`` is told of each as it ends.
        """


class EngineTarget:
    """An open engine of the torch backend, on rank 0. Greedy, and no token ends a sequence early."""

    def __init__(self, engine: OpenEngine) -> None:
        self._engine = engine

    def serve(self, arrivals: Sequence[Arrival], *, concurrency: int, on_done: OnDone) -> list[Trace]:
        """Requests join between two steps; whoever arrives during a step has waited since then."""
        times: list[list[float]] = [[] for _ in arrivals]
        traces: dict[int, Trace] = {}

        def finished(index: int, completion: Completion) -> None:
            traces[index] = Trace(
                arrival_s=arrivals[index].at_s,
                input_tokens=len(completion.prompt),
                token_times_s=tuple(times[index]),
                output_tokens=len(completion.token_ids),
            )
            on_done(traces[index])

        def token(index: int, _: int) -> None:
            times[index].append(time.perf_counter() - began)

        with self._engine.batcher(listeners=Listeners(on_token=token, on_done=finished)) as batcher:
            began = time.perf_counter()
            waiting = deque(enumerate(arrivals))
            while waiting or not batcher.idle:
                under_way = len(arrivals) - len(waiting) - len(traces)
                _admit(batcher, waiting, concurrency - under_way, time.perf_counter() - began)
                if batcher.idle:
                    time.sleep(max(0.0, waiting[0][1].at_s - (time.perf_counter() - began)))
                batcher.step()
        return [traces[index] for index in range(len(arrivals))]


def _admit(batcher: Batcher, waiting: deque[tuple[int, Arrival]], room: int, now: float) -> None:
    """Let in those that have arrived, as long as there is room."""
    while waiting and room > 0 and waiting[0][1].at_s <= now:
        index, arrival = waiting.popleft()
        prompt = arrival.prompt.token_ids
        batcher.add(Request(index=index, prompt=prompt, max_new_tokens=arrival.max_new_tokens, sampling=Sampling()))
        room -= 1


class ServerTarget:
    """A server, asked by as many threads as requests may be under way; each request has a connection of its own."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def serve(self, arrivals: Sequence[Arrival], *, concurrency: int, on_done: OnDone) -> list[Trace]:
        """A request that fails has a trace with ``error``."""
        pool = ThreadPoolExecutor(min(concurrency, len(arrivals)), "bench")
        began = time.perf_counter()

        def ask(arrival: Arrival) -> Trace:
            trace = self._ask(arrival, began)
            on_done(trace)
            return trace

        try:
            asked = []
            for arrival in arrivals:
                time.sleep(max(0.0, arrival.at_s - (time.perf_counter() - began)))
                asked.append(pool.submit(ask, arrival))
            return [future.result() for future in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, arrival: Arrival, began: float) -> Trace:
        prompt, times, tokens, error = arrival.prompt, [], 0, None
        try:
            for piece in self._client.stream(prompt, arrival.max_new_tokens):
                if piece.is_output:
                    times.append(time.perf_counter() - began)
                tokens = piece.tokens_so_far or tokens + piece.is_output
            if not times:
                error = f"{self._client.where} answered without any output."
        except ServerError as failure:
            error = str(failure)
        except (OSError, HTTPException) as failure:
            reason = getattr(failure, "strerror", None) or f"{type(failure).__name__} {failure}".strip()
            error = f"{self._client.where}: {reason}."
        return Trace(
            arrival_s=arrival.at_s,
            input_tokens=len(prompt.token_ids),
            token_times_s=tuple(times),
            output_tokens=tokens,
            error=error,
        )
