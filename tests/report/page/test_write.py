"""The report on disk: whole or as before, nobody else's files touched, and no other writer disturbed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from arctic_trt.checkpoint import output_dir
from arctic_trt.checkpoint.output_dir import CARD_MARK, MARKER, OutputDir, is_own, lock_directory
from arctic_trt.errors import RefusedError
from arctic_trt.report.page.write import save_record, update_report
from tests.support.jobs import lasting, tree
from tests.support.records import eval_record, quantize_record, small_config, verify_record, write_records

CONFIG = small_config()
RECORDS = {"quantize": quantize_record(CONFIG), "verify": verify_record(CONFIG), "evaluate": eval_record(CONFIG)}
DRAWN = {"activation_scales.png", "hidden_error.png", "report.html", "sensitivity.png", "sqnr.png", "tokens_per_expert.png"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_records(tmp_path / "ckpt", CONFIG, **RECORDS)


def test_everything_is_written_and_ours(checkpoint: Path) -> None:
    assert update_report(checkpoint) == checkpoint / "report" / "report.html"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {"config.json", "README.md", *(f"report/{n}.json" for n in ("quantize", "verify", "eval"))} | {
        f"report/{name}" for name in DRAWN
    }
    assert all(is_own(checkpoint, name) and is_own(checkpoint, f"{name}.partial") for name in files)
    for name in DRAWN - {"report.html"}:
        assert (checkpoint / "report" / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_the_same_numbers_give_the_same_files(tmp_path: Path) -> None:
    slower = {**RECORDS["quantize"], "seconds": 1.0}
    trees = []
    for place, made in (("a", RECORDS["quantize"]), ("b", slower)):
        directory = write_records(tmp_path / place / "ckpt", CONFIG, quantize=made)
        update_report(directory)
        trees.append(lasting(directory))
    assert trees[0] == trees[1] and "README.md" in trees[0] and "report/tokens_per_expert.png" in trees[0]


@pytest.mark.usefixtures("undrawn")
def test_a_second_update_replaces_the_first_and_what_is_no_longer_known(checkpoint: Path) -> None:
    update_report(checkpoint)
    (checkpoint / "report" / "eval.json").unlink()
    (checkpoint / "report" / "mine.png").write_text("mine")
    update_report(checkpoint)
    left = {path.name for path in (checkpoint / "report").iterdir()}
    assert left == {"quantize.json", "verify.json", "mine.png", *DRAWN} - {"hidden_error.png", "sensitivity.png"}
    assert "6.4137" not in (checkpoint / "report" / "report.html").read_text()
    assert "6.4137" not in (checkpoint / "README.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_an_update_that_fails_leaves_the_page_of_before(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update_report(checkpoint)
    page = (checkpoint / "report" / "report.html").read_bytes()
    save_record(checkpoint, "eval", {**RECORDS["evaluate"], "perplexity": 9.75})
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "report.html":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(output_dir.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        update_report(checkpoint)
    assert (checkpoint / "report" / "report.html").read_bytes() == page
    monkeypatch.undo()
    os.close(lock_directory(checkpoint))


@pytest.mark.usefixtures("undrawn")
def test_a_readme_that_is_not_ours_stays(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    update_report(checkpoint)
    assert (checkpoint / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"
    assert "README.md is not a model card of ours and stays as it is" in caplog.text


@pytest.mark.usefixtures("undrawn")
def test_a_card_that_somebody_took_over_stays(checkpoint: Path) -> None:
    update_report(checkpoint)
    taken = (checkpoint / "README.md").read_text().replace(f"{CARD_MARK}\n", "")
    (checkpoint / "README.md").write_text(taken)
    update_report(checkpoint)
    assert (checkpoint / "README.md").read_text() == taken and not is_own(checkpoint, "README.md")


@pytest.mark.usefixtures("undrawn")
def test_overwriting_a_checkpoint_removes_its_report(checkpoint: Path) -> None:
    update_report(checkpoint)
    with OutputDir(checkpoint, kind="checkpoint", overwrite=True):
        assert list(tree(checkpoint) or {}) == [MARKER]


@pytest.mark.usefixtures("undrawn")
def test_what_another_process_writes_and_what_is_unfinished_is_left_alone(checkpoint: Path) -> None:
    lock = lock_directory(checkpoint)
    before = tree(checkpoint)
    for act in (lambda: update_report(checkpoint), lambda: save_record(checkpoint, "verify", {})):
        with pytest.raises(RefusedError, match="Another process is writing"):
            act()
    os.close(lock)
    assert tree(checkpoint) == before
    (checkpoint / MARKER).write_text("{}")
    with pytest.raises(RefusedError, match="is unfinished"):
        update_report(checkpoint)


@pytest.mark.usefixtures("undrawn")
def test_a_record_is_kept_as_it_is(tmp_path: Path) -> None:
    save_record(tmp_path, "verify", RECORDS["verify"])
    assert json.loads((tmp_path / "report" / "verify.json").read_text()) == RECORDS["verify"]


@pytest.mark.usefixtures("undrawn")
def test_a_name_that_is_no_text_is_spelled_out(tmp_path: Path) -> None:
    directory = write_records(Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xffd")), CONFIG, quantize=RECORDS["quantize"])
    assert "<h1>b\\udcffd</h1>" in update_report(directory).read_text(encoding="utf-8")
    assert "# b\\udcffd\n" in (directory / "README.md").read_text(encoding="utf-8")
