"""The first pass over an input, and its shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import UsageError
from arctic_trt.runtime.jobs.input_file import Shard, parse_shard, read_lines, scan_input


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_bytes(end.join([*lines, ""]).encode())
    return path


def named(name: str | None) -> str:
    return json.dumps({"custom_id": name} if name is not None else {"prompt": "x"})


@pytest.mark.parametrize("text", ["3", "4/4", "-1/4", "0/0", "a/b", "1/4/2", "1.0/4", "²/4"])
def test_a_shard_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--shard .* is not valid, expected I/N with 0 <= I < N"):
        parse_shard(text)


def test_shards() -> None:
    assert parse_shard(None) == Shard(0, 1) and parse_shard("3/4") == Shard(3, 4) and str(Shard(3, 4)) == "3/4"


@given(st.lists(st.sampled_from(["a", "b", "c", None, "line-2", ""]), max_size=12), st.integers(1, 4))
def test_duplicates_and_shards(tmp_path_factory: pytest.TempPathFactory, names: list[str | None], count: int) -> None:
    # an empty name stands for a blank line
    path = write(tmp_path_factory.mktemp("in") / "in.jsonl", *("" if name == "" else named(name) for name in names))
    seen: dict[str, int] = {}
    expected = {}
    for index, name in enumerate(names):
        if name != "":
            first = seen.setdefault(name or f"line-{index + 1}", index)
            if first != index:
                expected[index] = first
    scans = [scan_input(path, Shard(index, count)) for index in range(count)]
    assert all(scan.duplicates == expected and scan.mark == scans[0].mark for scan in scans)
    assert scans[0].mark.num_lines == len(names)
    parts = [list(read_lines(path, Shard(index, count), len(names))) for index in range(count)]
    assert [scan.num_mine for scan in scans] == [len(part) for part in parts]
    assert sorted(index for part in parts for index, _ in part) == [index for index, name in enumerate(names) if name != ""]


def test_lines_that_are_no_json_have_names_too(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl", "nonsense", "[1]", named("line-1"), '{"custom_id": "\\ud800"}', '{"custom_id": "\\ud800"}'
    )
    assert scan_input(path, Shard()).duplicates == {2: 0, 4: 3}


def test_an_input_may_grow_and_not_otherwise_change(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", named("a"), named("b"))
    known = scan_input(path, Shard()).mark
    assert scan_input(path, Shard(), known).grown_from_known
    for lines, grown in [(["a", "b", "c"], True), (["a", "c"], False), (["a"], False), ([], False), (["b", "a"], False)]:
        assert scan_input(write(path, *map(named, lines)), Shard(), known).grown_from_known == grown
    for end in ("\r\n", "\n"):
        assert scan_input(write(path, named("a"), named("b"), end=end), Shard(), known).mark == known
    path.write_text(f"{named('a')}\n{named('b')}")
    assert scan_input(path, Shard(), known).mark == known, "the end of the last line may be missing"
    path.write_text(f"{named('a')}\n{named('b')} and more\n")
    assert not scan_input(path, Shard(), known).grown_from_known


def test_lines_that_came_after_the_first_pass_are_left_for_the_next_run(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", "1", "2")
    lines = read_lines(path, Shard(), 2)
    write(path, "1", "2", "3")
    assert list(lines) == [(0, b"1"), (1, b"2")]


def test_an_input_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--input_file .*absent.jsonl cannot be read: No such file or directory"):
        scan_input(tmp_path / "absent.jsonl", Shard())
    with pytest.raises(UsageError, match=r"--input_file .* cannot be read: Is a directory"):
        scan_input(tmp_path, Shard())
    (tmp_path / "empty.jsonl").touch()
    assert scan_input(tmp_path / "empty.jsonl", Shard()).mark.num_lines == 0
