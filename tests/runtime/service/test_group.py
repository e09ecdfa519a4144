"""A leader and ranks that misbehave in every way: nobody waits in vain, nothing is left behind, and service comes back."""

from __future__ import annotations

import logging
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import ArcticTrtError, RefusedError
from arctic_trt.runtime.service import group as module
from arctic_trt.runtime.service.calls import Call
from arctic_trt.runtime.service.group import (
    FIRST_BACK_OFF_S,
    LONGEST_BACK_OFF_S,
    GroupOptions,
    WorkerGroup,
    add_counts,
    next_back_off,
    service_command,
)
from arctic_trt.runtime.service.protocol import Event, RankStats
from tests.support.engines import ROOT
from tests.support.waiting import alive, wait_until

LIMIT_S = 10.0
FAKE_RANKS = str(ROOT / "tests" / "support" / "fake_ranks.py")
Make = Callable[..., WorkerGroup]


class Answer:
    """What one call was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), "nothing comes after the last event"
        self.events.append(event)
        if event.final:
            self.ended.set()

    def wait(self) -> Event:
        assert self.ended.wait(LIMIT_S), "the call is still waiting"
        return self.events[-1]

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    return tmp_path / "starts"


@pytest.fixture
def make(starts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes groups of fake ranks; fails if one leaves a process or a file behind."""
    groups: list[WorkerGroup] = []
    monkeypatch.setattr(module, "FIRST_BACK_OFF_S", 0.05)
    monkeypatch.setattr(module, "LAST_WORDS_S", 0.5)

    def make(mode: str = "good", on_state: Callable[[str], None] = lambda state: None, **options: Any) -> WorkerGroup:
        def command(_: GroupOptions, path: Path) -> list[str]:
            return [sys.executable, "-S", FAKE_RANKS, str(path), str(starts), mode]

        groups.append(WorkerGroup(GroupOptions(engine_dir=Path("engine"), **options), on_state, command=command))
        return groups[-1]

    yield make
    processes = [process for group in groups if (process := group._process)]
    for group in groups:
        group.close()
    assert not any(group.pids for group in groups)
    assert not any(process._directories[0].exists() for process in processes)


def ask(group: WorkerGroup, *prompt: int, **body: Any) -> tuple[Call, Answer]:
    answer = Answer()
    return group.submit({"prompt": list(prompt), "max_tokens": 99, **body}, answer), answer


def test_calls_are_told_what_comes_of_them(make: Make) -> None:
    states: list[str] = []
    group = make(on_state=states.append)
    assert group.state == "starting" and not group.pids
    group.start()
    assert group.state == "ready" and group.limits and group.limits.max_batch_size == 4 and len(group.pids) == 1
    call, answer = ask(group, 1, 2, 3)
    assert answer.wait().finish_reason == "length" and answer.tokens == [1, 2, 3]
    assert {event.id for event in answer.events} == {call.id}
    assert (group.stats.steps, group.stats.generated_tokens, group.stats.blocks) == (3, 3, 9)
    assert (group.stats.under_way, group.stats.restarts) == (0, 0)
    _, refused = ask(group, 1, user="refuse")
    assert (refused.wait().error, refused.wait().code) == ("No.", "invalid")
    group.close()
    assert group.state == "closed" and states == ["ready", "closed"]
    group.close()


def test_a_call_can_be_cancelled_once(make: Make) -> None:
    group = make()
    group.start()
    call, answer = ask(group, 1, user="wait")
    assert group.stats.under_way == 1
    call.cancel()
    assert answer.wait().finish_reason == "cancelled"
    call.cancel()
    assert ask(group, 7)[1].wait().token_ids == (7,)


@pytest.mark.parametrize(
    ("mode", "kind", "complaint"),
    [
        ("refuse", RefusedError, r"^The engine is too large\. Buy memory\.$"),
        ("crash", ArcticTrtError, r"ended with exit code 5; the last that they said is: 'something is wrong'\."),
        ("sleep", ArcticTrtError, r"not ready after 0\.5 s"),
        ("load", ArcticTrtError, r"not ready after 0\.5 s"),
    ],
)
def test_a_first_start_that_fails_is_an_error(make: Make, mode: str, kind: type[Exception], complaint: str) -> None:
    group = make(mode, start_timeout_s=0.5)
    with pytest.raises(kind, match=complaint):
        group.start()
    assert group.state == "closed" and not group.pids
    assert ask(group, 1)[1].wait().code == "unavailable"


def test_a_program_that_is_not_there_is_an_error(make: Make) -> None:
    group = WorkerGroup(GroupOptions(engine_dir=Path("engine"), python="/no/python"))
    with pytest.raises(RefusedError, match=r"The ranks cannot be started \(.*No such file.*/no/python"):
        group.start()
    group.close()


@pytest.mark.parametrize("trouble", ["die", "babble", "hang"])
def test_who_waits_is_told_and_service_comes_back(make: Make, starts: Path, trouble: str) -> None:
    states: list[str] = []
    group = make(on_state=states.append, hang_timeout_s=1.0 if trouble == "hang" else LIMIT_S)
    group.start()
    assert ask(group, 1, 2)[1].wait().final
    waiting = [ask(group, 1, user="wait")[1] for _ in range(3)]
    ask(group, 1, user=trouble)
    began = time.monotonic()
    for answer in waiting:
        event = answer.wait()
        assert event.code == "internal" and event.error and "ask again" in event.error and event.final
        assert len(answer.events) == 1
    assert time.monotonic() - began < 3
    _, meanwhile = ask(group, 1)
    if meanwhile.ended.is_set():  # nearly always
        assert meanwhile.wait().code == "unavailable" and "in a moment" in str(meanwhile.wait().error)
    assert wait_until(lambda: group.state == "ready", LIMIT_S)
    assert ask(group, 5, 6, 7)[1].wait().finish_reason == "length"
    assert group.stats.restarts == 1 and len(starts.read_text().splitlines()) == 2
    assert group.stats.steps == 5, "counts go on"
    assert wait_until(lambda: states == ["ready", "down", "ready"], LIMIT_S)


def test_ranks_without_work_may_be_silent(make: Make) -> None:
    group = make(hang_timeout_s=1.0)
    group.start()
    time.sleep(1.2)
    assert ask(group, 1, 2, seed=50)[1].wait().finish_reason == "length"
    assert group.stats.restarts == 0


def test_ranks_that_cannot_be_started_again_are_tried_ever_more_rarely(make: Make, starts: Path) -> None:
    group = make("once")
    group.start()
    ask(group, 1, user="die")
    assert wait_until(lambda: len(starts.read_text().splitlines()) == 5, LIMIT_S)
    assert group.state == "down"
    times = [float(line) for line in starts.read_text().splitlines()]
    pauses = [after - before for before, after in pairwise(times[1:])]
    assert pauses == sorted(pauses) and pauses[-1] > 0.4
    began = time.monotonic()
    group.close()
    assert time.monotonic() - began < 1, "a pause can be interrupted"


@given(st.lists(st.floats(0, 50), max_size=20))
def test_pauses_double_up_to_a_limit_until_the_ranks_are_healthy(lives: list[float]) -> None:
    pause = 0.0
    for count, healthy_s in enumerate(lives):
        pause = next_back_off(pause, healthy_s)
        assert pause == min(FIRST_BACK_OFF_S * 2**count, LONGEST_BACK_OFF_S)
    assert next_back_off(pause, 60) == FIRST_BACK_OFF_S


def test_closing_waits_for_calls_under_way_and_takes_no_new_ones(make: Make) -> None:
    group = make()
    group.start()
    _, slow = ask(group, 1, 2, 3, seed=200)
    closing = threading.Thread(target=group.close, args=(LIMIT_S,))
    closing.start()
    assert wait_until(lambda: group._draining, LIMIT_S)
    late = ask(group, 1)[1].wait()
    assert (late.code, late.error) == ("unavailable", "The engine is shutting down.")
    closing.join(LIMIT_S)
    assert slow.wait().finish_reason == "length" and slow.tokens == [1, 2, 3] and group.state == "closed"


def test_closing_does_not_wait_for_ever(make: Make, caplog: pytest.LogCaptureFixture, package_logger: logging.Logger) -> None:
    package_logger.propagate = True
    group = make()
    group.start()
    _, stuck = ask(group, 1, user="wait")
    group.close(0.1)
    assert stuck.wait().code == "unavailable" and stuck.wait().error == "The engine is shutting down."
    assert "1 requests are under way after 0 s" in caplog.text


def test_ranks_that_do_not_leave_are_killed_with_all_that_they_started(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVE_S", 0.3)
    group = make("stubborn")
    group.start()
    assert len(group.pids) == 2
    pids = group.pids
    group.close()
    assert not [
        pid for pid in pids if Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    ]


def test_a_start_can_be_given_up(make: Make) -> None:
    group = make("sleep")
    starting = threading.Thread(target=group.start)
    starting.start()
    assert wait_until(lambda: bool(group.pids), LIMIT_S)
    began = time.monotonic()
    group.close()
    starting.join(LIMIT_S)
    assert group.state == "closed" and time.monotonic() - began < 3


def test_what_listens_may_fail(make: Make, caplog: pytest.LogCaptureFixture, package_logger: logging.Logger) -> None:
    package_logger.propagate = True
    states: queue.SimpleQueue[str] = queue.SimpleQueue()

    def fail(news: object) -> None:
        if isinstance(news, str):
            states.put(news)
        raise ValueError("the fault of this test")

    group = make(on_state=fail)
    group.start()
    group.submit({"prompt": [1, 2], "max_tokens": 2}, fail)
    assert ask(group, 7)[1].wait().token_ids == (7,)
    group.close()
    assert [states.get(), states.get()] == ["ready", "closed"]
    assert len(caplog.records) == 4
    assert "request 1 failed" in caplog.text and "state 'ready' failed" in caplog.text


def test_under_load_and_with_deaths_every_call_ends_once_with_its_own_tokens(make: Make) -> None:
    group = make()
    group.start()
    answers: list[tuple[list[int], Answer]] = []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        for place in range(40):
            prompt = [draw.randrange(100) for _ in range(draw.randrange(1, 9))]
            call, answer = ask(group, *prompt, user="die" if seed == 0 and place % 13 == 5 else None)
            answers.append((prompt, answer))
            if draw.random() < 0.2:
                call.cancel()
            if draw.random() < 0.7 and answer.wait().code:
                wait_until(lambda: group.state == "ready", LIMIT_S)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    ends = [answer.wait() for _, answer in answers]
    assert len(ends) == 240
    for (prompt, answer), end in zip(answers, ends, strict=True):
        assert end.code in ("internal", "unavailable") or answer.tokens == prompt
        assert len({event.id for event in answer.events}) == 1
    assert group.stats.restarts == 3 and group.stats.under_way == 0
    assert sum(not end.code for end in ends) > 100


def test_nothing_outlives_a_leader_that_is_killed(starts: Path) -> None:
    program = f"""
        import sys
        from pathlib import Path
        from arctic_trt.runtime.service.group import GroupOptions, WorkerGroup
        tied = "import os, sys; from arctic_trt.launch import die_with_parent;"
        tied += "die_with_parent(os.getppid()); os.execv(sys.argv[1], sys.argv[1:])"
        def command(options, path):
            return [sys.executable, "-c", tied, sys.executable, {FAKE_RANKS!r}, str(path), {str(starts)!r}, "sleepy"]
        group = WorkerGroup(GroupOptions(engine_dir=Path("engine")), command=command)
        group.start()
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        print(*group.pids, flush=True)
        sys.stdin.read()
    """
    words = [sys.executable, "-c", dedent(program)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as leader:
        assert leader.stdout
        (pid,) = leader.stdout.readline().split()
        leader.kill()
    assert wait_until(lambda: not alive(int(pid)), LIMIT_S)


def test_the_command_line_has_what_was_given() -> None:
    options = GroupOptions(engine_dir=Path("e"), world_size=4, device="cpu", kv_cache_memory="2GiB", python="py")
    words = service_command(options, Path("s"))
    assert words[:4] == ["py", "-m", "arctic_trt", "service"]
    shared = ["--engine_dir", "e", "--socket", "s", "--world_size", "4"]
    assert words[4:] == [*shared, "--device", "cpu", "--kv_cache_memory", "2GiB"]


def test_counts_add_up_and_the_rest_is_the_latest() -> None:
    before, now = RankStats(steps=3, active=2, preemptions=1), RankStats(steps=4, active=1, blocks=7)
    assert add_counts(before, now) == RankStats(steps=7, active=1, blocks=7, preemptions=1)
