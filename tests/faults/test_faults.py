"""Death and Ctrl-C in the middle: nothing half-written passes for whole, and the same command completes the work."""

from __future__ import annotations

import random
import shlex
import shutil
import signal
from collections.abc import Callable

import pytest

from arctic_trt.checkpoint.header import read_header
from arctic_trt.checkpoint.output_dir import MARKER
from tests.conftest import Finished
from tests.faults.conftest import LAYERS, Started
from tests.faults.dying import PROCESSES, Death, race, run_and_die
from tests.support.jobs import Job, digests, lasting, read_report, spilling_budget, tree

ArcticTrt = Callable[..., Finished]
DONE = Finished(0, "", "")


def moments(changes: list[str], every: int) -> list[int]:
    """Each change to a name, every other sync, and one write in ``every``."""
    writes = [i for i, name in enumerate(changes) if name == "pwrite"]
    syncs = [i for i, name in enumerate(changes) if "sync" in name]
    names = {i for i, name in enumerate(changes) if name != "pwrite" and "sync" not in name}
    return sorted(names | set(syncs[::2]) | set(writes[::every]) | {writes[-1]})


def undisturbed(job: Job, *flags: object) -> dict[str, str]:
    """What the job writes when nothing happens; the output directory is gone afterwards."""
    assert run_and_die(job.argv("-q", *flags)).code == 0
    expected = digests(job.output_dir)
    shutil.rmtree(job.output_dir)
    return expected


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(job: Job, arctic_trt: ArcticTrt) -> None:
    finished = run_and_die(job.argv("-q"))
    assert finished.code == 0
    expected, changes = lasting(job.output_dir), finished.changes
    assert len(changes) > 100 and changes[-1] == "unlink", "the marker goes last"
    resumed = 0
    for moment in moments(changes, every=30):
        shutil.rmtree(job.output_dir)
        assert run_and_die(job.argv("-q"), Death(moment)).code == -signal.SIGKILL
        assert arctic_trt(*job.argv("-q")) == DONE, f"after death at change {moment}, {changes[moment]}"
        assert lasting(job.output_dir) == expected
        resumed += read_report(job.output_dir)["resumed_layers"] > 0
    assert resumed >= 10


def test_killed_while_overwriting_the_same_command_gives_the_same_bytes(job: Job, arctic_trt: ArcticTrt) -> None:
    """The old checkpoint has more ranks, which must not survive beside the new ones."""
    old = Job(job.model_dir, job.calib, job.output_dir, {"--tp_size": 4})
    assert arctic_trt(*old.argv()).code == 0
    finished = run_and_die(job.argv("-q", "--overwrite"))
    assert finished.code == 0
    expected, changes = lasting(job.output_dir), finished.changes
    for moment in moments(changes, every=60)[:20]:
        assert arctic_trt(*old.argv("--overwrite")).code == 0
        assert run_and_die(job.argv("-q", "--overwrite"), Death(moment)).code == -signal.SIGKILL
        assert arctic_trt(*job.argv("-q", "--overwrite")) == DONE, f"after death at {moment}, {changes[moment]}"
        assert lasting(job.output_dir) == expected


@pytest.mark.parametrize("kind", ["fp8", "mixed", "full_prec", "hidden states on disk"])
def test_killed_again_and_again_the_job_is_completed(kind: str, layered_job: Job, arctic_trt: ArcticTrt) -> None:
    """Every layer boundary, just before and just after it is committed, and moments of chance between them."""
    job, draw = layered_job, random.Random(4)
    job.flags = {"--tp_size": 2, "--qformat": "full_prec" if kind == "full_prec" else "fp8"}
    if kind == "mixed":
        job.flags["--exclude_modules"] = "transformer.layers.[024].*"
    expected = undisturbed(job)
    if kind == "hidden states on disk":
        recipe = {"model_dir": job.model_dir, "output_dir": job.output_dir, "calib_dataset": str(job.calib), "tp_size": 2}
        job.flags["--memory_budget"] = spilling_budget(recipe)
    kills = 0
    for layer in range(LAYERS):
        record = f"/layer_{layer:04d}.json"
        chances = [Death(draw.randrange(60)) for _ in range(2)]
        for death in (*chances, Death(name=record), Death(name=record, after=True)):
            outcome = run_and_die(job.argv("-q"), death)
            assert outcome.code == -signal.SIGKILL, f"layer {layer}, {death}"
            assert not (job.output_dir / "config.json").exists()
            kills += 1
    for name in ("rank0.safetensors", "rank1.safetensors", "report/digests.json", "report/quantize.json", "config.json"):
        assert run_and_die(job.argv("-q"), Death(name=name, after=draw.random() < 0.5)).code == -signal.SIGKILL
        kills += 1
    assert kills >= 20
    assert arctic_trt(*job.argv("-q")) == DONE
    assert digests(job.output_dir) == expected
    report = read_report(job.output_dir)
    assert report["resumed_layers"] == LAYERS and report["hidden_states_on_disk"] is (kind == "hidden states on disk")
    assert {path.name for path in job.output_dir.iterdir()} == {name.split("/")[0] for name in expected}


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT], ids=lambda by: by.name)
def test_signals_leave_what_the_same_command_resumes(by: signal.Signals, layered_job: Job, arctic_trt: ArcticTrt) -> None:
    job, draw = layered_job, random.Random(int(by))
    expected = undisturbed(job)
    died = [Death(name=f"/layer_{layer:04d}.json", after=True, signal=by) for layer in range(LAYERS)]
    died += [Death(draw.randrange(120), signal=by) for _ in range(3)]
    for death in sorted(died, key=lambda death: death.name or ""):
        outcome = run_and_die(job.argv("-q"), death)
        assert outcome.code == (-signal.SIGTERM if by is signal.SIGTERM else 130)
    assert arctic_trt(*job.argv("-q")) == DONE
    assert digests(job.output_dir) == expected and read_report(job.output_dir)["resumed_layers"] == LAYERS


def test_interrupted_before_the_first_commit_nothing_is_left(layered_job: Job) -> None:
    assert run_and_die(layered_job.argv("-q"), Death(40, signal=signal.SIGINT)).code == 130
    assert not layered_job.output_dir.exists()


def test_kill_9_from_outside(long_job: Job, arctic_trt: ArcticTrt, started: Started) -> None:
    for line in ("layer 2/48", "layer 24/48"):
        with started(long_job, line) as process:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert "config.json" not in (tree(long_job.output_dir) or {})
    assert arctic_trt(*long_job.argv("-q")) == DONE
    resumed = lasting(long_job.output_dir)
    assert read_report(long_job.output_dir)["resumed_layers"] >= 22
    shutil.rmtree(long_job.output_dir)
    assert arctic_trt(*long_job.argv("-q")).code == 0
    assert lasting(long_job.output_dir) == resumed


def test_ctrl_c_ends_in_130_with_the_command_that_goes_on(long_job: Job, arctic_trt: ArcticTrt, started: Started) -> None:
    with started(long_job, "layer 3/48") as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    words = shlex.split(err.splitlines()[-1].removeprefix("arctic-trt: error: Interrupted. To go on: "))
    assert words == ["arctic-trt", *long_job.argv()]
    done = arctic_trt(*words[1:])
    resumed = read_report(long_job.output_dir)["resumed_layers"]
    assert done.code == 0 and f"INFO: Resuming after layer {resumed} of 48.\n" in done.err and resumed >= 2


def test_unfinished_work_of_another_recipe_is_refused_and_kept(layered_job: Job, arctic_trt: ArcticTrt) -> None:
    job = layered_job
    expected = undisturbed(job)
    assert run_and_die(job.argv("-q"), Death(name="/layer_0003.json", after=True)).code == -signal.SIGKILL
    before = tree(job.output_dir)
    for flags, difference in (
        (["--calib_size", 2], "calibration_ids, calib_size (128 then, 2 now)."),
        (["--tp_size", 1], "tp_size (2 then, 1 now), moe_tp_size (2 then, 1 now)."),
        (["--kv_cache_dtype", "none"], "kv_cache_dtype (fp8 then, none now)."),
        (["--exclude_modules", "*.mlp"], "exclude_modules ([] then, ['*.mlp'] now)."),
    ):
        done = arctic_trt(*job.argv("-q", *flags))
        assert (done.code, done.out) == (3, "")
        assert f"{job.output_dir} holds unfinished work that differs in {difference}" in done.err
        assert "Repeat the command that began it to resume, or pass --overwrite to start over." in done.err
        assert arctic_trt(*job.argv("-q", "--dry_run", *flags)).code == 3
    assert tree(job.output_dir) == before
    assert arctic_trt(*job.argv("-q", "--memory_budget", "2GiB", "--seed", 9)) == DONE, "these change no byte"
    assert digests(job.output_dir) == expected and read_report(job.output_dir)["resumed_layers"] == 4


def test_overwrite_starts_over_where_another_recipe_has_left_off(layered_job: Job, arctic_trt: ArcticTrt) -> None:
    job = layered_job
    expected = undisturbed(job, "--calib_size", 2)
    assert run_and_die(job.argv("-q"), Death(name="/layer_0003.json", after=True)).code == -signal.SIGKILL
    assert arctic_trt(*job.argv("-q", "--calib_size", 2, "--overwrite")) == DONE
    assert digests(job.output_dir) == expected and read_report(job.output_dir)["resumed_layers"] == 0


def test_a_finished_checkpoint_that_another_job_began_to_overwrite_is_not_taken_for_finished(
    layered_job: Job, arctic_trt: ArcticTrt
) -> None:
    job = layered_job
    assert arctic_trt(*job.argv("-q")) == DONE
    expected = digests(job.output_dir)
    other = ["-q", "--overwrite", "--calib_size", 2]
    assert run_and_die(job.argv(*other), Death(name=MARKER, after=True)).code == -signal.SIGKILL
    done = arctic_trt(*job.argv("-q"))
    assert done.code == 3 and "differs in calibration_ids, calib_size (2 then, 128 now)" in done.err
    assert arctic_trt(*job.argv("-q", "--overwrite")) == DONE and digests(job.output_dir) == expected


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_state_is_named_and_the_next_run_starts_over(damage: str, layered_job: Job, arctic_trt: ArcticTrt) -> None:
    job = layered_job
    expected = undisturbed(job)
    assert run_and_die(job.argv("-q"), Death(name="/layer_0003.json", after=True)).code == -signal.SIGKILL
    state = max(job.output_dir.glob(".arctic-trt-journal/*0003.state"))
    data = state.read_bytes()
    state.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    if damage == "missing":
        state.unlink()
    done = arctic_trt(*job.argv("-q"))
    assert done.code == 1 and f"error: {state} " in done.err and "the same command again: it starts over" in done.err
    assert tree(job.output_dir) == {}
    assert arctic_trt(*job.argv("-q")) == DONE and digests(job.output_dir) == expected


def test_damage_to_the_input_after_a_commit_leaves_nothing(layered_job: Job, arctic_trt: ArcticTrt) -> None:
    job, name = layered_job, "model.layers.5.block_sparse_moe.experts.1.w2.weight"
    assert run_and_die(job.argv("-q"), Death(name="/layer_0003.json", after=True)).code == -signal.SIGKILL
    shard = job.home(name)
    with shard.open("r+b") as file:
        file.seek(read_header(shard)[name].offset)
        file.write(b"\xff\xff")
    done = arctic_trt(*job.argv("-q"))
    assert done.code == 1 and f"{name} contains NaN or infinity" in done.err
    assert tree(job.output_dir) == {}


def test_a_second_process_is_refused_while_the_first_works(long_job: Job, arctic_trt: ArcticTrt, started: Started) -> None:
    with started(long_job, "layer 3/48") as process:
        process.send_signal(signal.SIGSTOP)
        for flags in ([], ["--overwrite"], ["--dry_run"], ["--calib_size", 1, "--overwrite"]):
            done = arctic_trt(*long_job.argv("-q", *flags))
            assert (done.code, done.out) == (3, "")
            assert f"Another process is writing {long_job.output_dir}." in done.err
        process.send_signal(signal.SIGCONT)
        process.communicate()
        assert process.returncode == 0
    assert read_report(long_job.output_dir)["resumed_layers"] == 0
    found = digests(long_job.output_dir)
    assert found == undisturbed(long_job, "--overwrite")


def test_processes_that_start_at_once_do_not_mix(job: Job) -> None:
    expected = undisturbed(job)
    for _ in range(5):
        start, codes = PROCESSES.Barrier(3), PROCESSES.SimpleQueue()
        processes = [PROCESSES.Process(target=race, args=(job.argv("-q"), start, codes)) for _ in range(3)]
        for process in processes:
            process.start()
        found = sorted(codes.get() for _ in processes)
        for process in processes:
            process.join()
        assert found[0] == 0 and set(found) <= {0, 3}
        assert digests(job.output_dir) == expected
        shutil.rmtree(job.output_dir)
