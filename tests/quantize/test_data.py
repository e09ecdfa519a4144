"""Calibration samples: which lines are used, what is refused, how samples are grouped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.quantize import data
from arctic_trt.quantize.data import find_dataset, plan_batches, read_samples
from tests.support.tokenizers import write_tokenizer


def read(
    path: Path, tokenizer_dir: Path | None = None, *, limit: int = 99, max_tokens: int = 99, vocab: int = 100
) -> list[list[int]]:
    tokens = tokenizer_dir or path.parent
    return read_samples(path, limit=limit, max_tokens=max_tokens, vocab_size=vocab, tokenizer_dir=tokens)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calib.jsonl"


def test_ids_are_used_as_given_in_file_order(path: Path) -> None:
    path.write_text('{"input_ids": [1, 99, 0]}\n\n   \n{"input_ids": [7]}\n')
    assert read(path) == [[1, 99, 0], [7]]


def test_the_first_lines_are_used_and_cut(path: Path) -> None:
    """Empty lines are no lines."""
    path.write_text("\n" + "".join(json.dumps({"input_ids": list(range(n))}) + "\n" for n in (3, 6, 2)) + "not read any more\n")
    assert read(path, limit=2, max_tokens=4) == [[0, 1, 2], [0, 1, 2, 3]]


def test_text_and_messages_are_tokenized(path: Path) -> None:
    write_tokenizer(path.parent)
    chat = {"messages": [{"role": "user", "content": "the future"}]}
    path.write_text(json.dumps({"text": "the future"}) + "\n" + json.dumps(chat) + "\n")
    assert read(path) == [[1, 5, 6], [3, 7, 5, 6, 4]]


def test_ids_need_no_tokenizer_and_text_does(path: Path) -> None:
    path.write_text('{"input_ids": [1]}\n{"text": "the"}\n')
    assert read(path, limit=1) == [[1]]
    with pytest.raises(UsageError, match=r"tokenizer\.json does not exist"):
        read(path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"input_ids": [1]', "line 2 is not valid JSON"),
        ("[1, 2]", "line 2 holds a list, expected"),
        ('"text"', "line 2 holds a str, expected"),
        ("{}", "line 2 has none of the keys text, messages, input_ids"),
        ('{"txt": "a"}', "line 2 has none of the keys"),
        ('{"input_ids": "1 2"}', "line 2: input_ids must be a list of integers"),
        ('{"input_ids": [1.0]}', "line 2: input_ids must be a list of integers"),
        ('{"input_ids": [true]}', "line 2: input_ids must be a list of integers"),
        ('{"input_ids": [[1]]}', "line 2: input_ids must be a list of integers"),
        ('{"input_ids": []}', "line 2 has no tokens"),
        ('{"input_ids": [100]}', "line 2 has token ids outside 0..99"),
        ('{"input_ids": [-1]}', "line 2 has token ids outside 0..99"),
        ('{"text": 5}', "line 2: text must be a string, found int"),
        ('{"text": null}', "line 2: text must be a string, found NoneType"),
        ('{"messages": {"role": "user"}}', "line 2: messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages must be a list of objects"),
        ('{"messages": [{"role": "user", "content": 1}]}', "line 2: messages must be a list of objects"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(path: Path, line: str, complaint: str) -> None:
    path.write_text('{"input_ids": [1]}\n' + line + "\n")
    with pytest.raises(UsageError) as caught:
        read(path)
    assert f"{path} {complaint}" in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(UsageError, match=r"calib\.jsonl holds no samples"):
        read(path)


def test_a_file_that_is_no_text_is_refused(path: Path) -> None:
    path.write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(UsageError, match=r"calib\.jsonl is not UTF-8 text"):
        read(path)


def test_datasets_are_found_by_name_or_path(path: Path) -> None:
    path.touch()
    assert find_dataset(str(path)) == path
    for name in ("default", "heldout"):
        assert find_dataset(name).name == f"{name}.jsonl"
    for missing in ("no-such-name", str(path.parent)):
        with pytest.raises(UsageError, match=f"--calib_dataset {missing} is neither a file nor one of default, heldout"):
            find_dataset(missing)


def test_a_text_file_holds_a_sample_a_line(path: Path) -> None:
    write_tokenizer(path.parent)
    text = path.with_suffix(".txt")
    text.write_bytes(b'the future\r\n\n   \nthe\n{"text": "the"}\n')
    plain, short, braces = read(text)
    assert (plain, short) == ([1, 5, 6], [1, 5]) and len(braces) > 1, "braces have no meaning there"
    assert read(text, limit=1, max_tokens=2) == [[1, 5]]


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", r"\.txt holds no samples"), (b"ok\n\xff\xfe\n", r"\.txt is not UTF-8 text \(.* at byte 3\)")]
)
def test_a_damaged_text_file_is_refused(path: Path, content: bytes, complaint: str) -> None:
    write_tokenizer(path.parent)
    path.with_suffix(".txt").write_bytes(content)
    with pytest.raises(UsageError, match=complaint):
        read(path.with_suffix(".txt"))


class TestNamedSets:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "arctic-trt"

    def library(self, monkeypatch: pytest.MonkeyPatch, load) -> None:  # type: ignore[no-untyped-def]
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))

    def test_without_the_extra_it_is_named(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(RefusedError) as caught:
            find_dataset("cnn_dailymail")
        assert str(caught.value) == (
            "--calib_dataset cnn_dailymail needs the package datasets, which is not installed. "
            "pip install 'arctic-trt[datasets]'. Give a .jsonl file of your own, or --calib_dataset default."
        )
        assert not cache.exists()

    def test_offline_it_says_so_in_one_sentence(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        def offline(*_: object, **__: object) -> None:
            raise ConnectionError("no\n  route")

        self.library(monkeypatch, offline)
        with pytest.raises(RefusedError, match=r"cannot be downloaded \(ConnectionError: no route\)\. Give a \.jsonl file"):
            find_dataset("wikitext")
        assert not cache.exists()

    def test_a_set_is_downloaded_once(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        asked: list[tuple[object, ...]] = []

        def load(*words: object, split: str) -> list[dict[str, str]]:
            asked.append((*words, split))
            return [{"article": "the future"}, {"article": "the"}]

        self.library(monkeypatch, load)
        found = {find_dataset("cnn_dailymail") for _ in range(3)}
        assert asked == [("abisee/cnn_dailymail", "3.0.0", f"train[:{data.NAMED_SAMPLES}]")]
        assert found == {cache / "cnn_dailymail.jsonl"}
        assert [path.name for path in cache.iterdir()] == ["cnn_dailymail.jsonl"]
        write_tokenizer(cache)
        assert read(cache / "cnn_dailymail.jsonl") == [[1, 5, 6], [1, 5]]


def test_the_default_set_comes_with_the_package_and_is_well_formed() -> None:
    lines = [json.loads(line) for line in find_dataset("default").read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= 128, "the default --calib_size must find enough samples"
    assert all(set(line) <= {"text", "messages"} for line in lines)
    held_back = [json.loads(line) for line in find_dataset("heldout").read_text(encoding="utf-8").splitlines()]
    assert held_back and not any(line in lines for line in held_back)


def test_neighbours_of_equal_length_share_a_batch() -> None:
    samples = [[1, 1], [2, 2], [3, 3], [4], [5, 5], [6, 6]]
    assert [batch.tolist() for batch in plan_batches(samples, 2)] == [[[1, 1], [2, 2]], [[3, 3]], [[4]], [[5, 5], [6, 6]]]
    assert [len(batch) for batch in plan_batches(samples, 1)] == [1] * 6


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=20), st.integers(1, 5))
def test_batches_hold_every_sample_once_in_order_and_unpadded(samples: list[list[int]], size: int) -> None:
    batches = plan_batches(samples, size)
    assert [row for batch in batches for row in batch.tolist()] == samples
    assert all(1 <= len(batch) <= size for batch in batches)
