"""The power fails: whatever of the un-synced writes survives, the same command gives the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Finished
from tests.faults.conftest import LAYERS
from tests.faults.power import Disk, Image, write_image
from tests.faults.test_faults import DONE
from tests.support.jobs import Job, digests, read_report

ALWAYS = ("fdatasync", "fsync", "replace", "unlink")


@dataclass(frozen=True)
class Loss:
    """What a power loss at some moment could leave: only what was synced, or chance parts of the rest, too."""

    least: Image
    mixed: Image


@pytest.fixture
def losses(layered_job: Job, arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Loss]]:
    """Power losses before every sync, renaming and removal of a run, before some of its writes, and after it."""
    job, draw = layered_job, random.Random(8)
    found: list[Loss] = []
    job.flags = {"--tp_size": 2, "--pp_size": 2}
    job.output_dir.mkdir()

    def on_change(number: int, call: str) -> None:
        if call in ALWAYS or draw.random() < 0.05:
            found.append(Loss(disk.fail(None), disk.fail(draw)))

    with monkeypatch.context() as patch:
        disk = Disk(job.output_dir, patch, on_change)
        assert arctic_trt(*job.argv("-q")) == DONE
    found.append(Loss(disk.fail(None), disk.fail(draw)))
    yield found
    disk.close()


def test_whatever_survives_the_same_command_gives_the_same_bytes(
    losses: list[Loss], layered_job: Job, arctic_trt: Callable[..., Finished], tmp_path: Path
) -> None:
    job, expected, resumed = layered_job, digests(layered_job.output_dir), set()
    images = [loss.mixed for loss in losses] + [loss.least for loss in losses[::3]]
    assert len(images) > 100
    for number, image in enumerate(images):
        job.output_dir = tmp_path / f"after-{number}"
        write_image(job.output_dir, image)
        assert arctic_trt(*job.argv("-q")) == DONE, f"{number} of {len(images)}: {sorted(image)}"
        assert digests(job.output_dir) == expected, f"{number} of {len(images)}: {sorted(image)}"
        resumed.add(read_report(job.output_dir)["resumed_layers"])
    assert resumed == set(range(LAYERS + 1)), "every layer was once the last that had been committed"


def test_this_test_would_notice(losses: list[Loss], layered_job: Job) -> None:
    """Un-synced writes are really lost: the rank files are whole only in the later images."""
    whole = {name: (layered_job.output_dir / name).read_bytes() for name in ("rank0.safetensors", "rank3.safetensors")}
    states = [{name: loss.least.get(name) == data for name, data in whole.items()} for loss in losses]
    assert not any(states[0].values()) and all(states[-1].values())
    partial = [loss.least.get("rank0.safetensors.partial") for loss in losses]
    assert any(data and data != whole["rank0.safetensors"] for data in partial)
    assert any(loss.least != loss.mixed for loss in losses)
