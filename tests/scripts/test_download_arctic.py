"""``scripts/download_arctic`` as a process, against a hub on this machine."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from arctic_trt.errors import RefusedError
from tests.support.fake_hub import COMMIT, REPO, FakeHub, shard

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "download_arctic"
RECORD = ".arctic-trt-download.json"
FIRST, SECOND, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
WANTED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    INDEX,
    FIRST,
    SECOND,
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "arctic"


def download(hub: FakeHub, target: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **hub.environment, "HF_HOME": str(target.parent / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(target), "--attempts", "1", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("download_arctic: error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last


def names(target: Path) -> set[str]:
    return {path.name for path in target.iterdir() if path.is_file() and not path.name.startswith(".")}


def test_it_takes_what_the_index_names_and_nothing_else(hub: FakeHub, target: Path) -> None:
    done = download(hub, target, "--sha256")
    assert done.returncode == 0, done.stderr
    assert names(target) == WANTED
    assert all((target / name).read_bytes() == hub.files[name] for name in WANTED)
    assert {name for name, _ in hub.fetched} == WANTED
    assert done.stderr.splitlines()[-1].endswith("is complete, every byte verified.")


def test_a_branch_is_resolved_once_and_the_record_is_what_counts_afterwards(hub: FakeHub, target: Path) -> None:
    assert download(hub, target).returncode == 0
    record = json.loads((target / RECORD).read_text())
    assert (record["repo"], record["revision"], record["commit"]) == (REPO, "main", COMMIT)
    assert record["files"][FIRST]["size"] == len(hub.files[FIRST])
    (target / FIRST).unlink()
    hub.fetched.clear()
    assert download(hub, target).returncode == 0
    assert download(hub, target, "--revision", COMMIT).returncode == 0
    assert (hub.listings, hub.fetched) == (["main"], [(FIRST, 0)])


def test_a_finished_download_is_left_alone(hub: FakeHub, target: Path) -> None:
    assert download(hub, target).returncode == 0
    hub.fetched.clear()
    assert download(hub, target).returncode == 0
    assert hub.fetched == []


def test_a_transfer_that_breaks_off_is_continued_where_it_ended(hub: FakeHub, target: Path) -> None:
    hub.files[SECOND] = shard(12 << 20)
    hub.files[INDEX] = hub.files[INDEX].replace(b"8000", b"%d" % (3000 + (12 << 20)))
    hub.cut_once[SECOND] = 11 << 20
    done = download(hub, target, "--sha256", "--attempts", "2")
    assert done.returncode == 0, done.stderr
    begins = [begin for name, begin in hub.fetched if name == SECOND]
    assert begins[0] == 0
    assert begins[-1] > 1 << 20


def test_an_interrupted_download_is_resumed_by_the_next_process(hub: FakeHub, target: Path) -> None:
    hub.broken.add(SECOND)
    refused(download(hub, target), 1, SECOND, "The same command resumes.")
    assert (target / FIRST).is_file()
    hub.broken.clear()
    hub.fetched.clear()
    assert download(hub, target, "--sha256").returncode == 0
    assert (FIRST, 0) not in hub.fetched


@pytest.mark.parametrize("spoil", [lambda data: data[:100], lambda data: data + b"more", lambda data: b""])
def test_a_file_of_the_wrong_size_is_fetched_again(hub: FakeHub, target: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    assert download(hub, target).returncode == 0
    (target / FIRST).write_bytes(spoil(hub.files[FIRST]))
    hub.fetched.clear()
    assert download(hub, target, "--sha256").returncode == 0
    assert hub.fetched == [(FIRST, 0)]


@pytest.mark.parametrize("spoil", ["truncate", "remove"])
def test_verify_alone_finds_it_without_network(hub: FakeHub, target: Path, spoil: str) -> None:
    assert download(hub, target).returncode == 0
    hub.listings.clear(), hub.fetched.clear()
    if spoil == "truncate":
        os.truncate(target / SECOND, 50)
        refused(download(hub, target, "--verify"), 4, SECOND, "50 bytes")
    else:
        (target / SECOND).unlink()
        refused(download(hub, target, "--verify"), 4, SECOND, "is missing")
    assert not hub.listings + hub.fetched


def test_changed_bytes_show_in_the_digest(hub: FakeHub, target: Path) -> None:
    assert download(hub, target).returncode == 0
    data = bytearray(hub.files[FIRST])
    data[-1] ^= 1
    (target / FIRST).write_bytes(data)
    assert download(hub, target, "--verify").returncode == 0
    refused(download(hub, target, "--verify", "--sha256"), 4, FIRST, "digest")
    (target / "config.json").write_bytes(b'{"model_type": "arcticX'[:24].ljust(24, b"}"))
    refused(download(hub, target, "--verify"), 4, "config.json", "digest")


def test_a_size_that_the_hub_did_not_announce_is_refused(hub: FakeHub, target: Path) -> None:
    hub.stated_sizes[FIRST] = len(hub.files[FIRST]) + 1
    refused(download(hub, target), 1, FIRST)


def test_shards_that_do_not_add_up_to_the_index_are_refused(hub: FakeHub, target: Path) -> None:
    hub.files[FIRST] = shard(2999)
    refused(download(hub, target), 4, "7999", "8000")


def test_a_shard_that_the_repository_lacks_is_noticed_before_downloading(hub: FakeHub, target: Path) -> None:
    del hub.files[SECOND]
    refused(download(hub, target), 1, SECOND)
    assert [name for name, _ in hub.fetched] == [INDEX]


def test_an_index_may_not_name_files_outside_of_the_directory(hub: FakeHub, target: Path) -> None:
    hub.files["../evil.safetensors"] = b""
    hub.files[INDEX] = json.dumps({"weight_map": {"x": "../evil.safetensors"}}).encode()
    refused(download(hub, target), 1, "evil", "outside")


def test_a_full_disk_shows_before_the_first_shard(hub: FakeHub, target: Path) -> None:
    hub.stated_sizes[FIRST] = 10**18
    refused(download(hub, target), 3, "needs 1000000.01 TB", "free")
    assert [name for name, _ in hub.fetched] == [INDEX]


@pytest.mark.parametrize(("free_gb", "fits"), [(17, False), (18, True)])
def test_space_counts_what_is_missing_the_margin_and_what_was_begun(
    target: Path, monkeypatch: pytest.MonkeyPatch, free_gb: int, fits: bool
) -> None:
    script = runpy.run_path(str(SCRIPT))
    file = script["RemoteFile"](10**10, None, None)
    download = script["Download"](REPO, "main", COMMIT, {FIRST: file, SECOND: file})
    begun = target / ".cache" / "huggingface" / "download"
    begun.mkdir(parents=True)
    with (begun / "part.incomplete").open("wb") as part:
        part.truncate(2 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free_gb * 10**9))
    if fits:
        script["check_space"](download, [FIRST], target)
    else:
        with pytest.raises(RefusedError, match=r"needs 18\.00 GB, margin included, but its disk has 17\.00 GB free"):
            script["check_space"](download, [FIRST], target)


def test_dry_run_downloads_the_index_alone_and_removes_nothing(hub: FakeHub, target: Path) -> None:
    target.mkdir()
    (target / FIRST).write_bytes(b"something else")
    done = download(hub, target, "--dry_run")
    assert done.returncode == 0
    assert "7 to download" in done.stderr
    assert [name for name, _ in hub.fetched] == [INDEX]
    assert (target / FIRST).read_bytes() == b"something else"


@pytest.mark.parametrize("flags", [("--revision", "v2"), ("--repo", "Snowflake/snowflake-arctic-base")])
def test_another_revision_or_model_does_not_mix_with_what_is_there(hub: FakeHub, target: Path, flags: tuple[str, str]) -> None:
    assert download(hub, target).returncode == 0
    refused(download(hub, target, *flags), 3, flags[1], COMMIT)


def test_an_unknown_revision_is_one_sentence(hub: FakeHub, target: Path) -> None:
    refused(download(hub, target, "--revision", "v2"), 1, "v2")
    assert not target.exists()


def test_a_damaged_record_is_one_sentence(hub: FakeHub, target: Path) -> None:
    target.mkdir()
    (target / RECORD).write_text("{}")
    refused(download(hub, target), 1, RECORD, "damaged")


def test_verify_needs_a_record(hub: FakeHub, target: Path) -> None:
    refused(download(hub, target, "--verify"), 2, RECORD)


def test_wrong_usage_is_one_sentence(hub: FakeHub, target: Path) -> None:
    refused(download(hub, target, "--workers", "0"), 2, "workers")
