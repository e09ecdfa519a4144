"""``arctic-trt run``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, FILE, SectionedCommand, Several, device_option, output_options
from arctic_trt.errors import UsageError
from arctic_trt.output import Output, duration

if TYPE_CHECKING:
    from pathlib import Path

    from arctic_trt.runtime.jobs.job import JobOptions
    from arctic_trt.runtime.runner import RunOptions, RunResult

EPILOG = """\b
Example, the official recipe's third step, on the eight ranks of an engine with --tp_size 8:
  mpirun -n 8 --allow-run-as-root arctic-trt run --engine_dir arctic-engine --tokenizer_dir snowflake-arctic-instruct
         --max_output_len 20 --input_text "The future of AI is"

An engine of one rank runs without mpirun. Without --temperature, --top_k, --top_p and --min_p the likeliest token is
taken.

\b
A batch job, which is resumed by the same command:
  mpirun -n 8 --allow-run-as-root arctic-trt run --engine_dir arctic-engine --tokenizer_dir snowflake-arctic-instruct
         --input_file jobs.jsonl --output_file out.jsonl"""


JOBS, KV_CACHE, TENSORRT = "Batch jobs", "KV cache", "TensorRT engines"
RUNTIME = (
    "kv_cache_free_gpu_memory_fraction",
    "max_tokens_in_paged_kv_cache",
    "kv_cache_enable_block_reuse",
    "enable_chunked_context",
    "gpu_weights_percent",
    "cuda_graph_mode",
    "use_gpu_direct_storage",
    "no_memory_check",
)
"""Settings of TensorRT-LLM's runtime, by the names of its own run script; the last is ours."""
CACHE = (
    "kv_cache_memory",
    "kv_cache_free_gpu_memory_fraction",
    "max_tokens_in_paged_kv_cache",
    "kv_cache_enable_block_reuse",
    "enable_chunked_context",
)
MAX_TOKENS = "max_tokens_in_paged_kv_cache"
NOT_IN_JOBS = (
    *("input_text", "streaming", "num_return_sequences", "logprobs", "output_npy", "output_csv", "output_logits_npy"),
    *(name for name in RUNTIME if name != MAX_TOKENS),
)
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "random_seed": "seed",
}
"""Flags that say how to choose, with the names that the sampler has for them."""


@click.command(
    "run",
    cls=SectionedCommand,
    sections={**dict.fromkeys(RUNTIME, TENSORRT), **dict.fromkeys(CACHE, KV_CACHE), "output_file": JOBS, "shard": JOBS},
    epilog=EPILOG,
    short_help="Generate text with an engine, alone or under mpirun.",
)
@click.option("--engine_dir", type=DIRECTORY, required=True, help="Engine directory, as arctic-trt build writes it.")
@click.option("--tokenizer_dir", type=DIRECTORY, help="Directory of tokenizer.json.  [default: --engine_dir]")
@click.option("--max_output_len", type=int, help="Generate at most N tokens a prompt. In a batch job lines may say otherwise.")
@click.option("--input_text", cls=Several, metavar="TEXT ...", help="One or more prompts.")
@click.option("--input_file", type=FILE, help="Prompts: .txt and .jsonl a line each, .csv and .npy as rows of token ids.")
@click.option("--temperature", type=float, help="Divides the logits; 0 takes the likeliest token.  [default: 1]")
@click.option("--top_k", type=int, help="Choose among the K likeliest tokens.")
@click.option("--top_p", type=float, help="Choose among the likeliest tokens that make up P.")
@click.option("--min_p", type=float, help="Choose among tokens at least P times as likely as the likeliest.")
@click.option("--repetition_penalty", type=float, help="Above 1 makes tokens of prompt and output less likely.  [default: 1]")
@click.option("--presence_penalty", type=float, help="Subtract from the logits of the output's tokens, -2 to 2.  [default: 0]")
@click.option("--frequency_penalty", type=float, help="The same, each time a token is in the output.  [default: 0]")
@click.option("--random_seed", type=int, help="Seed of the choices.  [default: 0]")
@click.option("--num_return_sequences", type=int, help="Draw N outputs for each prompt.  [default: 1]")
@click.option("--end_id", type=int, help="Token id that ends a text, -1 for none.  [default: the tokenizer's]")
@click.option("--stop_words", cls=Several, metavar="TEXT ...", help="Texts before which an output ends.")
@click.option("--bad_words", cls=Several, metavar="TEXT ...", help="Texts that no output has, as far as their usual tokens go.")
@click.option("--logprobs", type=int, metavar="K", help="With --json: log probabilities of tokens and of the K likeliest.")
@click.option("--chat", is_flag=True, help="Take prompts as a user's message under the chat template.")
@click.option("--streaming", is_flag=True, help="Print text as it comes.")
@device_option
@click.option(
    "--kv_cache_memory",
    metavar="SIZE",
    help="Torch engines: its memory on a rank, like 2GiB.  [default: at most half of what is free]",
)
@click.option(
    "--kv_cache_free_gpu_memory_fraction", type=float, help="TensorRT engines: its share of free GPU memory.  [default: 0.9]"
)
@click.option("--max_tokens_in_paged_kv_cache", type=int, help="Its tokens, at most.")
@click.option("--kv_cache_enable_block_reuse", is_flag=True, help="Compute equal beginnings once; torch engines always do.")
@click.option("--enable_chunked_context", is_flag=True, help="Cut long prompts into several steps; torch engines always do.")
@click.option("--gpu_weights_percent", type=float, help="Share of the weights kept on the GPU.  [default: 1]")
@click.option("--cuda_graph_mode", is_flag=True, help="Record decode steps as CUDA graphs.")
@click.option("--use_gpu_direct_storage", is_flag=True, help="Load past host memory.")
@click.option("--no_memory_check", is_flag=True, help="Load even where host memory may not suffice.")
@click.option("--output_file", type=FILE, help="Append a result for each line of --input_file, a .jsonl of requests.")
@click.option("--shard", metavar="I/N", help="Do every N-th line, from the I-th on, counted from 0.  [default: 0/1]")
@click.option("--output_npy", type=FILE, help="Write token ids, int32 [batch, N, longest].")
@click.option("--output_csv", type=FILE, help="Write token ids, a line a sequence.")
@click.option("--output_logits_npy", type=FILE, help="Write the prompts' logits, float32 [batch, longest prompt, vocab].")
@output_options
def command(output: Output, **flags: Any) -> None:
    """Generate text with an engine: alone for an engine of one rank, under mpirun -n N for one of N."""
    if flags["output_file"] is not None:
        from arctic_trt.cli.batch_job import run_batch_job

        run_batch_job(_job_options(**flags), output)
        return
    from arctic_trt.launch import is_leader, tie_to_launcher

    tie_to_launcher()
    if not is_leader():
        logging.getLogger("arctic_trt").setLevel(logging.ERROR)
    from arctic_trt.runtime.runner import run

    options = _options(**flags)
    stream = _Stream(output, options.num_return_sequences) if options.streaming else None
    result = run(options, stream.piece) if stream else run(options)
    if result is not None:
        _show(result, output, stream)


def _options(
    output_file: None, shard: str | None, num_return_sequences: int | None, kv_cache_memory: str | None, **flags: Any
) -> RunOptions:
    from arctic_trt.engine.tensorrt_llm.session import RuntimeOptions
    from arctic_trt.runtime.runner import RunOptions
    from arctic_trt.runtime.sampler import plan_sampling

    if flags["max_output_len"] is None:
        raise UsageError("--max_output_len is required.", "Only the lines of a batch job can say it themselves.")
    if shard is not None:
        raise UsageError("--shard is for batch jobs.", "Give --output_file out.jsonl, or leave it out.")
    sampling = plan_sampling(**{name: flags.pop(flag) for flag, name in SAMPLING.items()})
    runtime = RuntimeOptions(**{name: flags.pop(name) for name in RUNTIME})
    samples, memory = 1 if num_return_sequences is None else num_return_sequences, _memory(kv_cache_memory)
    return RunOptions(sampling=sampling, runtime=runtime, num_return_sequences=samples, kv_cache_memory=memory, **flags)


def _memory(size: str | None) -> int | None:
    from arctic_trt.quantize.memory import parse_size

    return None if size is None else parse_size(size, "--kv_cache_memory")


def _job_options(shard: str | None, input_file: Path | None, kv_cache_memory: str | None, **flags: Any) -> JobOptions:
    from arctic_trt.runtime.jobs.input_file import parse_shard
    from arctic_trt.runtime.jobs.job import JobOptions
    from arctic_trt.runtime.kv_budget import KvBudget

    given = {name: flags.pop(name) for name in NOT_IN_JOBS}
    wrong = [name for name, value in given.items() if not (value is None or value is False or value == ())]
    if wrong:
        raise UsageError(f"--{wrong[0]} does not go with --output_file, which makes this a batch job.", "Leave one of them out.")
    if input_file is None:
        raise UsageError("--output_file needs an --input_file, a .jsonl with a request a line.")
    sampling = {name: flags.pop(flag) for flag, name in SAMPLING.items()}
    budget = KvBudget(memory_bytes=_memory(kv_cache_memory), max_tokens=flags.pop(MAX_TOKENS))
    return JobOptions(input_file=input_file, shard=parse_shard(shard), sampling=sampling, kv_budget=budget, **flags)


class _Stream:
    """Prints pieces; where the next one belongs to another output, a new line says to which."""

    def __init__(self, output: Output, samples: int) -> None:
        self._output = output
        self._samples = samples
        self._index: int | None = None

    def piece(self, index: int, text: str) -> None:
        if index != self._index:
            before = "" if self._index is None else "\n"
            self._output.piece(f"{before}Output [{_name(index, self._samples)}]: ")
            self._index = index
        self._output.piece(text)

    def end(self) -> None:
        if self._index is not None:
            self._output.piece("\n")


def _name(index: int, samples: int) -> str:
    """What an output is called, of which there are ``samples`` a prompt."""
    return f"Text {index}" if samples == 1 else f"Text {index // samples} Seq {index % samples}"


def _show(result: RunResult, output: Output, stream: _Stream | None) -> None:
    if stream:
        stream.end()
    else:
        samples = len(result.outputs) // len(result.prompts)
        for index, completion in enumerate(result.outputs):
            if index % samples == 0:
                output.text(f'Input [Text {index // samples}]: "{result.prompts[index // samples]}"')
            generated = f'"{completion.text}"' if completion.text else f"token ids {completion.token_ids}"
            output.text(f"Output [{_name(index, samples)}]: {generated}")
    ranks = f"{result.world_size} rank{'s' if result.world_size > 1 else ''}"
    rate = result.num_generated / result.seconds
    output.note(f"{result.num_generated} tokens in {duration(result.seconds)} ({rate:.1f} tokens/s) on {ranks}, {result.backend}")
    output.result(result.as_dict())
