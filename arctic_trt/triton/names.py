"""Names of the models of a repository."""

from __future__ import annotations

PREPROCESSING, ENGINE, POSTPROCESSING = "preprocessing", "arctic", "postprocessing"
ENSEMBLE, BLS, GATE = "ensemble", "arctic_bls", "arctic_gate"
INNER = f"{BLS}-"
"""How the ids of the requests begin that ``arctic_bls`` sends to ``arctic``."""
