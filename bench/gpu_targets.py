"""What the GPU path is to reach, and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpu_models import LLAMA_1B, LLAMA_8B
from gpu_run import Results, failure

BIG, SMALL = LLAMA_8B.name, LLAMA_1B.name
PEER = f"{SMALL}, random weights"


@dataclass(frozen=True)
class Target:
    """``measured`` raises KeyError or TypeError where something was not measured. at_most: less is better."""

    name: str
    bound: float
    measured: Callable[[Results], float]
    at_most: bool = False
    percent: bool = False

    def row(self, results: Results) -> tuple[str, str, str, str]:
        """Name, bound, measured, verdict."""
        sign = "<=" if self.at_most else ">="
        try:
            value = self.measured(results)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return self.name, f"{sign} {self._show(self.bound)}", "", "not measured"
        met = value <= self.bound if self.at_most else value >= self.bound
        return self.name, f"{sign} {self._show(self.bound)}", self._show(value), "met" if met else "NOT met"

    def _show(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.2f}"


def _step(model: str, name: str, field: str = "ms") -> Callable[[Results], float]:
    return lambda results: float(results["steps"][f"{model} {name}"][field])


def _faster(model: str, name: str) -> Callable[[Results], float]:
    """Exact steps in the time of one of these."""
    exact, other = _step(model, "exact"), _step(model, name)
    return lambda results: exact(results) / other(results)


def _kernel(model: str, matrix: str, kind: str) -> Callable[[Results], float]:
    return lambda results: float(results["kernels"][f"{model} {matrix} 1 {kind}"]["us"])


def _ahead(results: Results) -> float:
    """torch's time over ours, where that is least."""
    return min(
        _kernel(BIG, matrix, "torch int4")(results) / _kernel(BIG, matrix, "4-bit")(results)
        for matrix in LLAMA_8B.matrices
    )


def _packed_share(results: Results) -> float:
    found = results["kernels"][f"{BIG} gate_up 1 4-bit"]
    return float(found["floor_us"]) / float(found["us"])


def _over_peer(way: str) -> Callable[[Results], float]:
    def ratio(results: Results) -> float:
        rate = float(results["peers"][f"{PEER} {way}"]["tokens_per_s"])
        return 1000 / _step(SMALL, "exact")(results) / rate

    return ratio


def _text_over_peer(way: str) -> Callable[[Results], float]:
    def ratio(results: Results) -> float:
        peers = {name: each for name, each in results["peers"].items() if name.endswith(way) and PEER not in name}
        (rate,) = (float(each["tokens_per_s"]) for each in peers.values() if not failure(each))
        return float(results["text"]["summary"]["kinds"]["all"]["tokens_per_s"]["lossless"]) / rate

    return ratio


def _checks(results: Results) -> float:
    found = results["checks"]
    return sum(each["passed"] for each in found) / len(found)


def _equal(results: Results) -> float:
    summary = results["text"]["summary"]
    return float(summary["equal"]) / float(summary["texts"])


TARGETS = (
    Target("checks passed", 1.0, _checks, percent=True),
    Target("lossless texts equal to exact's", 1.0, _equal, percent=True),
    Target("8B exact step, of copy bandwidth", 0.85, _step(BIG, "exact", "share"), percent=True),
    Target("8B river, mean depth 3.5, x exact", 2.1, _faster(BIG, "river, depth 3.5")),
    Target("packed linear 28672x4096, of copy bandwidth", 0.80, _packed_share, percent=True),
    Target("packed linears of 8B, x torch's int4, the least", 1.0, _ahead),
    Target("1B exact step, of copy bandwidth", 0.78, _step(SMALL, "exact", "share"), percent=True),
    Target("1B river, mean depth 3.5, x exact", 1.7, _faster(SMALL, "river, depth 3.5")),
    Target("8B verify 4, exact steps", 1.05, lambda r: 1 / _faster(BIG, "verify 4")(r), at_most=True),
    Target("8B verify 8, exact steps", 1.05, lambda r: 1 / _faster(BIG, "verify 8")(r), at_most=True),
    Target("1B exact, x transformers eager", 4.0, _over_peer("eager")),
    Target("1B exact, x transformers compiled", 1.3, _over_peer("compiled")),
    Target("model folder lossless, x transformers eager", 4.0, _text_over_peer("eager")),
    Target("model folder lossless, x transformers compiled", 1.3, _text_over_peer("compiled")),
)


def rows(results: Results) -> list[tuple[str, str, str, str]]:
    return [target.row(results) for target in TARGETS]
