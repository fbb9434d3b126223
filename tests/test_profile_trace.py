"""The trace is of the Trace Event Format, nests strictly, and its times are those of the spans."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import fake_profiles
import jsonschema
import pytest

from riverinfer.profiling.spans import Recording, Span, TokenSpan
from riverinfer.profiling.trace_events import trace_json

# After "Trace Event Format", chapters "JSON Object Format" and "Event Descriptions"; stricter in that nothing is let
# through that the trace has no use for.
NAMED = {"name": {"type": "string", "minLength": 1}, "cat": {"type": "string", "minLength": 1}}
PLACED = {
    "pid": {"type": "integer", "minimum": 1},
    "tid": {"type": "integer", "minimum": 1},
    "ts": {"type": "number", "minimum": 0},
}


def _event(required: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["ph", "name", "cat", "pid", "tid", "ts", *required.split()],
        "properties": {**NAMED, **PLACED, "ph": {}, **fields},
        "additionalProperties": False,
    }


def _meta(name: str, field: str, kind: str) -> dict[str, Any]:
    args = {"type": "object", "required": [field], "properties": {field: {"type": kind}}, "additionalProperties": False}
    return _event("args", name={"const": name}, args=args)


def _by(field: str, schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    cases = [{"if": {"properties": {field: {"const": key}}}, "then": schema} for key, schema in schemas.items()]
    return {"type": "object", "required": [field], "properties": {field: {"enum": [*schemas]}}, "allOf": cases}


SCHEMA = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "traceEvents": {
            "type": "array",
            "items": _by(
                "ph",
                {
                    "X": _event("dur", dur={"type": "number", "minimum": 0}, args={"type": "object"}),
                    "i": _event("s", s={"enum": ["g", "p", "t"]}, args={"type": "object"}),
                    "M": _by(
                        "name",
                        {
                            "process_name": _meta("process_name", "name", "string"),
                            "process_sort_index": _meta("process_sort_index", "sort_index", "integer"),
                            "thread_name": _meta("thread_name", "name", "string"),
                            "thread_sort_index": _meta("thread_sort_index", "sort_index", "integer"),
                        },
                    ),
                },
            ),
        },
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "otherData": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "additionalProperties": False,
}
TICK = 0.125  # us


def load(recordings: list[Recording]) -> Any:
    text = trace_json(recordings, model="m", environment={"torch": "2.13", "cores": 8, "triton": None})
    assert "\\u" not in text
    trace = json.loads(text)
    jsonschema.validate(trace, SCHEMA)
    return trace


def rows(trace: Any) -> dict[tuple[str, str], list[Any]]:
    """The events of each (process, thread), by name, in the order of the file."""
    meta = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    process = {each["pid"]: each["args"]["name"] for each in meta if each["name"] == "process_name"}
    thread = {(each["pid"], each["tid"]): each["args"]["name"] for each in meta if each["name"] == "thread_name"}
    found: dict[tuple[str, str], list[Any]] = {(process[pid], name): [] for (pid, _), name in thread.items()}
    assert len(found) == len(thread)
    assert len({*process, *(tid for _, tid in thread)}) == len(process) + len(thread)
    for event in trace["traceEvents"]:
        if event["ph"] != "M":
            found[process[event["pid"]], thread[event["pid"], event["tid"]]].append(event)
    return found


def nest(events: list[Any]) -> list[tuple[Any, list[Any]]]:
    """Each complete event with those directly in it, of one row; fails where two overlap without nesting."""
    made: list[tuple[Any, list[Any]]] = []
    open_: list[tuple[Any, list[Any]]] = []
    for event in events:
        if event["ph"] != "X":
            continue
        while open_ and open_[-1][0]["cat"] in ("op", event["cat"]):
            open_.pop()
        while open_ and event["ts"] >= open_[-1][0]["ts"] + open_[-1][0]["dur"] and event["dur"]:
            open_.pop()
        if open_:
            parent = open_[-1][0]
            assert parent["ts"] <= event["ts"]
            assert event["ts"] + event["dur"] <= parent["ts"] + parent["dur"]
            open_[-1][1].append(event)
        open_.append((event, []))
        made.append(open_[-1])
    return made


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    return [
        fake_profiles.recording("exact", tokens=2),
        fake_profiles.recording("river", tokens=5, batch=2),
        fake_profiles.recording("lossless", tokens=9),
    ]


@pytest.fixture(scope="module")
def trace(recordings: list[Recording]) -> Any:
    return load(recordings)


def test_order_rows_and_names(recordings: list[Recording], trace: Any) -> None:
    assert [*rows(trace)] == [
        ("exact", "cpu"),
        ("exact", "sequence 0"),
        ("river", "cpu"),
        ("river", "sequence 0"),
        ("river", "sequence 1"),
        ("lossless", "cpu"),
        ("lossless", "sequence 0"),
    ]
    assert trace["otherData"] == {"model": "m", "torch": "2.13", "cores": "8"}
    times = [event["ts"] for event in trace["traceEvents"]]
    assert times == sorted(times)
    assert times[-1] > 1000
    order = [e["args"]["sort_index"] for e in trace["traceEvents"] if e["name"] == "process_sort_index"]
    assert order == [0, 1, 2]


def test_the_compute_row_nests_and_adds_up(recordings: list[Recording], trace: Any) -> None:
    found = rows(trace)
    for recording in recordings:
        events = found[recording.mode, "cpu"]
        assert events[0]["ts"] == 0
        levels = {"phase": "op layer", "layer": "op", "op": ""}
        for event, children in nest(events):
            assert {child["cat"] for child in children} <= {*levels[event["cat"]].split()}
            if event["cat"] != "op":
                assert sum(child["dur"] for child in children) == event["dur"]
        ops = [event for event in events if event["cat"] == "op"]
        assert [event["name"] for event in ops] == [span.op for span in recording.spans]
        start = recording.spans[0].begin
        for event, span in zip(ops, recording.spans, strict=True):
            assert event["ts"] == pytest.approx((span.begin - start) * 1e6, abs=TICK)
            assert event["dur"] == pytest.approx((span.end - span.begin) * 1e6, abs=TICK)
        sums: dict[str, float] = defaultdict(float)
        for event in events:
            if event["cat"] == "phase":
                sums[event["name"]] += event["dur"]
        for phase, microseconds in sums.items():
            spans = [span for span in recording.spans if span.phase == phase]
            want = sum(span.end - span.begin for span in spans)
            assert microseconds == pytest.approx(want * 1e6, abs=TICK * len(spans))


def test_each_step_and_layer_is_its_own(recordings: list[Recording], trace: Any) -> None:
    names = Counter(event["name"] for event in rows(trace)["lossless", "cpu"] if event["cat"] != "op")
    assert (names["prefill"], names["draft"], names["verify"]) == (1, 5, 1)
    assert (names["layer 7, river"], names["layer 7, backbone"]) == (5, 2)
    steps = [
        Span(place, place + 1, "step", path, layer, op)
        for place, (path, layer, op) in enumerate(
            [("", None, "embed"), ("river", 0, "qkv"), ("river", 0, "o"), ("", None, "head")] * 2
        )
    ]
    trace = load([Recording("river", tuple(steps), (), "cuda:0")])
    events = rows(trace)["river", "cuda stream"]
    assert [event["name"] for event in events] == ["step", "embed", "layer 0, river", "qkv", "o", "head"] * 2


def test_tokens_and_where_they_left_the_backbone(recordings: list[Recording], trace: Any) -> None:
    found = rows(trace)
    for recording in recordings:
        start = recording.spans[0].begin
        for sequence in {token.sequence for token in recording.tokens}:
            events = found[recording.mode, f"sequence {sequence}"]
            tokens = [token for token in recording.tokens if token.sequence == sequence]
            shown = [event for event in events if event["ph"] == "X"]
            assert [event["args"]["text"] for event in shown] == [token.text for token in tokens]
            assert [event["args"]["index"] for event in shown] == [*range(len(tokens))]
            assert [event["args"].get("exit depth") for event in shown] == [token.exit_depth for token in tokens]
            assert [event["args"].get("source") for event in shown] == [token.source for token in tokens]
            for event, token in zip(shown, tokens, strict=True):
                assert event["ts"] == pytest.approx((token.begin - start) * 1e6, abs=TICK)
                assert event["ts"] + event["dur"] == pytest.approx((token.end - start) * 1e6, abs=TICK)
            assert all(not children for _, children in nest(events))
    compute = found["river", "cpu"]
    exits = [event for event in found["river", "sequence 1"] if event["ph"] == "i"]
    depths = [token.exit_depth for token in recordings[1].tokens if token.sequence == 1]
    assert [event["args"]["depth"] for event in exits] == depths[1:]  # the first token passed the whole backbone
    assert [(event["ts"], event["args"]) for event in compute if event["ph"] == "i"] == [
        (event["ts"], event["args"]) for event in exits
    ]
    for event in exits:
        layer = compute[compute.index(next(e for e in compute if e["ph"] == "i" and e["ts"] == event["ts"])) + 1]
        assert (layer["name"], layer["ts"]) == (f"layer {event['args']['depth']}, river", event["ts"])
    assert not [event for event in found["exact", "cpu"] + found["lossless", "cpu"] if event["ph"] == "i"]


def test_rows_of_a_batch_that_exit_apart() -> None:
    layers = [(0, "backbone"), (0, "river"), (1, "backbone"), (1, "river"), (2, "river")]
    spans = [Span(0.0, 1.0, "step", "", None, "embed")]
    spans += [Span(1.0 + at, 2.0 + at, "step", path, layer, "qkv") for at, (layer, path) in enumerate(layers)]
    tokens = [TokenSpan(0.0, 6.0, row, 0, "", depth) for row, depth in enumerate((0, 2, 3, 1))]
    found = rows(load([Recording("river", tuple(spans), tuple(tokens), "cpu")]))
    at = [[event["ts"] / 1e6 for event in found["river", f"sequence {row}"] if event["ph"] == "i"] for row in range(4)]
    assert at == [[2.0], [5.0], [], [4.0]]
    assert {event["name"] for event in found["river", "sequence 0"]} == {"(no text)", "exit"}


def test_ends_meet_exactly_however_short_the_spans() -> None:
    spans, now = [], 12345.678
    for place in range(500):
        end = now + (place % 7) * 3.3e-8
        spans.append(Span(now, end, "step", "backbone", place // 9, "qkv"))
        now = end
    events = rows(load([Recording("exact", tuple(spans), (), "cpu")]))["exact", "cpu"]
    for event, children in nest(events):
        assert event["cat"] == "op" or sum(child["dur"] for child in children) == event["dur"]
    for event in events:
        assert (event["ts"] * 1000) % 1 == (event["dur"] * 1000) % 1 == 0


def test_texts_that_are_hard_to_write_down() -> None:
    texts = ["\ud83d", "\ud83d\ude00", '"\\</script>', "\x00\n", "e\udc00"]
    tokens = [TokenSpan(place, place + 1, 0, place, text, None, "\udfff") for place, text in enumerate(texts)]
    text = trace_json([Recording("river", (), tuple(tokens), "cpu")], model="\ud800", environment={"cpu": "\udc00"})
    trace = json.loads(text)
    json.dumps(trace, ensure_ascii=False).encode("utf-8")
    shown = [event["args"]["text"] for event in trace["traceEvents"] if event["ph"] == "X"]
    assert shown == ["\ufffd", "\U0001f600", '"\\</script>', "\x00\n", "e\ufffd"]
    assert trace["otherData"] == {"model": "\ufffd", "cpu": "\ufffd"}


def test_nothing_recorded() -> None:
    assert load([])["traceEvents"] == []
    assert [*rows(load([Recording("exact", (), (), "cpu")]))] == [("exact", "cpu")]
