"""The paper's main table on this machine: each question to exact, river, full river and lossless mode, greedily."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from riverinfer.evidence.benchmark import Benchmark, ask
from riverinfer.evidence.paired import Paired, Share, mcnemar, wilson
from riverinfer.evidence.paper_figures import DOUBT, SOURCE, paper_rows
from riverinfer.evidence.statistics import Interval, paired
from riverinfer.progress import Progress
from riverinfer.river import RiverOptions

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.outputs import Output

WAYS = ("exact", "river", "full river", "lossless")
"""exact: the backbone. river: exits above tau. full river: no backbone layer. lossless: drafts, verified.

Prompts are exact in all.
"""


@dataclass(frozen=True)
class Settings:
    """What all ways share, and what "river" exits by.

    tau: one number, or one a layer. certified: a calibration's, see ``riverinfer.evidence.certificate``.
    max_depth: None, no limit. river, river_head: the copy, and whose logits tokens in it get. max_tokens: of an answer.
    """

    tau: float | Sequence[float]
    certified: bool
    min_depth: int
    max_depth: int | None
    river: str
    river_head: str
    chat: bool
    max_tokens: int

    @classmethod
    def of(cls, engine: Engine, *, certified: bool, chat: bool, max_tokens: int) -> Settings:
        """Those of an engine as it is loaded: where no kernel reads a quantized head, "exact" is what is used."""
        options = engine.river_options
        return cls(
            tau=options.tau,
            certified=certified,
            min_depth=options.min_depth,
            max_depth=options.max_depth,
            river=str(engine.river_settings),
            river_head="exact" if engine.model.river_head is None else "quantized",
            chat=chat,
            max_tokens=max_tokens,
        )


@dataclass
class Answers:
    """What one way said to all questions of a benchmark, in their order.

    tokens, seconds, depths: of each answer after its first token, which the prompt's exact pass predicts; the last
    of all answers, tokens by backbone layers passed.
    """

    way: str
    texts: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cut_off: int = 0
    depths: Counter[int] = field(default_factory=Counter)

    def add(self, output: Output) -> None:
        """One more answer."""
        stats = output.stats
        self.texts.append(output.text)
        self.tokens.append(max(0, stats.new_tokens - 1))
        self.seconds.append(stats.decode_s)
        self.cut_off += output.finish_reason == "length"
        self.depths.update(output.exit_depths[1:])

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each answer, 0 where nothing was timed."""
        return [n / s if n and s else 0.0 for n, s in zip(self.tokens, self.seconds, strict=True)]


@dataclass(frozen=True)
class Row:
    """One way on one benchmark.

    against_exact: the right answers, None for exact itself. speedup: over exact, the geometric mean over questions of
    the ratio of tokens per second, None where no question could be timed. mean_depth: backbone layers a token; in
    lossless mode None, it passes all while being verified. same_texts: answers that are exact's, letter for letter.
    cut_off: answers that met the limit of tokens.
    """

    way: str
    accuracy: Share
    against_exact: Paired | None
    tokens_per_s: float
    speedup: Interval | None
    mean_depth: float | None
    same_texts: int
    cut_off: int


@dataclass(frozen=True)
class Measured:
    """One benchmark on this machine, a row a way."""

    benchmark: Benchmark
    rows: list[Row]
    answers: list[Answers]

    @property
    def lossless_differs(self) -> list[str]:
        """Names of questions that lossless mode answered otherwise than exact mode."""
        by_way = {answers.way: answers.texts for answers in self.answers}
        pairs = zip(self.benchmark.items, by_way["exact"], by_way["lossless"], strict=True)
        return [item.name for item, exact, lossless in pairs if exact != lossless]


def measure(
    engine: Engine,
    benchmark: Benchmark,
    *,
    chat: bool = True,
    max_tokens: int = 256,
    progress: Progress | None = None,
) -> Measured:
    """Ask every question in all ``WAYS``, one after the other and each time with another first; then have it scored.

    The engine needs a river (``mode="river"``, or lossless with ``draft="river"``); "river" takes its own options.
    Raises what ``Engine.generate`` and ``benchmark.score`` raise.
    """
    modes = {way: "river" if way == "full river" else way for way in WAYS}
    rivers = {way: RiverOptions(gate="always") if way == "full river" else None for way in WAYS}
    found = {way: Answers(way) for way in WAYS}
    for number, item in enumerate(benchmark.items):
        if progress is not None:
            progress(benchmark.name, number, len(benchmark.items), "questions")
        ids, params = ask(engine, item, chat=chat, max_tokens=max_tokens)
        if not number:
            for way in WAYS:  # what is done once, compiling and paging in, is no way's own cost
                engine.generate(ids, replace(params, max_tokens=min(8, max_tokens)), mode=modes[way], river=rivers[way])
        turn = number % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            found[way].add(engine.generate(ids, params, mode=modes[way], river=rivers[way]))
    if progress is not None:
        progress(benchmark.name, len(benchmark.items), len(benchmark.items), "questions")
    for answers in found.values():
        answers.right = benchmark.score(answers.texts, answers.way)
    layers = engine.config.num_layers
    return Measured(benchmark, [_row(found[way], found["exact"], layers) for way in WAYS], list(found.values()))


def _row(answers: Answers, exact: Answers, layers: int) -> Row:
    alone = answers is exact
    depths = answers.depths
    depth = sum(d * n for d, n in depths.items()) / depths.total() if depths else None
    seconds = sum(answers.seconds)
    return Row(
        way=answers.way,
        accuracy=wilson(sum(answers.right), len(answers.right)),
        against_exact=None if alone else mcnemar(exact.right, answers.right),
        tokens_per_s=sum(answers.tokens) / seconds if seconds else 0.0,
        speedup=None if alone else _speedup(answers.rates, exact.rates),
        mean_depth=float(layers) if alone else depth,
        same_texts=sum(a == b for a, b in zip(answers.texts, exact.texts, strict=True)),
        cut_off=answers.cut_off,
    )


def _speedup(rates: Sequence[float], exact: Sequence[float]) -> Interval | None:
    timed = [(math.log(a), math.log(b)) for a, b in zip(rates, exact, strict=True) if a and b]
    if not timed:
        return None
    return paired([a for a, _ in timed], [b for _, b in timed]).exp()


def as_dict(model: str, measured: Sequence[Measured], settings: Settings) -> dict[str, Any]:
    """Everything as JSON types, the paper's rows and each answer included."""

    def questions(each: Measured) -> Iterator[dict[str, Any]]:
        for number, item in enumerate(each.benchmark.items):
            yield {
                "name": item.name,
                "answers": {a.way: {"text": a.texts[number], "right": a.right[number]} for a in each.answers},
            }

    return {
        "schema": "riverinfer.paper/1",
        "model": model,
        "settings": asdict(settings),
        "paper": f"{SOURCE}; {DOUBT}",
        "benchmarks": [
            {
                "name": each.benchmark.name,
                "source": each.benchmark.source,
                "shots": each.benchmark.shots,
                "here": [asdict(row) for row in each.rows],
                "paper": [asdict(row) for row in paper_rows(model, each.benchmark.name)],
                "lossless_differs": each.lossless_differs,
                "questions": list(questions(each)),
            }
            for each in measured
        ],
    }
