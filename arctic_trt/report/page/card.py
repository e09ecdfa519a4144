"""``README.md``: the checkpoint's model card, made from the same numbers as the page.

A comment in its front matter says who wrote it. A card without that line is somebody's own and stays as it is. Paths of the
machine stay out of it: it is made to be published.
"""

from __future__ import annotations

from collections.abc import Sequence

from arctic_trt.checkpoint.output_dir import CARD_MARK
from arctic_trt.output import gigabytes
from arctic_trt.report.page import wording
from arctic_trt.report.page.canvas import Picture
from arctic_trt.report.page.figures import COVERAGE
from arctic_trt.report.page.records import Evaluation, Records

RELEASED = {name: f"Snowflake/{name}" for name in ("snowflake-arctic-instruct", "snowflake-arctic-base")}
"""Where the released models are published, by the names of their directories; both are under Apache-2.0."""
TOLD = ("qformat", "kv_cache_dtype", "calibrator", "calib_size", "calib_max_seq_length", "batch_size")
"""Keys of the recipe that say something about the bytes."""


def draw_card(records: Records, pictures: Sequence[Picture]) -> str:
    """The card's text, Markdown with a YAML front matter."""
    parts = [
        _front_matter(records),
        f"# {_text(records.name)}",
        _what(records),
        "## How it was made",
        _how(records),
        "## How to run it",
        _run(records),
        "## Quality",
        _quality(records),
        *(f"![{_text(drawn.alt)}](report/{drawn.name}.png)" for drawn in pictures if drawn.name == COVERAGE),
        "All figures are in `report/report.html`.",
        "## Limits",
        _limits(records),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(records: Records) -> str:
    import yaml

    base = wording.base_of(records)
    made_of = {"base_model": RELEASED.get(base, base), "base_model_relation": "quantized"} if records.quantization else {}
    fp8 = ["fp8", "quantized"] if records.network and records.network.quant.fp8 else []
    facts: dict[str, object] = {
        **made_of,
        "license": "apache-2.0" if base in RELEASED else "unknown",
        "library_name": "tensorrt-llm",
        "pipeline_tag": "text-generation",
        "tags": ["arctic", "moe", "tensorrt-llm", *fp8],
    }
    return f"---\n{CARD_MARK}\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _what(records: Records) -> str:
    lines = [f"{wording.title_of(records)}, in the format of TensorRT-LLM's checkpoints."]
    if records.network:
        config, mapping = records.network.config, records.network.mapping
        lines.append(
            f"{config.num_hidden_layers} layers with {config.num_local_experts} experts, of which {config.num_experts_per_tok} "
            f"work on each token, in {mapping.world_size} rank files (tp_size {mapping.tp_size}, pp_size {mapping.pp_size})"
            + (f", {gigabytes(records.quantization.bytes_written)}." if records.quantization else ".")
        )
    return _text(" ".join(lines))


def _how(records: Records) -> str:
    found = records.quantization
    if found is None:
        return "`report/quantize.json` is not there or cannot be read: nothing is known about that."
    digest = str(found.fingerprint.get("calibration_ids", "unknown"))
    recipe = [f"- `{key}`: {_text(str(found.recipe[key]))}" for key in TOLD if found.recipe.get(key) is not None]
    calibration = f"{found.calibration_samples} samples, {found.calibration_tokens:,} tokens, SHA-256 {_text(digest)}"
    return "\n".join([f"By `arctic-trt quantize` {_text(found.version)}:", "", *recipe, f"- calibration text: {calibration}"])


def _run(records: Records) -> str:
    world = records.network.mapping.world_size if records.network else "RANKS"
    build = "arctic-trt build --checkpoint_dir . --output_dir ../engine --gpt_attention_plugin bfloat16 --gemm_plugin bfloat16"
    run = f"mpirun -n {world} arctic-trt run --engine_dir ../engine --tokenizer_dir . --max_output_len 64"
    return f'```\narctic-trt verify .\n{build}\n{run} --input_text "The future of AI is"\n```'


def _quality(records: Records) -> str:
    found, evaluated = records.verification, records.evaluation
    worst = wording.worst_db(found)
    rows = [
        ("verification", f"{wording.verdict(found)} ({wording.depth(found)})" if found else wording.NOT_MEASURED),
        *_perplexity(evaluated),
        *wording.agreement(evaluated),
        ("SQNR of the worst matrix", wording.NOT_MEASURED if worst is None else f"{worst:.1f} dB"),
    ]
    told = "\n".join(["| | |", "|---|---|", *(f"| {name} | {_text(value)} |" for name, value in rows)])
    if evaluated:
        data = evaluated.data
        told += f"\n\nOn {data.predicted_tokens:,} tokens of {_text(wording.name_of(data.path))}, SHA-256 {_text(data.digest)}."
    unknown = {"verify": worst, "eval": evaluated.kl_mean if evaluated else None}
    missing = [wording.measuring(".", wording.base_of(records), command) for command, value in unknown.items() if value is None]
    if missing:
        told += "\n\n" + "\n".join(["What is not measured yet, this measures:", "", *(f"    {line}" for line in missing)])
    return told


def _perplexity(found: Evaluation | None) -> list[tuple[str, str]]:
    rows = [("perplexity", wording.number(found.perplexity if found else None))]
    if found and found.reference:
        before = found.reference.perplexity
        rows.append(
            ("perplexity of the original", f"{wording.number(before)}, a change of {wording.change(found.perplexity, before)}")
        )
    return rows


def _limits(records: Records) -> str:
    lines = ["- Those of the model that it was made of, as its own card tells them."]
    found = records.quantization
    if found and found.tokens:
        lines.append("- Activation scales are static: inputs larger than any that calibration saw are clipped.")
    if found and found.experts_without_tokens:
        experts = sum(map(len, found.tokens))
        lines.append(f"- Calibration text reached all but {len(found.experts_without_tokens)} of {experts:,} experts.")
    if records.network:
        lines.append(f"- It is cut for {records.network.mapping.world_size} ranks, no more and no fewer.")
    return "\n".join(lines)


def _text(value: str) -> str:
    """Data as Markdown text: on one line, and none of its characters taken for markup."""
    return "".join("\\" + letter if letter in "\\`*_[]<>|#!&" else letter for letter in " ".join(value.split()))
