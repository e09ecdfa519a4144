"""The power fails: whatever of the un-synced writes survives, the same command gives the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Finished
from tests.faults.power import Disk, Image, write_image
from tests.faults.test_faults import DONE
from tests.support.jobs import Job, digests, read_report

MOMENTS = 45
ALWAYS = ("fdatasync", "fsync", "replace", "unlink")


@pytest.fixture
def images(layered_job: Job, arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Image]]:
    """What a run could have left behind at many moments, each with nothing un-synced and with chance parts of it."""
    job, draw, found = layered_job, random.Random(8), []
    job.flags = {"--tp_size": 2, "--pp_size": 2}
    job.output_dir.mkdir()

    def on_change(number: int, call: str) -> None:
        if call in ALWAYS or draw.random() < 0.05:
            found.extend([disk.fail(None), disk.fail(draw)])

    with monkeypatch.context() as patch:
        disk = Disk(job.output_dir, patch, on_change)
        assert arctic_trt(*job.argv("-q")) == DONE
    found.extend([disk.fail(None), disk.fail(draw)])
    yield found
    disk.close()


def test_whatever_survives_the_same_command_gives_the_same_bytes(
    images: list[Image], layered_job: Job, arctic_trt: Callable[..., Finished], tmp_path: Path
) -> None:
    job, expected, resumed = layered_job, digests(layered_job.output_dir), set()
    assert len(images) > 4 * MOMENTS
    for number in range(0, len(images), len(images) // (2 * MOMENTS)):
        job.output_dir = tmp_path / f"after-{number}"
        write_image(job.output_dir, images[number])
        assert arctic_trt(*job.argv("-q")) == DONE, f"{number} of {len(images)}: {sorted(images[number])}"
        assert digests(job.output_dir) == expected, f"{number} of {len(images)}: {sorted(images[number])}"
        resumed.add(read_report(job.output_dir)["resumed_layers"])
    assert resumed == set(range(7)), "every layer was once the last that had been committed"


def test_this_test_would_notice(images: list[Image], layered_job: Job) -> None:
    """Un-synced writes are really lost: the rank files are whole only in the later images."""
    whole = {name: (layered_job.output_dir / name).read_bytes() for name in ("rank0.safetensors", "rank3.safetensors")}
    states = [{name: image.get(name) == data for name, data in whole.items()} for image in images[::2]]
    assert not any(states[0].values()) and all(states[-1].values())
    partial = [image.get("rank0.safetensors.partial") for image in images[::2]]
    assert any(data and data != whole["rank0.safetensors"] for data in partial)
