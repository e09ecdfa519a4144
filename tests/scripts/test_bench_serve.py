"""``scripts/bench_serve``: what it counts as lost or mixed up, what it calls growth, and the engine that it gives to ``run``."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MIB = 1 << 20


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("serve_load")
    sys.path.remove(str(SCRIPTS))


class Echo(BaseHTTPRequestHandler):
    """A model that answers with its prompt: token by token when it streams; some prompts it does not bear."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = (body["input_ids"] * body["max_tokens"])[: body["max_tokens"]]
        if 13 in ids:
            self.answer(400, json.dumps({"error": "13 brings bad luck"}))
        elif 17 in ids:
            self.connection.close()
        elif body["stream"]:
            self.answer(200, "".join(f'data: {{"output_token_ids": {token}}}\n\n' for token in ids))
        else:
            self.answer(200, json.dumps({"output_token_ids": ids if len(ids) > 1 else ids[0]}))

    def answer(self, status: int, said: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def expected(load: Any, *prompts: tuple[int, ...], tokens: int = 4) -> list[Any]:
    asks = [load.Ask(prompt, tokens, stream=index % 2 == 1) for index, prompt in enumerate(prompts)]
    return [(ask, (ask.prompt * tokens)[:tokens]) for ask in asks]


def test_all_answers_are_counted_and_held_to_their_own(load: Any, address: str) -> None:
    asks = expected(load, (1, 2), (3,), (4, 5, 6), (7, 8))
    tally = load.send_all(lambda: load.ServedModel(address, "any"), iter(asks * 5), 3)
    assert (tally.sent, tally.answered, tally.lost, tally.differing, tally.tokens) == (20, 20, 0, 0, 80)
    swapped = [(asks[0][0], asks[1][1]), *asks[1:]]
    assert load.send_all(lambda: load.ServedModel(address, "any"), iter(swapped), 2).differing == 1
    single = expected(load, (9,), tokens=1)
    assert load.send_all(lambda: load.ServedModel(address, "any"), iter(single), 1).differing == 0


def test_errors_and_broken_connections_are_lost_answers(load: Any, address: str) -> None:
    asks = expected(load, (1,), (13,), (13, 1), (17,), (2,))
    tally = load.send_all(lambda: load.ServedModel(address, "any"), iter(asks), 2)
    assert (tally.sent, tally.answered, tally.lost) == (5, 2, 3)
    said = tally.as_dict()["errors"]
    assert sum(said.values()) == 3 and any("bad luck" in error for error in said)


def test_load_ends_with_its_time(load: Any) -> None:
    asks = load.until(time.perf_counter() + 0.05, [("a", "b")])
    assert sum(1 for _ in asks) > 1


def test_requests_differ_in_length_and_are_the_same_again(load: Any) -> None:
    asks = load.make_asks(20, 300, 40, 32)
    assert asks == load.make_asks(20, 300, 40, 32)
    assert all(10 <= len(ask.prompt) <= 40 and 8 <= ask.max_tokens <= 32 for ask in asks)
    assert len({len(ask.prompt) for ask in asks}) > 5
    assert {ask.stream for ask in asks} == {False, True}


def test_growth_is_what_stays_after_the_first_quarter(load: Any) -> None:
    warm = [MIB * size for size in (50, 90, *[100] * 18)]
    leak = [MIB * (100 + 5 * step) for step in range(20)]
    growths = {growth.name: growth for growth in load.growth_of({1: ("warm", warm), 2: ("leak", leak), 3: ("short", [1, 2])})}
    assert growths.keys() == {"warm", "leak"}, "one that did not live all the time has no growth"
    assert growths["warm"].bytes == 0 and not growths["warm"].grew
    assert growths["leak"].grew


def test_memory_is_watched_of_a_process_and_its_children(load: Any) -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 20; true"])
    try:
        assert child.pid in load.descendants(os.getpid())
        assert load.memory_of(os.getpid()) > MIB
        with load.watching(os.getpid()) as samples:
            time.sleep(0.05)
        assert {os.getpid(), child.pid} <= samples.keys()
    finally:
        child.kill()
        child.wait()


def test_run_gets_the_same_engine_for_as_many_sequences_as_there_are_clients(load: Any, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPTS / "bench_serve"))
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "rank0.safetensors").write_bytes(b"weights")
    (engine / "config.json").write_text(json.dumps({"build_config": {"max_batch_size": 256, "max_input_len": 9}}))
    limited = script["limited"](engine, tmp_path / "limited", 16)
    assert (limited / "rank0.safetensors").read_bytes() == b"weights"
    assert json.loads((limited / "config.json").read_text())["build_config"] == {"max_batch_size": 16, "max_input_len": 9}
    assert json.loads((engine / "config.json").read_text())["build_config"]["max_batch_size"] == 256


def test_a_lost_answer_or_a_process_that_grows_is_exit_code_1(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(SCRIPTS / "bench_serve"))
    output = script["Output"]()
    fine = load.Tally(sent=2, answered=2, tokens=10, seconds=2.0, latencies=[0.5, 1.5])
    script["report"](output, [0.9, 0.95], [fine], fine, [], {"clients": 16})
    assert "0.925 (0.900 to 0.950)" in capsys.readouterr().out
    lost = load.Tally(sent=3, answered=2, tokens=10, seconds=2.0, latencies=[0.5, 1.5])
    for tally, growths in ((lost, []), (fine, [load.Growth("leak", 1e8, 2e8)])):
        with pytest.raises(SystemExit) as ended:
            script["report"](output, [0.9], [fine], tally, growths, {"clients": 16})
        assert ended.value.code == 1


def test_help_and_what_it_needs(load: Any) -> None:
    main = runpy.run_path(str(SCRIPTS / "bench_serve"))["main"]
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0
    assert CliRunner().invoke(main, ["/nonexistent"]).exit_code == 2
