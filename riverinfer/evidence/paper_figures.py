"""The main table of River-LLM, Shen & Zou, ACL 2026, arXiv 2604.18396: the only place that has the paper's figures.

Second-hand readings of v1 (2026-04-20): one NVIDIA A40, batch 1; tau 0.5 for Llama, 0.8 to 0.9 for the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SOURCE = "arXiv 2604.18396 v1, one A40, batch 1"
DOUBT = "second-hand readings, not checked against the paper itself"
SHOTS = {"GSM8K": 5, "MATH": 4, "HumanEval": 0}
"""Solved examples before each question."""


@dataclass(frozen=True)
class PaperRow:
    """One model on one benchmark; accuracies in percent, None where no figure was found.

    backbone: 16 bits. full_w4: every layer in 4 bits. river: tokens exit. tokens_per_s, speedup: of ``river``, the
    latter over the backbone.
    """

    model: str
    benchmark: str
    backbone: float | None = None
    full_w4: float | None = None
    river: float | None = None
    tokens_per_s: float | None = None
    speedup: float | None = None


ROWS = (
    PaperRow("Llama3.2-1B", "GSM8K", 33.2, 25.1, 29.3, 182.9, 2.16),
    PaperRow("Llama3.2-1B", "MATH", 17.8, 12.2, 14.6, 189.2, 1.88),
    PaperRow("Llama3.2-1B", "HumanEval", None, None, 23.2, 171.8, 1.71),
    PaperRow("Llama3.1-8B", "GSM8K", 78.2, 69.8, 74.4, 45.0, 1.78),
    PaperRow("Llama3.1-8B", "MATH", None, None, 26.6, 43.1, 1.72),
    PaperRow("Llama3.1-8B", "HumanEval", 57.3, 50.2, 55.5, 44.7, 1.77),
    PaperRow("Phi4-mini", "GSM8K", None, None, 81.0, 115.0, 1.61),
    PaperRow("Ministral3-8B", "GSM8K", None, None, 84.3, 61.8, 1.77),
    PaperRow("Ministral3-8B", "MATH", 48.1, 46.0, 46.6, None, 1.85),
)


def paper_rows(model: str, benchmark: str) -> list[PaperRow]:
    """The paper's rows of a benchmark: of the model that a folder's name names, else of all."""
    name = _plain(model)
    rows = [row for row in ROWS if row.benchmark == benchmark]
    named = [row for row in ROWS if _plain(row.model) in name]
    return [row for row in rows if row in named] if named else rows


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
