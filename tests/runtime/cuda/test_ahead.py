"""A GPU's ranks, of twins and on CPUs, run ahead of the host: what comes out is what it is when they are waited for."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from arctic_trt.engine.config import BuildConfig, read_engine_config
from arctic_trt.runtime.batcher import Batcher, Execute
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling
from tests.runtime.conftest import Model
from tests.support.cuda_networks import repeat_on_cpu, twin_worker
from tests.support.late_ranks import LateRanks
from tests.support.thread_world import ThreadCommunicator, ThreadWorld

LIMITS = BuildConfig(max_batch_size=4, max_input_len=40, max_seq_len=60, max_num_tokens=16, max_beam_width=1)
ROOM = KvRoom(14, block_tokens=4)
"""Too little for four of the sequences."""
KINDS: list[dict[str, Any]] = [
    {"sampling": Sampling()},
    {"sampling": Sampling(temperature=1.5, seed=3)},
    {"sampling": Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01)},
    {"sampling": Sampling(top_p=0.8, repetition_penalty=1.3)},
    {"sampling": Sampling(temperature=0.9), "logprobs": 2},
    {"sampling": Sampling(), "prompt_logits": True},
]


def requests(model: Model, kinds: list[dict[str, Any]], output: int) -> list[Request]:
    prompts = model.prompts(*[3 + 5 * (index % 4) for index in range(len(kinds))])
    return [
        Request(index=index, prompt=tuple(prompt), max_new_tokens=output + index % 3, **kind)
        for index, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]


def complete(execute: Execute, asked: list[Request], *, ahead: bool) -> tuple[dict[int, Completion], Batcher]:
    done: dict[int, Completion] = {}
    listeners = Listeners(on_done=lambda index, completion: done.update({index: completion}))
    batcher = Batcher(execute, LIMITS, ahead=ahead, room=ROOM, listeners=listeners)
    for request in asked:
        batcher.add(request)
    while not batcher.idle:
        batcher.step()
    return done, batcher


@pytest.mark.parametrize("graphs", [(), (2, 4)])
def test_mixed_requests_in_scarce_room(tiny: Model, graphs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of prompts, decode steps as they are and as graphs that are filled up."""
    repeated = repeat_on_cpu(monkeypatch)
    worker = twin_worker(tiny.engine("fp8"), SoloCommunicator(), graphs, room=ROOM)
    asked = requests(tiny, KINDS * 2, output=14)
    if graphs:
        worker.network.prepare(16)
    waited, plain = complete(worker.lead, asked, ahead=False)
    ends = {index: frozenset(completion.token_ids[4 + index % 7 : 5 + index % 7]) for index, completion in waited.items()}
    asked += [replace(request, index=request.index + 100, end_ids=ends[request.index], stream=request.index) for request in asked]
    worker.dismiss()
    waited, plain = complete(worker.lead, asked, ahead=False)
    worker.dismiss()
    ranks = LateRanks(worker.lead)
    found, batcher = complete(ranks.execute, asked, ahead=True)
    assert found == waited and ranks.most_ahead == 2
    assert plain.stats.preemptions and batcher.stats.preemptions
    assert {completion.finish_reason for completion in found.values()} == {"stop", "length"}
    assert not batcher.stats.blocks_in_use and all(each.replays for each in repeated)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 2), (1, 2)])
def test_every_rank_knows_the_tokens(tiny: Model, tp_size: int, pp_size: int) -> None:
    """Each of the last stage chooses by itself, and each of the first hears of it."""
    name, recipe = f"tp{tp_size}pp{pp_size}", {"tp_size": tp_size, "pp_size": pp_size}
    engine_dir = tiny.engine(name, **recipe)
    mapping = read_engine_config(engine_dir).network()[1]
    world = ThreadWorld(mapping)
    workers = [twin_worker(engine_dir, ThreadCommunicator(world, rank), room=ROOM) for rank in range(mapping.world_size)]
    followers = [threading.Thread(target=lambda worker=worker: [worker.follow() for _ in range(2)]) for worker in workers[1:]]
    for follower in followers:
        follower.start()
    leader, results = workers[0], []
    for ahead in (False, True):
        results.append(complete(leader.lead, requests(tiny, KINDS, output=6), ahead=ahead)[0])
        leader.dismiss()
    for follower in followers:
        follower.join(timeout=60)
        assert not follower.is_alive()
    assert results[0] == results[1] and len(results[0]) == len(KINDS)
    first, last = workers[:tp_size], workers[-tp_size:]
    assert len({tuple(worker.network._chosen.token_K.tolist()) for worker in (*first, *last)}) == 1
