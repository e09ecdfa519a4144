"""``arctic-trt run`` from the command line, alone and under mpirun."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arctic_trt import launch
from tests.conftest import Finished
from tests.support.engines import mpirun


@pytest.fixture
def words(engines: Callable[[int], Path]) -> list[object]:
    return ["run", "--engine_dir", engines(1), "--tokenizer_dir", engines(1), "--max_output_len", 12, "--end_id", -1]


def test_texts_for_people(words: list[object], arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*words, "--input_text", "the sea is", "a")
    assert done.code == 0
    assert done.out.startswith('Input [Text 0]: "the sea is"\nOutput [Text 0]: "')
    assert '\nInput [Text 1]: "a"\nOutput [Text 1]: "' in done.out
    assert re.search(r"24 tokens in .* tokens/s\) on 1 rank, torch", done.err)


def test_json_is_one_object(words: list[object], arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*words, "--input_text", "the sea is", "--input_text", "a", "--json")
    value = json.loads(done.out)
    assert done.code == 0 and done.out.count("\n") == 1
    assert [len(output["token_ids"]) for output in value["outputs"]] == [12, 12]
    assert (
        arctic_trt(*words, "--input-text", "the sea is", "a", "--json").out.split('"seconds"')[0]
        == done.out.split('"seconds"')[0]
    )


def test_streaming_prints_the_text_as_it_comes(words: list[object], arctic_trt: Callable[..., Finished]) -> None:
    text = json.loads(arctic_trt(*words, "--input_text", "the sea is", "--json").out)["outputs"][0]["text"]
    streamed = arctic_trt(*words, "--input_text", "the sea is", "--streaming")
    assert streamed.out == f"Output [Text 0]: {text}\n"
    both = arctic_trt(*words, "--input_text", "the sea is", "--streaming", "--json")
    assert json.loads(both.out)["outputs"][0]["text"] == text
    assert f"Output [Text 0]: {text}\n" in both.err


def test_sampling_flags_reach_the_sampler(words: list[object], arctic_trt: Callable[..., Finished]) -> None:
    def tokens(*flags: object) -> list[int]:
        return json.loads(arctic_trt(*words, "--input_text", "the sea", "--json", *flags).out)["outputs"][0]["token_ids"]

    greedy, random = tokens(), tokens("--temperature", 3, "--random_seed", 1)
    assert tokens("--temperature", 0) == tokens("--top_k", 1) == greedy != random
    assert tokens("--temperature", 3, "--random_seed", 1) == random != tokens("--temperature", 3, "--random_seed", 2)
    penalized = tokens("--repetition_penalty", 1000)
    assert len(set(penalized)) == len(penalized)
    stop = json.loads(arctic_trt(*words, "--input_text", "the sea", "--json", "--end_id", greedy[4]).out)["outputs"][0]
    assert stop["token_ids"] == greedy[: greedy.index(greedy[4]) + 1] and stop["finish_reason"] == "stop"


def test_every_sampling_flag_does_something(words: list[object], arctic_trt: Callable[..., Finished]) -> None:
    def tokens(*flags: object) -> list[int]:
        done = arctic_trt(*words, "--input_text", "the sea", "--json", "--random_seed", 5, *flags)
        return json.loads(done.out)["outputs"][0]["token_ids"]

    greedy, drawn = tokens(), tokens("--temperature", 3)
    assert tokens("--temperature", 3, "--min_p", 1) == greedy and tokens("--temperature", 3, "--min_p", 0) == drawn
    assert len(set(tokens("--presence_penalty", 2, "--frequency_penalty", 2))) > len(set(greedy))
    assert tokens("--presence_penalty", 0, "--frequency_penalty", 0) == greedy


def test_several_outputs_with_log_probabilities(words: list[object], arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    flags = ["--input_text", "the sea", "a", "--num_return_sequences", 2, "--temperature", 2, "--bad_words", "is", "the"]
    files = ["--output_npy", tmp_path / "o.npy", "--output_csv", tmp_path / "o.csv", "--output_logits_npy", tmp_path / "l.npy"]
    done = arctic_trt(*words, *flags, *files, "--logprobs", 2, "--json")
    assert done.code == 0, done.err
    outputs = json.loads(done.out)["outputs"]
    assert len(outputs) == 4 and outputs[0]["token_ids"] != outputs[1]["token_ids"]
    for output in outputs:
        assert [one["token"] for one in output["logprobs"]] == output["token_ids"]
        for one in output["logprobs"]:
            values = [value for _, value in one["top"]]
            assert len(values) == 2 and values == sorted(values, reverse=True) and one["logprob"] <= values[0] < 0
    rows, logits = np.load(tmp_path / "o.npy"), np.load(tmp_path / "l.npy")
    assert rows.shape[:2] == (2, 2) and logits.shape[0] == 2 and logits[1, 0].any()
    assert rows[0, 1, -12:].tolist() == outputs[1]["token_ids"]
    assert (tmp_path / "o.csv").read_text().count("\n") == 4
    assert "Output [Text 1 Seq 0]: " in arctic_trt(*words, *flags, "--streaming").out
    people = arctic_trt(*words, *flags)
    assert re.findall(r"^(\w+ \[.*?\]): ", people.out, re.MULTILINE) == [
        *("Input [Text 0]", "Output [Text 0 Seq 0]", "Output [Text 0 Seq 1]"),
        *("Input [Text 1]", "Output [Text 1 Seq 0]", "Output [Text 1 Seq 1]"),
    ]
    assert "logprobs" not in json.loads(arctic_trt(*words, "--input_text", "a", "--json").out)["outputs"][0]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "either --input_text or --input_file"),
        (["--input_text", "a", "--input_file", "b.txt"], "either --input_text or --input_file"),
        (["--input_text", "a", "--top_p", "2"], "--top_p 2.0 is out of range, expected between 0 and 1"),
        (["--input_text", "a", "--temperature", "-1"], "--temperature -1.0 is out of range"),
        (["--input_text", "a", "--min_p", "2"], "--min_p 2.0 is out of range, expected between 0 and 1"),
        (["--input_text", "a", "--num_return_sequences", "2"], "--num_return_sequences 2 would give equal outputs"),
        (["--input_text", "a", "--logprobs", "-1"], "--logprobs -1 is out of range"),
        (["--input_file", "absent.txt"], "--input_file absent.txt cannot be read"),
        (["--input_text", "a", "--max_output_len", "many"], "--max_output_len"),
    ],
)
def test_wrong_usage(flags: list[str], complaint: str, words: list[object], arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*words, *flags)
    assert (done.code, done.out) == (2, "") and complaint in done.err and done.err.count("\n") == 1


def test_tokenizer_and_engine_missing(words: list[object], arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    done = arctic_trt(*words, "--input_text", "a", "--tokenizer_dir", tmp_path)
    assert done.code == 2 and f"{tmp_path}/tokenizer.json does not exist" in done.err
    done = arctic_trt(*words, "--input_text", "a", "--engine_dir", tmp_path)
    assert done.code == 2 and f"{tmp_path}/config.json does not exist" in done.err


def test_an_engine_of_two_ranks_asks_for_mpirun(
    words: list[object], engines: Callable[[int], Path], arctic_trt: Callable[..., Finished]
) -> None:
    done = arctic_trt(*words, "--input_text", "a", "--engine_dir", engines(2))
    assert done.code == 3 and "needs 2 ranks (tp 2 x pp 1), got 1. Start it as: mpirun -n 2" in done.err


def test_short_flags_after_several_texts_are_flags(words: list[object], arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*words, "--input_text", "a", "- b", "-q")
    assert done.out.count("Output [Text") == 2 and 'Input [Text 1]: "- b"' in done.out
    assert done.err == ""


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_left_alone_with_a_failure_says_so(
    rank: int, arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "PATIENCE_BEFORE_MPI_S", 0.0)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
    done = arctic_trt("build", "--checkpoint_dir", tmp_path / "absent", "--output_dir", tmp_path / "engine")
    whose = "rank 3: " if rank else ""
    assert done.code == 2 and f"arctic-trt: error: {whose}{tmp_path}/absent/config.json does not exist" in done.err


@pytest.mark.mpi
def test_two_ranks_say_what_one_says(
    words: list[object], engines: Callable[[int], Path], arctic_trt: Callable[..., Finished]
) -> None:
    flags = ["--input_text", "the sea is", "a", "--temperature", 1.5, "--streaming", "--json"]
    alone = json.loads(arctic_trt(*words, *flags).out)
    job = mpirun(2, "-m", "arctic_trt", *words, *flags, "--engine_dir", engines(2))
    assert job.code == 0, job.err
    together = json.loads(job.out)
    assert together["outputs"] == alone["outputs"]
    assert (alone["world_size"], together["world_size"]) == (1, 2)
    assert job.err.count("on 2 ranks, torch") == 1


def test_the_kv_cache_takes_what_it_is_given(words: list[object], arctic_trt: Callable[..., Finished]) -> None:
    texts = ["--input_text", "the sea is", "a", "the sea was", "--json"]
    ample = json.loads(arctic_trt(*words, *texts).out)["outputs"]
    scarce = arctic_trt(*words, *texts, "--max_tokens_in_paged_kv_cache", 64, "-v")
    assert json.loads(scarce.out)["outputs"] == ample
    assert "room for 64 tokens, in blocks of 32" in scarce.err and "preemptions" in scarce.err
    for flags, complaint in (
        (["--kv_cache_memory", "much"], "--kv_cache_memory 'much' is not a size."),
        (["--kv_cache_memory", "100"], "no room for a single block of 32 tokens"),
        (["--max_tokens_in_paged_kv_cache", 32, "--max_output_len", 40], "exceeds the KV cache of 32 tokens"),
    ):
        done = arctic_trt(*words, "--input_text", "a", *flags)
        assert done.code == 2 and complaint in done.err
