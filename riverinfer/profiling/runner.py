"""Run the generations of a profile: unobserved ones for the latencies, others with clocks for where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from riverinfer.errors import InvalidRequestError
from riverinfer.memory_report import measure
from riverinfer.outputs import Output
from riverinfer.profiling.instrument import Instruments, Watch
from riverinfer.profiling.limits import token_limit
from riverinfer.profiling.probe import probe
from riverinfer.profiling.ranges import Ranges
from riverinfer.profiling.recorder import cost_of_a_mark
from riverinfer.profiling.result import Breakdown, Machine, ModeProfile, Run
from riverinfer.profiling.spans import Recording, totals
from riverinfer.progress import Progress
from riverinfer.river import RiverOptions
from riverinfer.sampling import SamplingParams, check_integer
from riverinfer.sequence import TokenSequence

if TYPE_CHECKING:
    from riverinfer.engine import Engine

PAIRS = 3  # generations with clocks, each next to one without: what the clocks cost


@dataclass(frozen=True)
class Workload:
    """What is generated: ``new_tokens`` after ``prompt_len`` ids after ``context`` cached ones, past any end of text.

    batch: sequences side by side, each with a text of its own; without a context. runs: measured generations of each
    mode, the modes taking turns; warmup: as many before them do not count. temperature 0 is greedy; run i draws with
    seed + i. Raises InvalidRequestError for values out of range.
    """

    prompt_len: int = 128
    new_tokens: int = 128
    context: int = 0
    batch: int = 1
    runs: int = 5
    warmup: int = 1
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("prompt_len", 1), ("new_tokens", 2), ("context", 0), ("batch", 1), ("runs", 1), ("warmup", 0),
        ):  # fmt: skip
            check_integer(name, getattr(self, name), least)
        if self.context and self.batch > 1:
            raise InvalidRequestError(
                "needs a single sequence", field="context", remedy="leave --batch or --context out"
            )
        self.params(0)

    @property
    def positions(self) -> int:
        """Of one sequence, all in all."""
        return self.context + self.prompt_len + self.new_tokens

    def params(self, run: int) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature, seed=self.seed + run, max_tokens=self.new_tokens, ignore_eos=True
        )


@dataclass(frozen=True)
class Measured:
    """peak_bytes, machine, modes: as in ``Profile``. recordings: of each mode the generation of its breakdown."""

    peak_bytes: int | None
    machine: Machine
    modes: dict[str, ModeProfile]
    recordings: list[Recording]


def profile_modes(
    engine: Engine,
    modes: Sequence[str],
    workload: Workload,
    ids: Sequence[int],
    *,
    river: RiverOptions | None = None,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Profile ``modes`` of an engine, which nobody else may use meanwhile, on ``workload.positions`` - new_tokens ids.

    ``river``: options of river mode.
    Raises InvalidRequestError for a mode that the engine was not loaded for, and for contexts and batches that it
    cannot hold.
    """
    if workload.positions > engine.ctx_size:
        raise InvalidRequestError(
            f"{workload.positions} positions do not fit into the context of {engine.ctx_size}",
            remedy="lower --context, --prompt-len or --new-tokens",
        )
    runner = _Runner(engine, workload, list(ids), ranges or Ranges())
    hows = {mode: river if mode == "river" else None for mode in modes}
    for mode, options in hows.items():
        engine.choose_mode(mode, options)
    total = (workload.runs + workload.warmup + 2 * PAIRS + 1) * len(modes)
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("profiling", done, total, "generations")

    runs: dict[str, list[Run]] = {mode: [] for mode in modes}
    with runner:
        for number in range(-workload.warmup, workload.runs):
            first = number % len(modes)
            for mode in [*modes[first:], *modes[:first]]:
                run = runner.run(mode, hows[mode], max(0, number))
                if number >= 0:
                    runs[mode].append(run)
                told()
        peak = measure(engine.model.device)[1]
        machine = probe(engine.model.device, engine.model.dtype)  # after the peaks: it takes memory itself
        found, recordings = {}, []
        for mode in modes:
            breakdown, recording = runner.breakdown(mode, hows[mode], told)
            recordings.append(recording)
            reading = workload.context + workload.prompt_len + workload.new_tokens / 2  # positions, on average
            found[mode] = ModeProfile(
                mode=mode,
                label=_label(engine, mode, river, workload.batch),
                runs=tuple(runs[mode]),
                limit=token_limit(engine, mode, runs[mode], machine, positions=reading, batch=workload.batch),
                breakdown=breakdown,
            )
    return Measured(peak, machine, found, recordings)


class _Runner:
    """Generations on one engine. A context manager: it holds the slot with the context."""

    def __init__(self, engine: Engine, workload: Workload, ids: list[int], ranges: Ranges) -> None:
        self._engine, self._workload, self._ranges = engine, workload, ranges
        self._ids = ids
        self._sequence = TokenSequence(engine.model, engine.ctx_size)
        self._instruments = Instruments(engine, ranges)

    def __enter__(self) -> _Runner:
        if self._workload.batch == 1:
            self._engine.slots.acquire(self._sequence)
        if self._workload.context:
            self._engine.extend(self._sequence, self._ids[: self._workload.context])
        return self

    def __exit__(self, *_: object) -> None:
        self._instruments.close()
        if self._workload.batch == 1:
            self._engine.slots.release(self._sequence, keep=False)

    def run(self, mode: str, river: RiverOptions | None, number: int) -> Run:
        """One generation with a clock at each token and nothing else."""
        with self._ranges.of(f"{mode} run {number}"):
            if self._workload.batch > 1:
                return self._batch(mode, river, number, None)
            return self._single(mode, river, number, None)

    def breakdown(self, mode: str, river: RiverOptions | None, told: Callable[[], None]) -> tuple[Breakdown, Recording]:
        """Of several generations with clocks the one of median length, and what the clocks cost."""
        generate = self._batch if self._workload.batch > 1 else self._single
        found: list[tuple[Breakdown, Recording]] = []
        overheads = []
        instruments = self._instruments
        with instruments.attached() as watch:
            generate(mode, river, 0, watch)  # compiles
        told()
        for _ in range(PAIRS):
            with instruments.stepping():
                plain = self.run(mode, river, 0)
            told()
            with instruments.attached() as watch:
                timed = generate(mode, river, 0, watch)
            told()
            overheads.append(sum(timed.intervals_s) / sum(plain.intervals_s) - 1)
            found.append(self._told(mode, watch, timed))
        found.sort(key=lambda each: each[0].decode_s)
        breakdown, recording = found[PAIRS // 2]
        return replace(breakdown, overhead=median(overheads)), recording

    def _told(self, mode: str, watch: Watch, timed: Run) -> tuple[Breakdown, Recording]:
        spans, device = watch.recorder.spans(), self._engine.model.device
        steps = tuple(b - a for a, b in pairwise(watch.ends))
        breakdown = Breakdown(
            operators=totals(spans),
            total_s=timed.total_s,
            decode_s=sum(timed.intervals_s),
            step_s=steps,
            tokens=timed.new_tokens - self._workload.batch,
            overhead=0.0,
            mark_s=cost_of_a_mark(device),
            events=watch.recorder.events,
        )
        return breakdown, Recording(mode, spans, tuple(watch.tokens), str(device))

    def _single(self, mode: str, river: RiverOptions | None, number: int, watch: Watch | None) -> Run:
        engine, sequence, output = self._engine, self._sequence, Output()
        sequence.truncate(self._workload.context)
        params = self._workload.params(number)
        began = time.perf_counter() if watch is None else watch.start()
        how = engine.choose_mode(mode, river)
        steps = engine.run(sequence, self._ids, params, output, began=began, how=how)
        times: list[float] = []
        while True:
            with self._ranges.of(f"token {len(times)}"):
                if next(steps, None) is None:
                    break
            times.append(time.perf_counter())
        stats = output.stats
        return _run([output], began, times, stats.prefill_s, stats.prompt_tokens - stats.cached_tokens)

    def _batch(self, mode: str, river: RiverOptions | None, number: int, watch: Watch | None) -> Run:
        """Side by side. The end of a step is when its last sequence has its token."""
        engine, batch, ids = self._engine, self._workload.batch, self._ids
        prompts = [ids[i:] + ids[:i] for i in range(batch)]
        times: list[float] = []
        plain = engine.generation

        def generation(*args: Any, **options: Any) -> Any:
            made = plain(*args, **options)
            step = made.step

            def stepped(*args: Any, **options: Any) -> Any:
                said = step(*args, **options)
                times.append(time.perf_counter())
                return said

            made.step = stepped  # type: ignore[method-assign]
            return made

        engine.generation = generation  # type: ignore[method-assign]
        try:
            began = time.perf_counter() if watch is None else watch.start()
            outputs = engine.generate_batch(prompts, self._workload.params(number), mode=mode, river=river)
        finally:
            if watch is None:
                del engine.generation
            else:
                engine.generation = plain  # type: ignore[method-assign]
        read = sum(output.stats.prefill_s for output in outputs)
        return _run(outputs, began, times[batch - 1 :: batch], read, len(ids) * batch)


def _run(outputs: Sequence[Output], began: float, times: Sequence[float], prefill_s: float, prompt: int) -> Run:
    """``times``: ends of steps, seconds of ``time.perf_counter``."""
    drafts = [output.stats.drafts for output in outputs if output.stats.drafts is not None]
    agreements = [each.agreement for each in drafts if each.agreement is not None]
    return Run(
        ttft_s=times[0] - began,
        prefill_s=prefill_s,
        total_s=times[-1] - began,
        intervals_s=tuple(b - a for a, b in pairwise(times)),
        prompt_tokens=prompt,
        new_tokens=sum(output.stats.new_tokens for output in outputs),
        exit_depths=tuple(depth for output in outputs for depth in output.exit_depths),
        rounds=sum(each.rounds for each in drafts),
        drafted=sum(sum(each.drafted.values()) for each in drafts),
        river_drafted=sum(each.drafted.get("river", 0) for each in drafts),
        accepted=sum(sum(each.accepted.values()) for each in drafts),
        agreement=fmean(agreements) if agreements else None,
        draft_s=sum(each.draft_s for each in drafts),
        verify_s=sum(each.verify_s for each in drafts),
        repeats=fmean(repeated(output.token_ids) for output in outputs),
    )


def repeated(ids: Sequence[int], length: int = 4) -> float:
    """The share of a text's runs of ``length`` tokens that stood in it before."""
    grams = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _label(engine: Engine, mode: str, river: RiverOptions | None, batch: int) -> str:
    if mode == "river":
        options = river or engine.river_options
        if options.gate == "similarity":
            return f"river, tau {options.tau}"
        return f"river, gate {options.gate}" if options.gate != "fixed" else f"river, depth {options.min_depth}"
    if mode == "lossless" and batch > 1:
        return "lossless, no drafts side by side"
    if mode == "lossless" and not engine.model.river:
        return "lossless, drafts looked up only"
    return mode
