"""Pictures are drawn from numbers alone: not blank, the same every time, whatever the numbers are."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from arctic_trt.errors import RefusedError
from arctic_trt.report.arctic import RELEASED
from arctic_trt.report.page import figures
from arctic_trt.report.page.canvas import Picture
from arctic_trt.report.page.coverage import assess_coverage
from arctic_trt.report.page.records import Evaluation, Quantization, SiteQuality, Unit, Verification
from arctic_trt.report.page.theme import DARK, LIGHT
from tests.support.records import SITES, eval_record, quantize_record, small_config, verify_record

FULL, SMALL = RELEASED, small_config()


def units() -> list[Unit]:
    found = Evaluation.model_validate(eval_record(SMALL)).sensitivity
    assert found
    return found.units


def scales_of(found: Quantization) -> dict[str, list[float]]:
    return {site: [layer[f"{site}.activation_scaling_factor"] for layer in found.scales] for site in SITES}


def drawings(config: object) -> dict[str, Callable[[], Picture]]:
    quantized = Quantization.model_validate(quantize_record(config))  # type: ignore[arg-type]
    verified = Verification.model_validate(verify_record(config))  # type: ignore[arg-type]
    evaluated = Evaluation.model_validate(eval_record(config))  # type: ignore[arg-type]
    assert verified.sqnr and evaluated.hidden_error and evaluated.sensitivity
    sqnr, errors, ranked = verified.sqnr, evaluated.hidden_error, evaluated.sensitivity.units
    return {
        figures.COVERAGE: lambda: figures.draw_coverage(assess_coverage(quantized.tokens)),
        figures.SQNR: lambda: figures.draw_sqnr(sqnr, SITES),
        figures.SCALES: lambda: figures.draw_scales(scales_of(quantized)),
        figures.HIDDEN_ERROR: lambda: figures.draw_hidden_error(errors),
        figures.SENSITIVITY: lambda: figures.draw_sensitivity(ranked),
    }


def pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    image.load()
    return np.asarray(image.convert("RGB"))


def colour(name: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(name[1:]), np.uint8)


def near(image: np.ndarray, name: str, distance: int = 60) -> np.ndarray:
    """Where the picture is about that colour; its palette has 256."""
    return np.abs(image.astype(int) - colour(name)).sum(-1) < distance


@pytest.mark.parametrize("name", figures.PICTURES)
@pytest.mark.parametrize("config", [FULL, SMALL], ids=["full", "small"])
def test_a_picture_is_a_png_of_its_size_on_the_page_and_not_blank(name: str, config: object) -> None:
    drawn = drawings(config)[name]()
    assert drawn.name == name and drawn.alt.endswith(".") and drawn.width in range(figures.HALF, figures.FULL + 1)
    for png, theme in ((drawn.light, LIGHT), (drawn.dark, DARK)):
        image = pixels(png)
        assert image.shape == (2 * drawn.height, 2 * drawn.width, 3)
        assert (image[[0, -1]] == colour(theme.paper)).all(), "it lies on the page without an edge"
        assert 0.02 < (image != image[0, 0]).any(-1).mean() < 0.9
        assert len(png) < 60_000
    assert (drawn.width == figures.FULL) == (config is FULL and name in (figures.COVERAGE, figures.SQNR))


def test_the_same_numbers_give_the_same_bytes_which_name_nothing() -> None:
    first, second = (drawings(SMALL)[figures.SCALES]() for _ in range(2))
    assert first == second
    assert not [word for word in (b"Software", b"matplotlib", b"tIME", b"tEXt") if word in first.light]


def test_what_a_user_likes_to_see_in_matplotlib_changes_nothing() -> None:
    plain = drawings(SMALL)[figures.HIDDEN_ERROR]()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 10, "lines.linewidth": 9}):
        assert drawings(SMALL)[figures.HIDDEN_ERROR]() == plain
        assert matplotlib.rcParams["font.size"] == 30


def marks(tokens: list[list[int]]) -> list[tuple[bool, bool]]:
    """Whether the mark of an expert without tokens, and that of one with few, is seen: in light, in dark."""
    drawn = figures.draw_coverage(assess_coverage(tokens))
    pairs = ((pixels(drawn.light), LIGHT), (pixels(drawn.dark), DARK))
    return [(bool(near(image, theme.bad).any()), bool(near(image, theme.warn).any())) for image, theme in pairs]


def test_under_covered_experts_are_marked() -> None:
    tokens = [[800 + 7 * expert + layer for expert in range(128)] for layer in range(35)]
    assert marks(tokens) == [(False, False)] * 2
    tokens[20][100] = 0
    assert marks(tokens) == [(True, False)] * 2
    tokens[20][100] = 5
    assert marks(tokens) == [(False, True)] * 2


@pytest.mark.usefixtures("light_only")
def test_the_mark_is_where_the_expert_is() -> None:
    tokens = [[800] * 128 for _ in range(35)]
    tokens[20][100] = 0
    drawn = figures.draw_coverage(assess_coverage(tokens))
    rows, columns = np.nonzero(near(pixels(drawn.light), LIGHT.bad))
    left, right, top, bottom = 44, drawn.width - 84, 30, drawn.height - 40
    assert columns.mean() / 2 == pytest.approx(left + (right - left) * 100.5 / 128, abs=2)
    assert rows.mean() / 2 == pytest.approx(top + (bottom - top) * 20.5 / 35, abs=2)


@pytest.mark.usefixtures("light_only")
def test_a_matrix_that_lost_much_stands_out_and_small_differences_do_not() -> None:
    qualities = [SiteQuality(layer=i, site="mlp.fc", min_db=31 + i / 40, mean_db=31.9, count=8) for i in range(20)]
    cells = np.s_[70:-90, 2 * 120 : 2 * (1000 - 84)]
    assert not near(pixels(figures.draw_sqnr(qualities, ["mlp.fc"]).light)[cells], LIGHT.warn).any()
    qualities[7] = qualities[7].model_copy(update={"min_db": 12.0})
    columns = np.nonzero(near(pixels(figures.draw_sqnr(qualities, ["mlp.fc"]).light)[cells], LIGHT.warn))[1]
    assert 796 * 7 / 20 - 2 < columns.min() / 2 < columns.max() / 2 < 796 * 8 / 20 + 2


@pytest.mark.usefixtures("light_only")
def test_kept_units_are_told_from_the_others() -> None:
    ranked = units()
    kept = [unit for unit in ranked if unit.kept]
    assert kept and near(pixels(figures.draw_sensitivity(ranked).light), LIGHT.accent).any()
    others = [unit.model_copy(update={"kept": False}) for unit in ranked]
    assert not near(pixels(figures.draw_sensitivity(others).light), LIGHT.accent).any()


@pytest.mark.usefixtures("light_only")
@pytest.mark.parametrize(
    "draw",
    [
        lambda values: figures.draw_scales({"mlp.fc": values, "mlp.proj": values[:1]}),
        figures.draw_hidden_error,
        lambda values: figures.draw_sensitivity([Unit(layer=None, site="x", error=v, kl=v, bytes=0, kept=True) for v in values]),
        lambda values: figures.draw_sqnr(
            [SiteQuality(layer=i, site="x", min_db=v, mean_db=v, count=1) for i, v in enumerate(values)], ["x"]
        ),
    ],
    ids=["scales", "hidden_error", "sensitivity", "sqnr"],
)
@pytest.mark.parametrize(
    "values",
    [[math.nan], [math.inf, -1.0, -math.inf, 2.0], [0.0, 0.0], [1e308, -1e308, 1e-300], [3.0, 3.0, 3.0]],
    ids=str,
)
def test_odd_numbers_are_drawn_as_far_as_they_are_numbers(
    draw: Callable[[list[float]], Picture], values: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    assert pixels(draw(values).light).size
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("light_only")
@pytest.mark.parametrize("tokens", [[[0]], [[0, 0], [0, 0]], [[5]], [[1, 10**12]], [[1] * 300] * 3, [[3, 4]] * 70])
def test_odd_tables_of_tokens_are_drawn(tokens: list[list[int]]) -> None:
    assert pixels(figures.draw_coverage(assess_coverage(tokens)).light).size


@given(st.lists(st.floats(-0.2, 1.4), max_size=9).map(sorted))
def test_names_of_lines_are_pushed_apart_and_stay_in_order(heights: list[float]) -> None:
    moved = figures.spread(heights, 0.1)
    assert all(after - before > 0.1 - 1e-9 for before, after in pairwise(moved))
    if all(after - before >= 0.1 for before, after in pairwise(heights)) and max(heights, default=0) <= 1:
        assert moved == pytest.approx(heights)
    if heights and heights[0] >= 0 and heights[-1] <= 1 and len(heights) <= 5:
        assert moved[-1] <= max(1, heights[0] + 0.1 * len(heights))


def test_without_matplotlib_the_report_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RefusedError, match="The package matplotlib is not installed"):
        figures.draw_hidden_error([0.1])


def test_a_home_that_cannot_be_written_is_not_talked_about(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where a directory should be")
    code = "from arctic_trt.report.page.figures import draw_hidden_error; draw_hidden_error([0.1, 0.2])"
    unset = ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    env = {**{key: value for key, value in os.environ.items() if key not in unset}, "HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
