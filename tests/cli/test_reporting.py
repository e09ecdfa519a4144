"""The report as the commands leave it: after quantize, after verify, and where the disk does not want it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from arctic_trt.cli import reporting
from arctic_trt.report.page import canvas
from arctic_trt.report.page.records import read_records
from tests.conftest import Finished
from tests.support.jobs import Job, lasting, read_report, tree

Run = Callable[..., Finished]
PAGE = Path("report/report.html")


@pytest.fixture
def reported(job: Job) -> Job:
    job.report = True
    return job


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "_render", lambda *_: b"\x89PNG")


def test_quantize_leaves_a_report_and_a_card(reported: Job, arctic_trt: Run) -> None:
    done = arctic_trt(*reported.argv())
    out = reported.output_dir
    assert done.code == 0 and f"report: {out / PAGE}" in done.err
    assert {"README.md", "report/verify.json", "report/tokens_per_expert.png", "report/activation_scales.png"} <= (
        tree(out) or {}
    ).keys()
    records = read_records(out)
    assert records.problems == () and records.verification and records.verification.passed and records.verification.share == 0
    assert (
        records.quantization and [list(layer) for layer in records.quantization.tokens] == read_report(out)["tokens_per_expert"]
    )
    page = (out / PAGE).read_text()
    assert (
        read_report(out)["fingerprint"]["calibration_ids"] in page
        and f"arctic-trt eval out --against {reported.model_dir}" in page
    )


@pytest.mark.usefixtures("undrawn")
def test_the_same_command_again_keeps_the_report_of_a_deeper_verification(reported: Job, arctic_trt: Run) -> None:
    assert arctic_trt(*reported.argv()).code == 0
    assert arctic_trt("verify", reported.output_dir, "--against", reported.model_dir).code == 0
    before = tree(reported.output_dir)
    assert arctic_trt(*reported.argv()).code == 0
    assert tree(reported.output_dir) == before
    (reported.output_dir / PAGE).unlink()
    assert arctic_trt(*reported.argv()).code == 0 and (reported.output_dir / PAGE).exists(), "a report that is missing is made"


@pytest.mark.usefixtures("undrawn")
def test_overwriting_replaces_the_report(reported: Job, arctic_trt: Run) -> None:
    assert arctic_trt(*reported.argv()).code == 0
    first = lasting(reported.output_dir)
    assert arctic_trt(*reported.argv("--overwrite", "--kv_cache_dtype", "none")).code == 0
    assert lasting(reported.output_dir)["README.md"] != first["README.md"]
    assert arctic_trt(*reported.argv("--overwrite")).code == 0
    assert lasting(reported.output_dir) == first
    (reported.output_dir / "README.md").write_text("# Mine\n")
    done = arctic_trt(*reported.argv("--overwrite"))
    assert done.code == 3 and "already holds README.md, which is not part of a checkpoint" in done.err
    assert (reported.output_dir / "README.md").read_text() == "# Mine\n"


@pytest.mark.usefixtures("undrawn")
def test_without_verification_there_is_a_report_all_the_same(reported: Job, arctic_trt: Run) -> None:
    assert arctic_trt(*reported.argv("--no_verify", "-q")) == Finished(0, "", "")
    assert (reported.output_dir / PAGE).exists() and not (reported.output_dir / "report" / "verify.json").exists()


def test_no_report_writes_none(job: Job, arctic_trt: Run) -> None:
    assert arctic_trt(*job.argv()).code == 0
    before = tree(job.output_dir)
    assert arctic_trt("verify", job.output_dir, "--no_report").code == 0
    assert tree(job.output_dir) == before


@pytest.mark.usefixtures("undrawn")
def test_verify_records_what_it_found_and_how_deep_it_looked(job: Job, arctic_trt: Run) -> None:
    assert arctic_trt(*job.argv()).code == 0
    done = arctic_trt("verify", job.output_dir, "--against", job.model_dir, "--sample", "0.5", "--json")
    kept = json.loads((job.output_dir / "report" / "verify.json").read_text())
    assert (kept["against"], kept["share"]) == (str(job.model_dir), 0.5)
    assert {key: kept[key] for key in json.loads(done.out)} == json.loads(done.out)
    assert "byte by byte against model" in (job.output_dir / "README.md").read_text()
    assert arctic_trt("verify", job.output_dir).code == 0, "the report is no damage"


@pytest.mark.usefixtures("undrawn")
def test_what_is_wrong_is_on_the_page_and_still_fails(job: Job, arctic_trt: Run) -> None:
    assert arctic_trt(*job.argv()).code == 0
    (job.output_dir / "rank1.safetensors").unlink()
    assert arctic_trt("verify", job.output_dir).code == 4
    page = (job.output_dir / PAGE).read_text()
    assert "failed, 1 error<" in page and "rank1.safetensors" in page


@pytest.mark.usefixtures("undrawn")
def test_a_disk_that_may_not_be_written_is_warned_about(job: Job, arctic_trt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arctic_trt(*job.argv()).code == 0
    before = tree(job.output_dir)
    opened = Path.open

    def read_only(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if "w" in mode and job.output_dir in path.parents:
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, mode, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", read_only)
    done = arctic_trt("verify", job.output_dir)
    assert done.code == 0 and "Verified" in done.out
    assert f"WARNING: The report was not written: {job.output_dir}/report/verify.json.partial: Read-only file system" in done.err
    assert tree(job.output_dir) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else_is_warned_about(job: Job, arctic_trt: Run) -> None:
    assert arctic_trt(*job.argv()).code == 0
    for path in (job.output_dir / "report", job.output_dir):
        path.chmod(0o555)
    try:
        done = arctic_trt("verify", job.output_dir)
    finally:
        for path in (job.output_dir, job.output_dir / "report"):
            path.chmod(0o755)
    assert done.code == 0 and "The report was not written" in done.err and "Permission denied" in done.err


def test_only_checkpoints_get_a_report(job: Job, arctic_trt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "write_report", lambda *_, **__: pytest.fail("nothing is to be written"))
    monkeypatch.setattr("arctic_trt.cli.verify.write_report", lambda *_, **__: pytest.fail("nothing is to be written"))
    assert arctic_trt(*job.argv()).code == 0
    assert (
        arctic_trt("build", "--checkpoint_dir", job.output_dir, "--output_dir", tmp_path / "engine", "--backend", "torch").code
        == 0
    )
    assert arctic_trt("verify", tmp_path / "engine").code == 0
    assert arctic_trt("verify", job.model_dir).code == 4, "the original is nobody's checkpoint"
    assert arctic_trt("verify", tmp_path).code == 4
