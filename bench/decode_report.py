"""The tables of the decode benchmark."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from contenders import Request, Timed
from harness import color, median_interval
from prompts import Prompt

from riverinfer import Engine
from riverinfer.sequence import TokenSequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, dict[Prompt, list[Timed]]]  # by contender and prompt, a run each
Rates = dict[str, list[float]]  # tokens/s by kind, a run each


def rates_by_kind(by_prompt: dict[Prompt, list[Timed]], requests: dict[Prompt, Request]) -> Rates:
    """All tokens after the first over all their seconds."""
    rates: Rates = {}
    for kind in dict.fromkeys(prompt.kind for prompt in by_prompt):
        members = [prompt for prompt in by_prompt if prompt.kind == kind]
        tokens = sum(requests[prompt].count - 1 for prompt in members)
        runs = zip(*(by_prompt[prompt] for prompt in members), strict=True)
        rates[kind] = [tokens / sum(timed.seconds for timed in run) for run in runs]
    return rates


def speed_rows(record: Record, requests: dict[Prompt, Request], exact: str, reference: str) -> list[list[str]]:
    """A row a contender; a dash where it or the reference did not take part.

    The last column is the geometric mean over the kinds that the contender wrote, against the same of ``reference``.
    """
    rates = {name: rates_by_kind(by_prompt, requests) for name, by_prompt in record.items()}
    rows = []
    for name, by_kind in rates.items():
        row = [name]
        for kind, base in rates[exact].items():
            if kind not in by_kind:
                row.append("–")
                continue
            values = by_kind[kind]
            ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
            row.append(f"{statistics.median(values):.1f} ({min(values):.1f}..{max(values):.1f}) {ratio:.2f}x")
        if reference in rates:
            by_run = zip(
                *([a / b for a, b in zip(by_kind[kind], rates[reference][kind], strict=True)] for kind in by_kind),
                strict=True,
            )
            row.append(f"{statistics.median(statistics.geometric_mean(run) for run in by_run):.2f}")
        else:
            row.append("–")
        rows.append(row)
    return rows


def draw_speed(record: Record, requests: dict[Prompt, Request]) -> Callable[[Axes], None]:
    """Bars of tokens/s by kind and contender: medians over runs with 95 % intervals."""

    def draw(axes: Axes) -> None:
        kinds = list(dict.fromkeys(prompt.kind for prompt in requests))
        width = 0.85 / len(record)
        for number, (name, by_prompt) in enumerate(record.items()):
            rates = rates_by_kind(by_prompt, requests)
            places = [kinds.index(kind) + (number - (len(record) - 1) / 2) * width for kind in rates]
            medians, lows, highs = zip(*map(median_interval, rates.values()), strict=True)
            errors = [[a - b for a, b in zip(x, y, strict=True)] for x, y in ((medians, lows), (highs, medians))]
            axes.bar(places, medians, width, yerr=errors, color=color(name), label=name, error_kw={"linewidth": 0.8})
        axes.set_xticks(range(len(kinds)), kinds)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("tokens/s (median, 95 % interval)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw


def lossless_rows(record: Record, requests: dict[Prompt, Request]) -> list[list[str]]:
    """A row for each contender that drafts and each kind, over all runs.

    The first token of an answer, which comes with the prompt, is in no round; agreement is that of the river.
    """
    rows = []
    for name, by_prompt in record.items():
        for kind in dict.fromkeys(prompt.kind for prompt in by_prompt):
            outputs = [
                timed.output
                for prompt, runs in by_prompt.items()
                for timed in runs
                if prompt.kind == kind and timed.output is not None
            ]
            drafts = [output.stats.drafts for output in outputs if output.stats.drafts is not None]
            if not drafts:
                continue
            tokens = sum(output.stats.new_tokens - 1 for output in outputs)
            pairs = [pair for each in drafts for pair in each.by_position.values()]
            judged = sum(pair[1] for pair in pairs)
            sources = Counter(source for output in outputs for source in output.sources[1:])
            shares = [f"{sources[source] / tokens * 100:.0f}" for source in ("river", "lookup", "backbone")]
            agreement = f"{sum(pair[0] for pair in pairs) / judged * 100:.1f}" if judged else "–"
            rows.append([name, kind, f"{tokens / sum(each.rounds for each in drafts):.2f}", agreement, *shares])
    return rows


def worst_prompt(record: Record, name: str, exact: str) -> tuple[Prompt, float]:
    """The prompt on which a contender gains least over ``exact``, and its median ratio over runs."""
    ratios = {
        prompt: statistics.median(b.seconds / a.seconds for a, b in zip(runs, record[exact][prompt], strict=True))
        for prompt, runs in record[name].items()
    }
    return min(ratios.items(), key=lambda item: item[1])


@dataclass
class Difference:
    """A text that is not exact mode's: the first other token, and how far exact mode's two highest logits are apart.

    A sampled token does not follow from these two alone.
    """

    prompt: str
    sampled: bool
    position: int
    gap: float


@dataclass
class Equality:
    """How many prompts a contender answered with exact mode's own ids, in every run."""

    prompts: int = 0
    equal: int = 0
    differences: list[Difference] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_texts(engine: Engine, requests: dict[Prompt, Request], record: Record, name: str, exact: str) -> Equality:
    found = Equality()
    for prompt, runs in record[name].items():
        wanted = _ids(record[exact][prompt][0])
        others = [ids for ids in map(_ids, [*runs, *record[exact][prompt]]) if ids != wanted]
        found.prompts += 1
        found.equal += not others
        if others:
            position = min(_parting(wanted, ids) for ids in others)
            gap = _gap(engine, requests[prompt].ids, wanted[:position])
            found.differences.append(Difference(f"{prompt.kind}, {prompt.name}", prompt.sampled, position, gap))
    return found


def _ids(timed: Timed) -> list[int]:
    assert timed.output is not None
    return timed.output.token_ids


def _parting(a: list[int], b: list[int]) -> int:
    """Index of the first token that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _gap(engine: Engine, prompt: list[int], said: list[int]) -> float:
    """Between the two highest logits after ``said``, computed token by token as exact mode does."""
    sequence = TokenSequence(engine.model, engine.ctx_size)
    engine.slots.acquire(sequence)
    try:
        logits = engine.extend(sequence, prompt)
        for token in said:
            logits = engine.extend(sequence, [token])
        best = logits[0].topk(2).values
        return float(best[0] - best[1])
    finally:
        engine.slots.release(sequence, keep=False)
