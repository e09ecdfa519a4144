"""A leader and real ranks under mpirun: answers, deaths of any process, and the way back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.errors import RefusedError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.service.group import GroupOptions, WorkerGroup
from arctic_trt.runtime.service.protocol import Event
from arctic_trt.runtime.service.text import chunk_text
from tests.runtime.conftest import Model
from tests.support.engines import complete
from tests.support.waiting import alive, wait_until

pytestmark = pytest.mark.mpi

LIMIT_S = 15.0
"""Within which everybody has an answer or an error."""
BACK_S = 60.0


class Answer:
    """What one call was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.begun.set()
        if event.final:
            self.ended.set()

    def wait(self) -> Event:
        assert self.ended.wait(LIMIT_S)
        return self.events[-1]

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]


def ask(group: WorkerGroup, **body: Any) -> Answer:
    answer = Answer()
    group.submit(body, answer, end_ids=[])
    return answer


@pytest.fixture(scope="module")
def group(tiny: Model) -> Iterator[WorkerGroup]:
    """Two ranks; whatever a test does to them, the next one finds them at work again."""
    engine_dir = tiny.engine("tiny-tp2", tp_size=2)
    group = WorkerGroup(GroupOptions(engine_dir=engine_dir, tokenizer_dir=tiny.hf_dir, world_size=2, start_timeout_s=60))
    group.start()
    pids = group.pids
    yield group
    group.close()
    assert not any(map(alive, pids)) and not group.pids


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_many_calls_together_are_answered_as_a_plain_run_answers(group: WorkerGroup, tiny: Model, tmp_path: Path) -> None:
    tokenizer, prompts = Tokenizer(tiny.hf_dir), tiny.prompts(*range(3, 40, 3))
    plain, _ = complete(tiny.engine("fp8"), prompts, tmp_path, max_output_len=16, end_id=-1, stop_words=("th", "a"))
    answers = [ask(group, prompt=prompt, max_tokens=16, stop=["th", "a"]) for prompt in prompts]
    for answer, output in zip(answers, plain.outputs, strict=True):
        assert answer.wait().finish_reason == output.finish_reason and answer.tokens == output.token_ids
        texts = (chunk_text(tokenizer.decode, event.context_ids, event.token_ids, event.trim) for event in answer.events)
        assert "".join(texts) == output.text
    assert group.limits and group.limits.world_size == 2 and group.stats.under_way == 0


@pytest.mark.parametrize("victim", ["a rank", "mpirun"])
def test_a_death_under_load_is_told_to_all_and_service_comes_back(group: WorkerGroup, victim: str) -> None:
    restarts, pids = group.stats.restarts, group.pids
    launcher = [pid for pid in pids if name_of(pid) in ("mpirun", "prterun")]
    ranks = sorted(set(pids) - set(launcher))
    assert (len(launcher), len(ranks)) == (1, 2)
    expected = ask(group, prompt=[7, 8, 9], max_tokens=12)
    expected.wait()
    answers = [ask(group, prompt=[7, 8, place], max_tokens=200) for place in range(12)]
    assert answers[0].begun.wait(LIMIT_S)
    os.kill({"a rank": ranks[1], "mpirun": launcher[0]}[victim], signal.SIGKILL)
    ends = [answer.wait() for answer in answers]
    assert any(end.code == "internal" for end in ends)
    assert all(end.code == "internal" or end.finish_reason == "length" for end in ends)
    assert wait_until(lambda: group.state == "ready" and group.stats.restarts == restarts + 1, BACK_S)
    assert not any(map(alive, pids))
    again = ask(group, prompt=[7, 8, 9], max_tokens=12)
    assert again.wait().finish_reason == "length" and again.tokens == expected.tokens


def test_closing_lets_calls_end_and_leaves_nothing(group: WorkerGroup) -> None:
    pids = group.pids
    directories = group._process._directories if group._process else []
    answers = [ask(group, prompt=[9, place], max_tokens=60) for place in range(8)]
    began = time.monotonic()
    group.close(drain_s=LIMIT_S)
    assert [answer.wait().finish_reason for answer in answers] == ["length"] * 8
    assert time.monotonic() - began < LIMIT_S and group.state == "closed"
    assert len(pids) == 3 and not any(map(alive, pids))
    assert len(directories) == 2 and not any(directory.exists() for directory in directories)


def test_what_the_ranks_refuse_is_refused(tiny: Model) -> None:
    engine_dir = tiny.engine("tiny-tp2", tp_size=2)
    with pytest.raises(RefusedError, match=r"^This engine needs 2 ranks \(tp 2 x pp 1\), got 1\."):
        WorkerGroup(GroupOptions(engine_dir=engine_dir, tokenizer_dir=tiny.hf_dir)).start()
