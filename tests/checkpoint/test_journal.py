"""A layer is either in the journal, with the state that follows it, or has not happened."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from arctic_trt.checkpoint.journal import Journal
from arctic_trt.checkpoint.output_dir import JOURNAL, is_own
from arctic_trt.errors import ArcticTrtError


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path)
    journal.open()
    return journal


def commit(journal: Journal, layer: int) -> None:
    journal.state(layer).write_bytes(b"state")
    journal.commit(layer, {"layer": layer})


def test_layers_are_recorded_in_order(journal: Journal) -> None:
    assert journal.records() == []
    for layer in range(12):
        commit(journal, layer)
        assert [record["layer"] for record in journal.records()] == list(range(layer + 1))
    assert Journal(journal.directory.parent).records() == journal.records()


def test_only_the_last_state_is_kept(journal: Journal) -> None:
    for layer in range(3):
        commit(journal, layer)
        assert [path for path in journal.directory.iterdir() if path.suffix == ".state"] == [journal.state(layer)]


def test_a_state_before_its_record_does_not_count(journal: Journal) -> None:
    commit(journal, 0)
    journal.state(1).write_bytes(b"half a sta")
    assert len(journal.records()) == 1 and journal.state(0).exists()


def test_records_after_a_gap_do_not_count(journal: Journal) -> None:
    for layer in range(4):
        commit(journal, layer)
    (journal.directory / "layer_0001.json").unlink()
    assert [record["layer"] for record in journal.records()] == [0]


def test_opening_again_keeps_what_is_there(journal: Journal) -> None:
    commit(journal, 0)
    Journal(journal.directory.parent).open()
    assert len(journal.records()) == 1


def test_without_a_journal_there_are_no_records(tmp_path: Path) -> None:
    assert Journal(tmp_path / "nowhere").records() == []


def test_every_file_of_a_journal_is_our_own(journal: Journal, tmp_path: Path) -> None:
    commit(journal, 34)
    names = [path.name for path in journal.directory.iterdir()]
    assert len(names) == 2 and all(is_own(tmp_path, f"{JOURNAL}/{name}") for name in (*names, "rows-123-7f00ab.partial"))
    assert not is_own(tmp_path, f"{JOURNAL}/my/notes.txt") and not is_own(tmp_path, f"sub/{JOURNAL}/layer_0000.json")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_commits_nothing(journal: Journal, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    commit(journal, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(ArcticTrtError, match=r"layer_0001\.json cannot be written: No space left on device\. Make room"):
            journal.commit(1, {"layer": 1})
    assert len(journal.records()) == 1 and journal.state(0).exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArcticTrtError, match="journal cannot be written: Not a directory"):
        Journal(tmp_path / "file").open()
