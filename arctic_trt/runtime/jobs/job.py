"""A batch job: rank 0 reads lines, keeps the engine supplied and appends results as they finish; the other ranks follow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.launch import is_leader
from arctic_trt.model.tokenizer import FILES, Tokenizer
from arctic_trt.runtime.batcher import Batcher
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.device import AUTO
from arctic_trt.runtime.jobs.input_file import InputScan, Shard, read_lines, scan_input
from arctic_trt.runtime.jobs.lines import DUPLICATE, INVALID_REQUEST, Line, LineError, custom_id_of, decode_line, parse_line
from arctic_trt.runtime.jobs.logprobs import names_of
from arctic_trt.runtime.jobs.output_file import (
    OutputFile,
    Resume,
    open_output,
    plan_resume,
    read_record,
    write_record,
)
from arctic_trt.runtime.jobs.plan import Defaults, Planner, in_fields, job_settings
from arctic_trt.runtime.jobs.results import error_line, result_line
from arctic_trt.runtime.kv_budget import KvBudget
from arctic_trt.runtime.open_engine import OpenEngine, check_engine, open_engine
from arctic_trt.runtime.outputs import check_writable
from arctic_trt.runtime.requests import Request, find_end_ids
from arctic_trt.runtime.runner import detokenizer_of, tokenizer_directory
from arctic_trt.runtime.sampler import plan_sampling

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 3
"""Requests under way, in full batches: one at work and two waiting, so that a sequence that ends is replaced at once."""
ENDING = ".jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What a batch job was asked for; ``sampling`` holds arguments of :func:`plan_sampling`, None where not given."""

    engine_dir: Path
    input_file: Path
    output_file: Path
    shard: Shard = field(default_factory=Shard)
    tokenizer_dir: Path | None = None
    max_output_len: int | None = None
    sampling: dict[str, float | None] = field(default_factory=dict)
    end_id: int | None = None
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    chat: bool = False
    kv_budget: KvBudget = field(default_factory=KvBudget)
    device: str = AUTO


@dataclass(slots=True, kw_only=True)
class Meter:
    """Where a job is. ``lines`` are the shard's; ``completed`` and ``errors`` count this run's, after ``skipped_done``."""

    lines: int
    skipped_done: int
    completed: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    tokens_seen: int = 0
    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None

    @property
    def seconds(self) -> float:
        return max((self.ended or time.perf_counter()) - self.began, 1e-9)

    @property
    def done(self) -> int:
        return self.skipped_done + self.completed + self.errors

    @property
    def tokens_per_second(self) -> float:
        """Output tokens, those of unfinished requests included."""
        return self.tokens_seen / self.seconds

    @property
    def seconds_left(self) -> float | None:
        """By this run's mean time a line; None before its first one."""
        done_now = self.completed + self.errors
        return self.seconds / done_now * (self.lines - self.done) if done_now else None

    def as_dict(self) -> dict[str, Any]:
        names = ("lines", "completed", "errors", "skipped_done", "prompt_tokens", "output_tokens")
        rate = self.output_tokens / self.seconds
        return {name: getattr(self, name) for name in names} | {
            "seconds": round(self.seconds, 6),
            "tokens_per_second": round(rate, 3),
        }


OnProgress = Callable[[Meter], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What rank 0 reports; ``errors_in_file`` are the error lines of earlier runs too."""

    meter: Meter
    errors_in_file: int
    output_file: Path
    world_size: int

    @property
    def hopeless(self) -> bool:
        """There were lines, and not one of them could be done."""
        return 0 < self.meter.lines == self.errors_in_file

    def as_dict(self) -> dict[str, Any]:
        return {**self.meter.as_dict(), "world_size": self.world_size, "output_file": str(self.output_file)}


@dataclass(slots=True)
class _Pending:
    """A line under way, with what is there of its choices."""

    line: Line
    choices: list[Completion | None]


def run_job(options: JobOptions, on_progress: OnProgress = lambda meter: None) -> JobResult | None:
    """Do all lines that are not done; returns the result on rank 0 and None on the others.

    Raises :class:`UsageError` for options and files that do not fit, :class:`RefusedError` for an output that is another job's,
    a wrong number of ranks or a TensorRT engine, and :class:`ArcticTrtError` for a disk that is full. A line that is wrong
    raises nothing: it becomes an error line.
    """
    world_size = check_engine(options.engine_dir).network()[1].world_size
    if not is_leader():
        open_engine(options.engine_dir, options.kv_budget, options.device).follow()
        return None
    with ExitStack() as stack:
        job = _prepare(options, stack)
        engine = open_engine(options.engine_dir, options.kv_budget, options.device)
        job.run(engine, on_progress)
        engine.close()
    return JobResult(
        meter=job.meter,
        errors_in_file=job.resume.num_errors + job.meter.errors,
        output_file=options.output_file,
        world_size=world_size,
    )


def _prepare(options: JobOptions, stack: ExitStack) -> BatchJob:
    """Everything that can be refused before weights are read."""
    if options.input_file.suffix != ENDING:
        raise UsageError(f"--input_file {options.input_file} has the ending {options.input_file.suffix!r}, expected {ENDING}.")
    if options.max_output_len is not None and options.max_output_len < 1:
        raise UsageError(f"--max_output_len {options.max_output_len} is not a positive number.")
    plan_sampling(**options.sampling)  # type: ignore[arg-type]
    check_writable("--output_file", options.output_file)
    engine = check_engine(options.engine_dir)
    directory = tokenizer_directory(options.engine_dir, options.tokenizer_dir)
    tokenizer = _load_tokenizer(options, directory)
    defaults = Defaults(
        max_output_len=options.max_output_len,
        sampling=options.sampling,
        end_ids=find_end_ids(options.end_id, tokenizer, directory),
        stop_words=options.stop_words,
        bad_words=options.bad_words,
        chat=options.chat,
    )
    settings = job_settings(options.engine_dir, asdict(engine), directory, defaults, options.shard)
    output = stack.enter_context(open_output(options.output_file))
    known = read_record(output, settings)
    scan = scan_input(options.input_file, options.shard, known)
    if not scan.grown_from_known:
        raise RefusedError(
            f"{output.path} belongs to another input: {options.input_file} does not begin with the {known and known.num_lines} "
            "lines that were there then.",
            "Repeat the command that began it to resume, or choose another --output_file.",
        )
    resume = plan_resume(output.lines(), scan.mark.num_lines, options.shard, output.path)
    if scan.mark != known:
        write_record(output, settings, scan.mark)
    output.cut(resume.num_bytes)
    config = engine.network()[0]
    planner = Planner(limits=engine.build_config, vocab_size=config.vocab_size, tokenizer=tokenizer, defaults=defaults)
    return BatchJob(options, planner, scan, resume, output)


def _load_tokenizer(options: JobOptions, directory: Path) -> Tokenizer | None:
    """None where there is none: then prompts have to be token ids, and the results hold no text."""
    if not (options.stop_words or options.bad_words) and not (directory / FILES[0]).exists():
        logger.warning("There is no %s in %s: only prompts of token ids can be done.", FILES[0], directory)
        return None
    return Tokenizer(directory)


class BatchJob:
    """Rank 0's part: what is left of the input, into the output."""

    def __init__(self, options: JobOptions, planner: Planner, scan: InputScan, resume: Resume, output: OutputFile) -> None:
        self.resume = resume
        self.meter = Meter(lines=scan.num_mine, skipped_done=resume.num_done)
        self._options = options
        self._planner = planner
        self._scan = scan
        self._output = output
        self._pending: dict[int, tuple[_Pending, int]] = {}
        """By a request's index the line that it belongs to, and which of its choices it is."""

    def run(self, engine: OpenEngine, on_progress: OnProgress) -> None:
        """Do what is left with an open engine."""
        self.meter.began = time.perf_counter()
        lines, most = self._left(), BATCHES_AHEAD * self._planner.limits.max_batch_size
        with engine.batcher(
            detokenizer=detokenizer_of(self._planner.tokenizer),
            listeners=Listeners(on_token=self._on_token, on_done=self._on_done),
        ) as batcher:
            while self._supply(batcher, lines, most, on_progress):
                batcher.step()
                on_progress(self.meter)
        self._output.sync()
        self.meter.ended = time.perf_counter()

    def _left(self) -> Iterator[tuple[int, bytes]]:
        lines = read_lines(self._options.input_file, self._options.shard, self._scan.mark.num_lines)
        return ((index, data) for index, data in lines if not self.resume.done[index])

    def _supply(self, batcher: Batcher, lines: Iterator[tuple[int, bytes]], most: int, on_progress: OnProgress) -> bool:
        """Let lines in until enough are under way; returns whether any are."""
        while len(self._pending) < most and (found := next(lines, None)) is not None:
            self._begin(batcher, *found)
            on_progress(self.meter)
        return bool(self._pending)

    def _begin(self, batcher: Batcher, index: int, data: bytes) -> None:
        """Begin a line, or write why it cannot be done."""
        number, value = index + 1, {}
        try:
            value = decode_line(data)
            if index in self._scan.duplicates:
                first = self._scan.duplicates[index] + 1
                raise LineError(DUPLICATE, f"custom_id {custom_id_of(value, number)!r} is that of input line {first} already.")
            line = parse_line(value, number)
            self._add(batcher, line, self._planner.requests(line))
        except LineError as error:
            self._output.append(error_line(number, custom_id_of(value, number), error))
            self.meter.errors += 1

    def _add(self, batcher: Batcher, line: Line, requests: list[Request]) -> None:
        pending = _Pending(line, [None] * len(requests))
        for choice, request in enumerate(requests):
            try:
                batcher.add(request)
            except UsageError as error:  # what the cache can never hold; so it is for the first choice if for any
                raise LineError(INVALID_REQUEST, in_fields(str(error))) from None
            self._pending[request.index] = pending, choice

    def _on_token(self, index: int, token: int) -> None:
        self.meter.tokens_seen += 1

    def _on_done(self, index: int, completion: Completion) -> None:
        pending, choice = self._pending.pop(index)
        pending.choices[choice] = completion
        choices = [each for each in pending.choices if each is not None]
        if len(choices) < len(pending.choices):
            return
        model = self._options.engine_dir.absolute().name
        created, name_of = int(time.time()), names_of(self._planner.tokenizer)
        self._output.append(result_line(pending.line, choices, model=model, created=created, name_of=name_of))
        self.meter.completed += 1
        self.meter.prompt_tokens += len(completion.prompt)
        self.meter.output_tokens += sum(len(each.token_ids) for each in choices)
