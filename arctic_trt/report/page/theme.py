"""The two sets of colours, of page and pictures alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours as ``#rrggbb``.

    ``faint`` fills what matters less, ``low`` and ``high`` are the ends of a heatmap's scale, ``series`` tell lines apart.
    """

    paper: str
    panel: str
    ink: str
    muted: str
    line: str
    accent: str
    good: str
    warn: str
    bad: str
    faint: str
    low: str
    high: str
    series: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    panel="#f5f6f7",
    ink="#1f2328",
    muted="#5d6671",
    line="#d8dce1",
    accent="#2563a6",
    good="#1f7a3f",
    warn="#a15c00",
    bad="#c0281f",
    faint="#a9b1bb",
    low="#edf2f8",
    high="#174a80",
    series=("#2563a6", "#c2571a", "#2f8557", "#8a4fa3", "#b8860b", "#c2396b", "#4b5563"),
)
DARK = Theme(
    paper="#15181c",
    panel="#1e2227",
    ink="#e4e7eb",
    muted="#9aa4af",
    line="#343a41",
    accent="#6fb0ee",
    good="#5cc182",
    warn="#e0a244",
    bad="#ff7b6e",
    faint="#59626c",
    low="#1c2a3a",
    high="#9fd0ff",
    series=("#6fb0ee", "#f0935a", "#63c08b", "#c393dc", "#dcb64a", "#f07fa8", "#a3adb8"),
)
