"""An engine that stays open: rank 0 brings one piece of work after another, the other ranks take part until it is closed.

Between two pieces of work, which may be minutes, the other ranks sleep.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from arctic_trt.engine.config import TORCH, BuildConfig, EngineConfig, read_engine_config
from arctic_trt.errors import RefusedError
from arctic_trt.launch import find_launch
from arctic_trt.runtime.backends import TorchBackend, Work
from arctic_trt.runtime.batcher import Batcher
from arctic_trt.runtime.communicator import Communicator, agreement, check_world, connect
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.detokenizer import Detokenizer
from arctic_trt.runtime.device import AUTO
from arctic_trt.runtime.kv_budget import KvBudget
from arctic_trt.runtime.outputs import NO_END_ID
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.scoring import Continuation, Score, Scorer


class OpenEngine:
    """One rank of an engine of the torch backend, on its ``device``; make one with :func:`open_engine`."""

    def __init__(self, engine: EngineConfig, comm: Communicator, backend: TorchBackend) -> None:
        self._comm = comm
        self._backend = backend
        self.limits: BuildConfig = engine.build_config
        self.vocab_size: int = engine.network()[0].vocab_size
        self.world_size: int = comm.world_size
        self.device = backend.device

    def complete(
        self,
        requests: list[Request],
        *,
        detokenizer: Callable[[], Detokenizer | None] = lambda: None,
        listeners: Listeners | None = None,
    ) -> list[Completion]:
        """On rank 0: complete ``requests``, whose places in the list need not be their indices, in their order."""
        work = Work(requests=requests, tokenizer=None, detokenizer=detokenizer, pad=NO_END_ID, streaming=False)
        self._comm.gather_all(True)
        return self._backend.complete(work, listeners or Listeners())

    @contextmanager
    def batcher(
        self, *, detokenizer: Callable[[], Detokenizer | None] = lambda: None, listeners: Listeners | None = None
    ) -> Iterator[Batcher]:
        """On rank 0: the engine's loop, for requests that come and go from outside.

        The other ranks take part until the block is left, asleep whenever no step comes for a while.
        """
        self._comm.gather_all(True)
        with self._backend.batcher(detokenizer, listeners or Listeners()) as batcher:
            yield batcher

    def score(self, continuations: Sequence[Continuation]) -> list[Score]:
        """On rank 0: the scores of ``continuations``, in their order.

        Raises :class:`UsageError` for one that the engine cannot take, :class:`ArcticTrtError` for logits that are not finite.
        """
        scorer = Scorer(continuations, self.limits, self.vocab_size)
        self.complete(scorer.requests, listeners=Listeners(on_prompt_logits=scorer.add))
        return scorer.scores

    def close(self) -> None:
        """On rank 0: let the other ranks go."""
        self._comm.gather_all(False)

    def follow(self) -> None:
        """On the other ranks: take part until rank 0 closes the engine."""
        while self._comm.gather_all(None)[0]:
            self._backend.follow()


def check_engine(engine_dir: Path) -> EngineConfig:
    """What is known about an engine before anything is loaded.

    Raises :class:`UsageError` or :class:`CheckpointError` for a directory that is no engine, :class:`RefusedError` for an
    engine of TensorRT-LLM and for a wrong number of ranks.
    """
    engine = read_engine_config(engine_dir)
    _, mapping, _ = engine.network(str(engine_dir / "config.json"))
    if engine.backend != TORCH:
        raise RefusedError(
            f"{engine_dir} is a TensorRT-LLM engine, and only engines of the torch backend can stay open and score text.",
            "Build one from the same checkpoint: arctic-trt build --backend torch.",
        )
    check_world(mapping, find_launch(os.environ))
    return engine


def open_engine(engine_dir: Path, budget: KvBudget | None = None, device: str = AUTO) -> OpenEngine:
    """Open an engine, on all its ranks together; all raise together, as :func:`check_engine` does or for a broken file."""
    engine = check_engine(engine_dir)
    comm = connect(engine.network()[1])
    backend = TorchBackend(engine_dir, engine, comm, budget or KvBudget(), device)
    with agreement(comm):
        backend.check()
    backend.load(None)
    return OpenEngine(engine, comm, backend)
