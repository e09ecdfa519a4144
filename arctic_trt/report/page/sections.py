"""The sections of the page. Each stands, whatever is known: what was not measured is said, with the command that measures it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from arctic_trt.model.names import KV_CACHE_SCALE, LAYER, Kind, activation_scale
from arctic_trt.output import duration, gigabytes
from arctic_trt.report.page import figures
from arctic_trt.report.page.canvas import Picture
from arctic_trt.report.page.coverage import Coverage, assess_coverage
from arctic_trt.report.page.markup import Markup, join, pairs, table, tag
from arctic_trt.report.page.records import Evaluation, Quantization, Records, Sensitivity, SiteQuality, Verification
from arctic_trt.report.page.wording import agreement, change, depth, measuring, number, original, plural

SITES = tuple(row.trt.removesuffix(".weight") for row in LAYER if row.kind is Kind.QUANTIZED)
KV_CACHE = "kv_cache"
SHOWN_FINDINGS, SHOWN_EXPERTS, SHOWN_UNITS = 200, 32, 40
NONE = "–"
Drawn = tuple[Markup, list[Picture]]
"""A section's markup, and the pictures that it shows."""


def quality(records: Records) -> Drawn:
    """Perplexity and distance from the reference, and the hidden-state error over depth."""
    found = records.evaluation
    if found is None:
        return _missing(
            "Perplexity and agreement with the original: not measured.", measuring(records.name, original(records), "eval")
        ), []
    against = f", compared with {found.against}" if found.against else ""
    data = found.data
    text = f"{data.predicted_tokens:,} predicted tokens in {data.samples} samples of {data.path}{against}."
    facts = join(_perplexity(found), pairs(agreement(found)))
    if not found.hidden_error:
        return join(tag("p", text), facts), []
    drawn = figures.draw_hidden_error(found.hidden_error)
    return join(tag("p", text), tag("div", show(drawn), tag("div", facts), class_="beside")), [drawn]


def _perplexity(found: Evaluation) -> Markup:
    beside = found.reference
    worse = change(found.perplexity, beside.perplexity) if beside else ""
    rows = [("this checkpoint", number(found.perplexity), number(found.nll), worse)]
    if beside:
        rows.append(("reference", number(beside.perplexity), number(beside.nll), ""))
    return table(("", "perplexity", "nats a token", "change"), rows, numeric=(1, 2, 3))


def noise(records: Records) -> Drawn:
    """Signal to quantization noise by site and layer."""
    found = records.verification
    if found is None or not (found.sqnr or found.worst):
        return _missing("Signal to quantization noise: not measured.", measuring(records.name, original(records), "verify")), []
    text = "Of each matrix: the energy of its weights over that of what the cast to FP8 changed."
    if not found.sqnr:
        rows = [(quality.tensor, f"{quality.sqnr_db:.2f} dB") for quality in found.worst]
        return join(tag("p", text), tag("h3", "Matrices that lost most"), table(("tensor", "SQNR"), rows, numeric=(1,))), []
    sites = _in_order({quality.site for quality in found.sqnr})
    drawn = figures.draw_sqnr(found.sqnr, sites)
    by_site = [_site_row(site, [quality for quality in found.sqnr if quality.site == site]) for site in sites]
    summary = table(("site", "matrices", "mean", "worst", "worst in"), by_site, numeric=(1, 2, 3))
    return join(tag("p", text), show(drawn, "mlp are the routed experts."), summary), [drawn]


def _site_row(site: str, qualities: Sequence[SiteQuality]) -> tuple[str, ...]:
    worst = min(qualities, key=lambda quality: quality.min_db)
    count = sum(quality.count for quality in qualities)
    mean = sum(quality.mean_db * quality.count for quality in qualities) / max(count, 1)
    return site, f"{count:,}", f"{mean:.2f} dB", f"{worst.min_db:.2f} dB", f"layer {worst.layer}"


def calibration(records: Records) -> Drawn:
    """Tokens per expert, and the experts that saw too few."""
    found = records.quantization
    if found is None:
        return _missing("What calibration reached: not known."), []
    if not found.tokens:
        return tag("p", "Nothing was calibrated: this checkpoint holds no activation scales.", class_="missing"), []
    covered = assess_coverage(found.tokens)
    drawn = figures.draw_coverage(covered)
    text = f"{found.calibration_samples} samples, {found.calibration_tokens:,} tokens. {covered.summary()}"
    lacking = sorted(covered.without + covered.few, key=lambda at: found.tokens[at[0]][at[1]])
    if not lacking:
        return join(tag("p", text), show(drawn)), [drawn]
    text += " An expert without tokens has no say in its layer's activation scales; more or other calibration text reaches it."
    legend = (
        "Crosses: no token. Rings: fewer than a tenth of the layer's mean, which the list gives too. The colours are logarithmic."
    )
    listed = tag("ul", [_lacking(covered, *at) for at in lacking[:SHOWN_EXPERTS]], class_="list")
    more = _cut(len(lacking), SHOWN_EXPERTS, "experts", "quantize.json")
    return join(tag("p", text), show(drawn, legend), tag("h3", "Under-covered experts"), listed, more), [drawn]


def _lacking(covered: Coverage, layer: int, expert: int) -> Markup:
    count = covered.tokens[layer][expert]
    told = f"{count:,} of {covered.mean(layer):,.0f}" if count else tag("span", "no token", class_="bad")
    return tag("li", f"layer {layer} expert {expert}: ", told)


def scales(records: Records) -> Drawn:
    """Activation scales over depth."""
    found = records.quantization
    by_site = _scales_by_site(found) if found else {}
    if not by_site:
        return _missing("Activation scales: not known."), []
    drawn = figures.draw_scales(by_site)
    rows = []
    for site, values in by_site.items():
        rows.append((site, number(min(values)), number(median(values)), number(max(values))))
    text = (
        "The static scale with which the input of each site is divided before its cast: the largest magnitude that calibration "
        "saw, over 448. Larger inputs are clipped. The scale of the KV cache is at least 1."
    )
    summary = table(("site", "smallest", "median", "largest"), rows, numeric=(1, 2, 3))
    return join(tag("p", text), tag("div", show(drawn), summary, class_="beside")), [drawn]


def _scales_by_site(found: Quantization) -> dict[str, list[float]]:
    """Activation scales by site, in layer order; a site whose scales are another's in every layer shares its line."""
    names = {site: activation_scale(f"{site}.weight") for site in SITES} | {KV_CACHE: KV_CACHE_SCALE}
    found_scales = {
        site: [layer.get(name, float("nan")) for layer in found.scales]
        for site, name in names.items()
        if any(name in layer for layer in found.scales)
    }
    fc, gate = "residual_mlp.fc", "residual_mlp.gate"
    if found_scales.get(fc) == found_scales.get(gate) and gate in found_scales:
        del found_scales[gate]
    return found_scales


def sensitivity(records: Records) -> Drawn:
    """What quantization hurts most, and what a recipe keeps in bf16."""
    found = records.evaluation.sensitivity if records.evaluation else None
    if found is None:
        return _missing(
            "The sensitivity of layers and sites: not measured.",
            measuring(records.name, original(records), "eval", "--sensitivity"),
        ), []
    text = (
        "Every kind of site was quantized alone over the whole model; its KL is spread over the layers by the error that each "
        f"adds. The recipe {found.recipe} keeps {sum(unit.kept for unit in found.units)} of "
        f"{len(found.units)} units in bf16: {gigabytes(found.spent_bytes)} more, of at most {gigabytes(found.budget_bytes)}, "
        f"for a predicted KL of {number(found.predicted_kl)} nats."
    )
    ranked = sorted(found.units, key=lambda unit: -unit.kl)
    drawn = figures.draw_sensitivity(ranked)
    by_kind = table(("site, everywhere", "KL, mean"), [(s.site, number(s.kl_mean)) for s in found.sites], numeric=(1,))
    ranking = join(_ranking(found), _cut(len(ranked), SHOWN_UNITS, "units", "eval.json"))
    body = tag("div", show(drawn), tag("div", by_kind), class_="beside")
    return join(tag("p", text), body, tag("details", tag("summary", "The ranking as a table"), ranking)), [drawn]


def _ranking(found: Sensitivity) -> Markup:
    rows = [
        (figures.name_unit(unit), f"{unit.kl:.3g}", f"{unit.error:.3g}", gigabytes(unit.bytes), "bf16" if unit.kept else "")
        for unit in sorted(found.units, key=lambda unit: -unit.kl)[:SHOWN_UNITS]
    ]
    return table(("unit", "KL", "relative error", "costs", "kept"), rows, numeric=(1, 2, 3))


def verification(records: Records) -> Drawn:
    """What verify found."""
    found = records.verification
    if found is None:
        return _missing("Not verified.", measuring(records.name, original(records), "verify")), []
    outcome = tag("strong", "Passed", class_="good") if found.passed else tag("strong", "Failed", class_="bad")
    text = f", with {plural(found.errors, 'error')} and {plural(found.warnings, 'warning')}. Looked at: {depth(found)}."
    rows = [
        (tag("span", item.severity, class_=item.severity), item.kind, item.file, item.sentence)
        for item in found.findings[:SHOWN_FINDINGS]
    ]
    listed = table(("severity", "kind", "file", "what"), rows, class_="findings") if rows else Markup()
    return join(tag("p", outcome, text), listed, _cut(len(found.findings), SHOWN_FINDINGS, "findings", "verify.json")), []


def costs(records: Records) -> Drawn:
    """Time, memory and bytes of every step."""
    rows = [
        row
        for row in (
            _quantize_costs(records.quantization),
            _verify_costs(records.verification),
            _eval_costs(records.evaluation),
        )
        if row
    ]
    if not rows:
        return _missing("What the steps took: not known."), []
    header = ("step", "time", "peak memory", "read", "written", "notes")
    return table(header, rows, numeric=(1, 2, 3, 4)), []


def _quantize_costs(found: Quantization | None) -> tuple[str, ...] | None:
    if found is None:
        return None
    notes = f"{found.processes} process{'es' if found.processes > 1 else ''}, {_resumed(found.resumed_layers)}"
    sizes = (gigabytes(found.peak_rss_bytes), gigabytes(found.bytes_read), gigabytes(found.bytes_written))
    return "quantize", duration(found.seconds), *sizes, notes


def _verify_costs(found: Verification | None) -> tuple[str, ...] | None:
    if found is None:
        return None
    return "verify", duration(found.seconds), NONE, gigabytes(found.bytes_read), NONE, f"{found.tensors:,} tensors"


def _eval_costs(found: Evaluation | None) -> tuple[str, ...] | None:
    if found is None:
        return None
    sizes = gigabytes(found.peak_rss_bytes), gigabytes(found.bytes_read), NONE
    return "eval", duration(found.seconds), *sizes, _resumed(found.resumed_layers)


def _resumed(layers: int) -> str:
    return f"resumed after {layers} layers" if layers else "in one run"


def provenance(records: Records) -> Drawn:
    """What it was made of, with what."""
    found, evaluated = records.quantization, records.evaluation
    rows: list[tuple[str, str]] = []
    if records.network:
        config, mapping = records.network.config, records.network.mapping.as_dict()
        rows += [
            ("network", f"{config.num_hidden_layers} layers, {config.num_local_experts} experts, hidden {config.hidden_size}"),
            ("mapping", ", ".join(f"{name} {size}" for name, size in mapping.items())),
        ]
    if found:
        rows += [("quantized by", f"arctic-trt {found.version}")]
        rows += [(label, tag("code", str(found.fingerprint[key]))) for key, label in DIGESTS.items() if key in found.fingerprint]
    if evaluated:
        rows += [
            ("evaluated by", f"arctic-trt {evaluated.version}"),
            ("evaluation text, SHA-256", tag("code", evaluated.data.digest)),
        ]
    if not rows:
        return _missing("Where the checkpoint comes from: not known."), []
    recipe = [(key, str(value)) for key, value in found.recipe.items() if value is not None] if found else []
    told = join(tag("h3", "Recipe"), pairs(recipe)) if recipe else Markup()
    return join(pairs(rows), told), []


DIGESTS = {
    "checkpoint_headers": "original, headers, SHA-256",
    "config": "original, configuration, SHA-256",
    "calibration_ids": "calibration tokens, SHA-256",
}
"""Of the quantization's fingerprint, by what the page calls them."""


def show(drawn: Picture, caption: str = "") -> Markup:
    """A picture in both themes, and a line below it; wide ones scroll in a narrow window."""
    wide = drawn.width > figures.HALF
    shrinks = {"class_": "shrinks"} if wide else {}
    light = tag("img", src=_data(drawn.light), alt=drawn.alt, width=drawn.width, height=drawn.height, **shrinks)
    dark = tag("source", media="screen and (prefers-color-scheme: dark)", srcset=_data(drawn.dark))
    below = tag("figcaption", caption) if caption else Markup()
    return tag("figure", tag("div", tag("picture", dark, light), class_="scroll"), below, class_="full" if wide else "half")


def _data(png: bytes) -> str:
    import base64

    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _missing(what: str, *command: str) -> Markup:
    """A sentence, and the command line that ends that state; without one, only another quantization would."""
    told = join(" To do it: ", tag("code", *command)) if command else " There is no report/quantize.json that can be read."
    return tag("p", what, told, class_="missing")


def _cut(count: int, shown: int, what: str, file: str) -> Markup:
    return tag("p", f"{count - shown} more {what} are in report/{file}.", class_="muted") if count > shown else Markup()


def _in_order(sites: Iterable[str]) -> list[str]:
    """As in a layer of the checkpoint, then what it does not know by name."""
    return sorted(sites, key=lambda site: (SITES.index(site) if site in SITES else len(SITES), site))
