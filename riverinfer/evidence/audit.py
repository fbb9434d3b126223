"""What an audit found, as data alone, and its JSON form.

``riverinfer.audit/3`` is the tree of dataclasses below, field by field: objects by name, tuples as lists, null for what
is undefined. Under one version fields may be added, none changes its meaning. KL is in nats a token, shares are 0 to 1,
depths count backbone layers, seconds and tokens/s are of this machine. Properties (verdicts) are not in it; the
sentences in ``findings`` are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from riverinfer.errors import InvalidRequestError
from riverinfer.evidence.better_gates import BetterGates
from riverinfer.evidence.controls import Comparison
from riverinfer.evidence.drift import DRIFT_TEXTS, Drift
from riverinfer.evidence.gate_error_summary import GateError
from riverinfer.evidence.quality import Floor, Quality
from riverinfer.evidence.statistics import Interval
from riverinfer.evidence.survival import Survival
from riverinfer.evidence.sweep import Point
from riverinfer.gates import SimilarityGate
from riverinfer.json_tree import load_tree, to_tree
from riverinfer.sampling import check_integer

SCHEMA = "riverinfer.audit/3"
DRIFT_TOKENS = 2048


@dataclass(frozen=True)
class AuditSettings:
    """How much is measured.

    tokens: of each answer at most; it ends where exact's does. taus: of the sweep, beside the audited setting.
    shuffles: of each gate's depths. samples: tokens a prompt that are forced out, at ``exits`` depths (None: after
    every layer). floor_prompts:
    how many are held against exact itself. drift_tokens, drift_texts: length and number of long texts, and the length
    up to which texts are watched for their first other token; 0 tokens: no drift; None: ``DRIFT_TOKENS``, or what the
    context holds. Growth can be told of ``DRIFT_TEXTS`` texts at least. repair: R, every so many tokens. gates: whether
    candidate gates are tried.
    Raises InvalidRequestError for values out of range.
    """

    tokens: int = 40
    taus: tuple[float, ...] = (0.9, 0.95, 0.97, 0.98)
    shuffles: int = 2
    samples: int = 8
    exits: int | None = None
    floor_prompts: int = 4
    drift_tokens: int | None = None
    drift_texts: int = DRIFT_TEXTS
    repair: int = 16
    gates: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("tokens", 4), ("shuffles", 1), ("samples", 1), ("floor_prompts", 1)):
            check_integer(name, getattr(self, name), low)
        for name in ("drift_texts", "seed"):
            check_integer(name, getattr(self, name), 0)
        check_integer("repair", self.repair, 1)
        for tau in self.taus:
            SimilarityGate(tau)  # refuses what is no threshold
        if self.exits is not None:
            check_integer("exits", self.exits, 1)
        if self.drift_tokens is not None:
            check_integer("drift_tokens", self.drift_tokens, 0)
            if 0 < self.drift_tokens < 4:
                problem = f"is {self.drift_tokens}"
                raise InvalidRequestError(problem, field="drift_tokens", remedy="give 0, or 4 and more")


@dataclass(frozen=True)
class FreeRunning:
    """River mode on its own, greedily: what it says leads its own text on.

    own_text: teacher-forced quality over the text that *river* said, as long as exact's and past its own end, so that
    its perplexity_ratio is how much less likely than exact river finds its own words (below 1: likelier). same_tokens:
    share of tokens that are exact's at their place. likelihood_ratio: exact's perplexity on river's text over exact's
    perplexity on exact's text.
    river, repaired: when texts part from exact's, without repair and with, watched for longer than ``tokens``.
    parted_unrepaired: how many of the latter parted before their first repair.
    """

    own_text: Quality
    same_tokens: Interval
    likelihood_ratio: Interval
    river: Survival
    repaired: Survival
    parted_unrepaired: int


@dataclass(frozen=True)
class Audit:
    """environment, model: for people, and for telling whether two audits compare. settings: ``AuditSettings`` and the
    river's. seconds: what the audit took. prompts: the texts. gate: the audited setting, for people.

    quality: teacher-forced, over exact's greedy text. comparisons: the audited setting against its controls, then the
    taus of the sweep. points: of the Pareto plot. lossless_same: on how many prompts lossless mode said exact's text.
    drift, better: None if they were not asked for. findings: the outcome in plain sentences.
    """

    environment: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    seconds: float
    prompts: tuple[str, ...]
    gate: str
    quality: Quality
    floor: Floor
    free_running: FreeRunning
    gate_error: GateError
    comparisons: tuple[Comparison, ...]
    points: tuple[Point, ...]
    lossless_same: int
    drift: Drift | None
    better: BetterGates | None
    findings: tuple[str, ...]

    def as_json(self) -> str:
        """The JSON text, with a line break at its end."""
        tree = {"schema": SCHEMA, **to_tree(self)}
        return json.dumps(tree, allow_nan=False, ensure_ascii=False) + "\n"


def load_audit(path: Path) -> Audit:
    """Read an audit's JSON file. Raises InvalidRequestError for what is none, or of another version."""
    return load_tree(path, Audit, SCHEMA, "riverinfer audit --save", nan=True)
