"""The handful of figures at the top of the page, for those who read no further."""

from __future__ import annotations

from arctic_trt.output import duration, gigabytes
from arctic_trt.report.page.markup import Markup, tag
from arctic_trt.report.page.records import Evaluation, Quantization, Records, Verification
from arctic_trt.report.page.wording import NOT_MEASURED, change, number, share, verdict, worst_db


def key_figures(records: Records) -> Markup:
    """Whether it is right, how good it is, how large it is."""
    worst = worst_db(records.verification)
    figures = [
        _verified(records.verification),
        *_quality(records.evaluation),
        _figure("worst SQNR", NOT_MEASURED if worst is None else f"{worst:.1f} dB"),
        *(_size(records.quantization) if records.quantization else ()),
    ]
    return tag("dl", figures, class_="key")


def _verified(found: Verification | None) -> Markup:
    if found is None:
        return _figure("verification", verdict(found))
    outcome = tag("span", verdict(found), class_="good" if found.passed else "bad")
    depth = "against the original" if found.against else "structure and values" if found.share else "structure only"
    return _figure("verification", outcome, depth)


def _quality(found: Evaluation | None) -> list[Markup]:
    if found is None:
        return [_figure("perplexity", NOT_MEASURED), _figure("KL, mean", NOT_MEASURED)]
    before = found.reference.perplexity if found.reference else None
    agree = found.top1_agreement
    return [
        _figure(
            "perplexity", number(found.perplexity), f"{change(found.perplexity, before)}, was {number(before)}" if before else ""
        ),
        _figure("KL, mean", number(found.kl_mean), "" if agree is None else f"{share(agree)} same likeliest token"),
    ]


def _size(found: Quantization) -> list[Markup]:
    experts = sum(map(len, found.tokens))
    without = str(len(found.experts_without_tokens)) if experts else "not calibrated"
    return [
        _figure("experts without tokens", without, f"of {experts:,}" if experts else ""),
        _figure("size", gigabytes(found.bytes_written), f"quantized in {duration(found.seconds)}"),
    ]


def _figure(name: str, value: str, beside: str = "") -> Markup:
    unknown = {"class_": "unknown"} if value.startswith("not ") else {}
    return tag("div", tag("dt", name), tag("dd", value, tag("small", beside) if beside else Markup(), **unknown))
