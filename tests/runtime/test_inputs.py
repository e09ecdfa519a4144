"""Prompts in every form, and a sentence with file and line for every malformed one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.inputs import Prompt, read_prompts, tokenize
from tests.support.small_tokenizer import write_tokenizer


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def ids_of(path: Path) -> list[tuple[int, ...] | None]:
    return [prompt.token_ids for prompt in read_prompts((), path)]


def test_texts_of_the_command_line() -> None:
    assert [(prompt.text, prompt.where) for prompt in read_prompts(("a", "b"), None)] == [
        ("a", "--input_text 0"),
        ("b", "--input_text 1"),
    ]


def test_txt_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", " first \n\nsecond é\r\n")
    assert [(prompt.text, prompt.where) for prompt in read_prompts((), path)] == [
        (" first ", f"{path} line 1"),
        ("second é", f"{path} line 3"),
    ]


def test_csv_has_token_ids_a_row(tmp_path: Path) -> None:
    assert ids_of(write(tmp_path / "p.csv", "1, 2,3\n\n40\n")) == [(1, 2, 3), (40,)]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16])
def test_npy_is_padded_on_the_right(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "p.npy", np.array([[1, 2, 3], [4, -1, -1]], dtype))
    assert ids_of(tmp_path / "p.npy") == [(1, 2, 3), (4,)]


def test_jsonl_takes_every_form(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    lines = [{"prompt": "a", "custom_id": 3}, {"text": "b"}, {"messages": messages}, {"input_ids": [5, 6]}]
    prompts = read_prompts((), write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines))))
    assert [prompt.text for prompt in prompts] == ["a", "b", None, None]
    assert prompts[2].messages == tuple(messages)
    assert prompts[3].token_ids == (5, 6)
    assert [prompt.shown for prompt in prompts] == ["a", "b", "hello", "2 token ids"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.csv", "1,2\n3,x\n", "p.csv line 2 is not a row of token ids"),
        ("p.csv", "\n\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.json", "{}", "ending '.json', expected one of .txt, .csv, .npy, .jsonl"),
        ("p.npy", "nonsense", "not a .npy file"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "p.jsonl line 2 is not valid JSON"),
        ("p.jsonl", "[1]", "line 1 holds a list"),
        ("p.jsonl", '{"question": "a"}', "line 1 has none of the keys"),
        ("p.jsonl", '{"prompt": "a", "input_ids": [1]}', "line 1 has prompt and input_ids, expected exactly one"),
        ("p.jsonl", '{"input_ids": [1, 2.5]}', "line 1: input_ids must be a list of integers"),
        ("p.jsonl", '{"input_ids": [true]}', "line 1: input_ids must be a list of integers"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "line 1: messages must be a list"),
        ("p.jsonl", '{"messages": []}', "line 1: messages must be a list"),
        ("p.jsonl", '{"text": 3}', "line 1: text must be a string, found int"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path: Path, name: str, content: str | bytes, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_prompts((), write(tmp_path / name, content))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.array([1, 2]), r"holds int64 \[2\]"),
        (np.array([[1.0]]), "holds float64"),
        (np.array([[1, -1, 2]]), "row 0 has -1 before its last token"),
    ],
)
def test_arrays_of_another_shape(tmp_path: Path, array: np.ndarray, complaint: str) -> None:
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(UsageError, match=complaint):
        read_prompts((), tmp_path / "p.npy")


def test_missing_file_and_contradictory_flags(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_prompts((), tmp_path / "p.txt")
    for texts, file in (((), None), (("a",), tmp_path / "p.txt")):
        with pytest.raises(UsageError, match="either --input_text or --input_file"):
            read_prompts(texts, file)


def test_tokenizing(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    text, messages = Prompt(where="w", text="the"), ({"role": "user", "content": "the"},)
    assert tokenize(text, tokenizer, chat=False) == tokenizer.encode("the")
    assert tokenize(text, tokenizer, chat=False)[0] == 1
    chat = tokenize(text, tokenizer, chat=True)
    assert chat[0] == 3 and chat.count(4) == 1
    assert tokenize(Prompt(where="w", messages=messages), tokenizer, chat=False) == chat
    assert tokenize(Prompt(where="w", token_ids=(9, 8)), None, chat=True) == [9, 8]
    with pytest.raises(UsageError, match="w is empty"):
        tokenize(Prompt(where="w", text=""), tokenizer, chat=False)
    with pytest.raises(UsageError, match="w is text, which needs a tokenizer"):
        tokenize(text, None, chat=False)
