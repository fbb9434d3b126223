"""Recordings as a trace for Perfetto, chrome://tracing or speedscope.

Format: "Trace Event Format", JSON object form, with complete (X), instant (i) and metadata (M) events:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from riverinfer.heat_map import token_label
from riverinfer.profiling.spans import Recording, Span, TokenSpan

Event = dict[str, Any]
Clock = Callable[[float], float]

# Ticks of 1/8 us are exact as binary fractions and in whole nanoseconds, the unit of Perfetto: in every reader what
# ends where another begins meets it exactly. Readers drop or misplace spans that overlap by a rounding error.
TICKS_PER_SECOND = 8_000_000


def trace_json(recordings: Sequence[Recording], *, model: str, environment: Mapping[str, Any]) -> str:
    """The trace as one line of JSON, to be written as UTF-8.

    Times are microseconds from each recording's first begin, in steps of 1/8.

    A process is a recording. Its first row is the compute stream: phases (each step anew), in them layers, in them
    operators; an instant "exit" where the river takes over from the backbone. Then a row a sequence, with its tokens
    and an "exit" in each that left the backbone early. Events are in order of time, those that enclose others first.
    model, environment: for "otherData". Surrogates that are no pair become U+FFFD.
    """
    ids = count(1)  # processes and threads share them: to Perfetto a thread with its process's id is the main thread
    events: list[Event] = []
    for order, recording in enumerate(recordings):
        events += _process(recording, order, ids)
    events.sort(key=lambda event: (event["ph"] != "M", event["ts"]))  # stable: parents stay before children
    known = {"model": model, **environment}
    trace = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {_clean(str(name)): _clean(str(value)) for name, value in known.items() if value is not None},
    }
    # Perfetto shows the escapes of other letters than ASCII as they are.
    return json.dumps(trace, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def _process(recording: Recording, order: int, ids: Iterator[int]) -> Iterator[Event]:
    start = min([span.begin for span in recording.spans] + [token.begin for token in recording.tokens], default=0.0)

    def clock(seconds: float) -> float:
        return round((seconds - start) * TICKS_PER_SECOND) / 8

    pid = next(ids)
    yield _meta(pid, pid, "process_name", name=_clean(recording.mode))
    yield _meta(pid, pid, "process_sort_index", sort_index=order)
    sequences = sorted({token.sequence for token in recording.tokens})
    names = ["cpu" if recording.device == "cpu" else f"{recording.device.partition(':')[0]} stream"]
    names += [f"sequence {sequence}" for sequence in sequences]
    rows = [next(ids) for _ in names]
    for place, (tid, name) in enumerate(zip(rows, names, strict=True)):
        yield _meta(pid, tid, "thread_name", name=_clean(name))
        yield _meta(pid, tid, "thread_sort_index", sort_index=place)
    yield from _compute(recording.spans, clock, pid, rows[0])
    tid_of = dict(zip(sequences, rows[1:], strict=True))
    layers = 1 + max((span.layer for span in recording.spans if span.layer is not None), default=-1)
    begins: dict[int, list[float]] = {}
    for span in recording.spans:
        if span.path == "river" and span.layer is not None:
            begins.setdefault(span.layer, []).append(span.begin)
    for token in recording.tokens:
        tid, depth = tid_of[token.sequence], token.exit_depth
        yield _token(token, pid, tid, clock)
        if depth is not None and depth < layers:
            at = begins.get(depth, [])
            place = bisect_left(at, token.begin)
            time = min(at[place], token.end) if place < len(at) else token.end
            yield _exit(pid, tid, depth, clock(time))


def _compute(spans: Sequence[Span], clock: Clock, pid: int, tid: int) -> Iterator[Event]:
    for phase in _split(spans, lambda last, span: last.phase != span.phase or span.op == "embed"):
        yield _complete(pid, tid, phase[0].phase, "phase", phase, clock)
        before = ""
        for layer in _split(phase, lambda last, span: (last.path, last.layer) != (span.path, span.layer)):
            first = layer[0]
            if first.layer is not None:
                if (before, first.path) == ("backbone", "river"):
                    yield _exit(pid, tid, first.layer, clock(first.begin))
                before = first.path
                name = f"layer {first.layer}" + (f", {first.path}" if first.path else "")
                yield _complete(pid, tid, name, "layer", layer, clock)
            for span in layer:
                yield _complete(pid, tid, span.op, "op", [span], clock)


def _token(token: TokenSpan, pid: int, tid: int, clock: Clock) -> Event:
    args: dict[str, Any] = {"index": token.index, "text": _clean(token.text)}
    if token.exit_depth is not None:
        args["exit depth"] = token.exit_depth
    if token.source is not None:
        args["source"] = _clean(token.source)
    name = _clean(token_label(token.text)) or "(no text)"
    return {**_complete(pid, tid, name, "token", [token], clock), "args": args}


def _split(spans: Iterable[Span], parted: Callable[[Span, Span], bool]) -> Iterator[list[Span]]:
    """Runs of spans, cut wherever ``parted`` says so of two that follow each other."""
    run: list[Span] = []
    for span in spans:
        if run and parted(run[-1], span):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def _complete(pid: int, tid: int, name: str, category: str, spans: Sequence[Span | TokenSpan], clock: Clock) -> Event:
    begin, end = clock(spans[0].begin), clock(spans[-1].end)
    return {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": begin, "dur": end - begin}


def _exit(pid: int, tid: int, depth: int, time: float) -> Event:
    event = {"ph": "i", "name": "exit", "cat": "exit", "s": "t", "pid": pid, "tid": tid, "ts": time}
    return {**event, "args": {"depth": depth}}


def _meta(pid: int, tid: int, kind: str, **args: str | int) -> Event:
    return {"ph": "M", "name": kind, "cat": "__metadata", "pid": pid, "tid": tid, "ts": 0, "args": args}


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON can spell but strict readers refuse."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
