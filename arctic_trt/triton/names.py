"""Names of the models of a repository."""

from __future__ import annotations

PREPROCESSING, ENGINE, POSTPROCESSING = "preprocessing", "arctic", "postprocessing"
ENSEMBLE, BLS, GATE = "ensemble", "arctic_bls", "arctic_gate"
