"""Ranks that compute nothing: ``python fake_ranks.py SOCKET COUNTER MODE``, in plain Python, so that they start in no time.

Every start adds a line to the file COUNTER. A request's tokens are those of its prompt, one a step, as many as ``max_tokens``;
its ``user`` may ask for trouble: ``die``, ``hang``, ``babble`` (what is no message), ``wait`` (for a cancel), ``refuse``. MODE
says what is wrong with the ranks themselves:

``refuse`` ends with a complaint, ``crash`` without one, ``sleep`` never connects, ``load`` connects and is never ready, ``once``
is as it should be but for every start after the first, ``sleepy`` does not leave, ``stubborn`` has a child that does not either.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

LIMITS = {"max_input_len": 8, "max_seq_len": 16, "max_batch_size": 4, "vocab_size": 100, "world_size": 1}


def main(path, counter, mode):
    with open(counter, "a+") as file:
        file.write(f"{time.monotonic()}\n")
        file.seek(0)
        starts = len(file.readlines())
    if mode == "refuse":
        print("INFO: loading\narctic-trt: error: The engine is too large. Buy memory.\nand so on", file=sys.stderr)
        sys.exit(3)
    if mode == "crash" or (mode == "once" and starts > 1):
        print("something is wrong\n---", flush=True)
        sys.exit(5)
    if mode == "sleep":
        time.sleep(1000)
    if mode == "stubborn":
        subprocess.Popen(["sleep", "1000"], preexec_fn=os.setpgrp)  # noqa: PLW1509
    leader = socket.socket(socket.AF_UNIX)
    leader.connect(path)
    if mode == "load":
        time.sleep(1000)
    serve(leader)
    if mode in ("sleepy", "stubborn"):
        time.sleep(1000)


def serve(leader):
    say(leader, {"type": "ready", **LIMITS})
    steps, waiting = 0, set()
    for line in leader.makefile("rb"):
        message = json.loads(line)
        call = message["id"]
        if message["type"] == "cancel":
            if call in waiting:
                waiting.discard(call)
                step(leader, steps, [{"id": call, "finish_reason": "cancelled", "final": True}])
            continue
        body = message["body"]
        if body.get("user") in ("die", "hang", "babble"):
            trouble(leader, body["user"])
        if body.get("user") == "wait":
            waiting.add(call)
            continue
        if body.get("user") == "refuse":
            step(leader, steps, [{"id": call, "final": True, "error": "No.", "code": "invalid"}])
            continue
        tokens = body["prompt"][: body["max_tokens"]]
        for place, token in enumerate(tokens):
            time.sleep(body.get("seed", 0) / 1000)
            steps += 1
            last = place == len(tokens) - 1
            event = {"id": call, "token_ids": [token], "final": last, "finish_reason": "length" if last else None}
            step(leader, steps, [event])


def trouble(leader, kind):
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "babble":
        leader.sendall(b"hello\n")
    time.sleep(1000)


def step(leader, steps, events):
    say(leader, {"type": "step", "events": events, "stats": {"steps": steps, "generated_tokens": steps, "blocks": 9}})


def say(leader, message):
    leader.sendall(json.dumps(message).encode() + b"\n")


main(*sys.argv[1:])
