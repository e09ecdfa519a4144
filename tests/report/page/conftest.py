"""Pages without the time that drawing takes, where what is drawn is not the subject."""

from __future__ import annotations

import base64

import pytest

from arctic_trt.report.page import canvas
from arctic_trt.report.page.theme import LIGHT

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture is one pixel."""
    monkeypatch.setattr(canvas, "_render", lambda *_: PIXEL)


@pytest.fixture
def light_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures for dark pages are one pixel."""
    render = canvas._render
    monkeypatch.setattr(canvas, "_render", lambda box, draw, theme: render(box, draw, theme) if theme is LIGHT else PIXEL)
