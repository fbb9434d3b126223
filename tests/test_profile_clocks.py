"""Clocks between operators: the same texts, sums that agree, time found where it was spent, and nothing left behind.

A false clock stands in for time: it goes on by a microsecond a reading, and by what a planted sleep takes.
"""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from forced_drafts import force
from golden_models import ROOT
from planted_sleep import CLOCK, SLEEP, Clock, pause, slow_attend, slow_multiply

from riverinfer import Engine
from riverinfer.detokenizer import StreamingDetokenizer
from riverinfer.gates import SimilarityGate
from riverinfer.kernels import scripted
from riverinfer.outputs import Output
from riverinfer.profiling import runner
from riverinfer.profiling.instrument import Instruments, _timed_run
from riverinfer.profiling.recorder import Recorder
from riverinfer.profiling.result import OPERATORS, Machine, ModeProfile
from riverinfer.profiling.runner import Workload, profile_modes
from riverinfer.profiling.spans import Recording
from riverinfer.river import RiverOptions
from riverinfer.sampling import Sampler

MACHINE = Machine(1e10, 1e11)
WORK = Workload(prompt_len=24, new_tokens=12, runs=2, warmup=0, seed=3)
IDS = [5 + i * 7 % 200 for i in range(24)]
# On this model some tokens exit and some do not.
RIVER = RiverOptions(tau=0.9)
MODES = ("exact", "river", "lossless")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(time, "perf_counter", CLOCK)
    return CLOCK


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "probe", lambda device, dtype: MACHINE)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(
        ROOT / "llama", device="cpu", dtype="bfloat16", ctx_size=128, max_sequences=3,
        draft="river", river_bits=4, river_group=32, river_method="rtn",
    ) as loaded:  # fmt: skip
        yield loaded


def profile(
    engine: Engine, modes: tuple[str, ...] = MODES, work: Workload = WORK
) -> tuple[dict[str, ModeProfile], dict[str, Recording]]:
    ids = (IDS * 4)[: work.context + work.prompt_len]
    measured = profile_modes(engine, modes, work, ids, river=RIVER)
    return measured.modes, {each.mode: each for each in measured.recordings}


def decode_seconds(found: ModeProfile) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for each in found.breakdown.operators:
        if each.phase != "prefill":
            seconds[each.op] += each.seconds
    return seconds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_clocks_change_no_text(engine: Engine, mode: str, temperature: float) -> None:
    params = Workload(new_tokens=20, temperature=temperature, seed=5).params(0)
    river = RIVER if mode == "river" else None
    plain = engine.generate(IDS, params, mode=mode, river=river)
    with Instruments(engine).attached() as watch:
        watch.start()
        timed = engine.generate(IDS, params, mode=mode, river=river)
    assert (timed.token_ids, timed.logprobs) == (plain.token_ids, plain.logprobs)
    assert (timed.exit_depths, timed.text) == (plain.exit_depths, plain.text)
    assert "".join(token.text for token in watch.tokens) == plain.text
    if mode == "river":
        assert len(set(plain.exit_depths)) > 1
        assert [token.exit_depth for token in watch.tokens] == plain.exit_depths


def test_afterwards_nothing_is_left(engine: Engine) -> None:
    model = engine.model
    places: list[Any] = [engine, model, *model.layers, *model.river]

    def state() -> list[dict[str, int]]:
        names = [
            vars(each) if hasattr(each, "__dict__") else {n: getattr(each, n) for n in each.__slots__}
            for each in places
        ]
        return [{name: id(value) for name, value in each.items()} for each in names]

    before = state()
    instruments = Instruments(engine)
    assert state() == before
    with pytest.raises(KeyError), instruments.attached():
        {}[state() != before]
    assert state() == before


def test_without_a_listener_the_script_has_no_marks(engine: Engine) -> None:
    assert engine.model.backbone_script is not None
    assert "_mark" not in str(engine.model.backbone_script._script.inlined_graph)
    timed = scripted.script_layers(engine.model.layers, lambda which, layer: None)
    assert timed is not None
    assert str(timed._script.inlined_graph).count("_mark") == len(scripted.MARKS)


def test_a_script_forgets_who_listened(engine: Engine) -> None:
    with Instruments(engine).attached() as watch:
        watch.start()
        engine.generate(IDS, WORK.params(0), mode="exact")
        assert watch.recorder.marks
    assert not scripted._listening


@pytest.mark.parametrize(
    "work", [WORK, Workload(24, 12, runs=1, warmup=0, batch=3), Workload(8, 12, 40, runs=1, warmup=0)]
)
def test_the_sums_agree(engine: Engine, clock: Clock, work: Workload) -> None:
    for mode, found in profile(engine, work=work)[0].items():
        parts = found.breakdown
        decode = sum(decode_seconds(found).values())
        assert decode == pytest.approx(sum(parts.step_s), rel=0.05)
        assert sum(parts.step_s) == pytest.approx(parts.decode_s, rel=0.01)
        assert sum(each.seconds for each in parts.operators) == pytest.approx(parts.total_s, rel=0.01)
        assert parts.tokens == (work.new_tokens - 1) * work.batch
        rounds = found.runs[0].rounds
        assert len(parts.step_s) == (rounds if mode == "lossless" and work.batch == 1 else work.new_tokens - 1)


def test_everything_has_its_place(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [("river", 3)])  # every round alike, whichever generation it is of
    found, recordings = profile(engine)
    layers = len(engine.model.layers)
    for mode, recording in recordings.items():
        assert all(a.end == b.begin for a, b in zip(recording.spans, recording.spans[1:], strict=False))
        assert {span.op for span in recording.spans} <= set(OPERATORS)
        steps = found[mode].breakdown
        counts: dict[tuple[str, str, str], int] = defaultdict(int)
        for each in steps.operators:
            counts[each.phase, each.path, each.op] += each.count
        matrices = {key: n for key, n in counts.items() if key[2] == "qkv"}
        run = found[mode].runs[0]
        if mode == "exact":
            assert matrices == {("prefill", "backbone", "qkv"): layers, ("step", "backbone", "qkv"): layers * 11}
        if mode == "river":
            depth = sum(run.exit_depths[1:])
            assert matrices["step", "backbone", "qkv"] == depth
            assert matrices["step", "river", "qkv"] == 11 * layers - depth
            assert counts["step", "backbone", "gate"] == depth
        if mode == "lossless":
            assert matrices["draft", "river", "qkv"] == run.river_drafted * layers
            assert matrices["verify", "backbone", "qkv"] == run.rounds * layers
            assert sum(n for (_, _, op), n in counts.items() if op == "sampling") == 12 + run.river_drafted


def test_the_sums_agree_in_real_time(engine: Engine) -> None:
    for found in profile(engine, work=Workload(24, 40, runs=1, warmup=0))[0].values():
        parts = found.breakdown
        assert sum(decode_seconds(found).values()) == pytest.approx(sum(parts.step_s), rel=0.05)
        assert sum(parts.step_s) == pytest.approx(parts.decode_s, rel=0.01)
        assert sum(each.seconds for each in parts.operators) == pytest.approx(parts.total_s, rel=0.01)


def test_sleeps_in_the_scripts_of_a_lossless_round(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix sleeps: each has its share, of the backbone's while verifying, of the river's while drafting."""
    force(monkeypatch, [("river", 3)])
    monkeypatch.setattr(scripted, "_multiply", slow_multiply)
    monkeypatch.setattr(torch.jit._recursive, "concrete_type_store", torch.jit._recursive.ConcreteTypeStore())
    found = profile(engine, ("lossless",))[0]["lossless"]
    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    for each in found.breakdown.operators:
        seconds[each.phase, each.path, each.op] += each.seconds
    layers, run = len(engine.model.layers), found.runs[0]
    for op in ("qkv", "o", "gate_up", "down"):
        assert seconds["draft", "river", op] == pytest.approx(SLEEP * layers * run.river_drafted, rel=0.01)
        assert seconds["verify", "backbone", op] == pytest.approx(SLEEP * layers * run.rounds, rel=0.01)
    others = [value for (phase, _, op), value in seconds.items() if op in ("norm", "rope", "silu", "attention", "head")]
    assert max(others) < SLEEP


class FakeEvent:
    """A CUDA event on a clock of seconds; in a graph it is recorded anew by each replay."""

    now = 0.0

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self, *_: object) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: FakeEvent) -> float:
        return (later.at - self.at) * 1000


def test_events_of_a_replayed_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks that were captured once are read after each replay; those of the launch that compiles are not kept."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    recorder = Recorder(torch.device("cuda"))
    graph: list[FakeEvent] = []

    def plain(kind: Kind) -> None:
        nonlocal capturing
        for phase in (False, True) if not graph else ():
            capturing = phase
            for op, layer in (("embed", None), ("qkv", 0), ("down", 0), ("qkv", 1), ("down", 1)):
                marked(op, layer)
        graph[:] = [event for event, _ in inspect.getclosurevars(run).nonlocals["captured"][kind]]
        for event in graph:
            FakeEvent.now += 0.25
            event.record()

    class Kind(NamedTuple):
        path: str

    walk = SimpleNamespace(
        run=plain, captures=True, model=SimpleNamespace(layers=[0, 1], device=None), state=SimpleNamespace(depth=[1])
    )
    run, marked = _timed_run(walk, recorder)  # type: ignore[arg-type]
    recorder.start()
    for _ in range(2):
        FakeEvent.now += 1.0
        run(Kind("gated"))  # type: ignore[arg-type]
        recorder.settle()
    spans = recorder.spans()
    want = [("", "host"), ("", "embed"), ("backbone", "qkv"), ("backbone", "down"), ("river", "qkv"), ("river", "down")]
    assert [(span.path, span.op) for span in spans] == want * 2
    assert [span.end - span.begin for span in spans] == pytest.approx([1.0, *[0.25] * 5] * 2)


def _plant(function: Callable[..., Any]) -> Callable[..., Any]:
    def planted(*args: Any, **options: Any) -> Any:
        pause()
        return function(*args, **options)

    return planted


@pytest.mark.parametrize("op", ["qkv", "attention", "down", "head", "sampling", "gate", "norm", "host"])
def test_a_planted_sleep_is_found(engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    model, mode = engine.model, "river" if op == "gate" else "exact"
    before = decode_seconds(profile(engine, (mode,))[0][mode])
    count = WORK.new_tokens - 1
    if op in ("qkv", "down"):
        # A matrix that the script does not know: the layers are walked in Python.
        layer = model.layers[0]
        monkeypatch.setattr(layer, op, _Slow(getattr(layer, op)))
        monkeypatch.setattr(model, "backbone_script", None)
    elif op == "attention":
        monkeypatch.setattr(scripted, "_attend", slow_attend)
        # torch would take the code that it has compiled of this class before.
        monkeypatch.setattr(torch.jit._recursive, "concrete_type_store", torch.jit._recursive.ConcreteTypeStore())
        count *= len(model.layers)
    elif op == "head":
        monkeypatch.setattr(model, "head", _Slow(model.head))
    elif op == "norm":
        monkeypatch.setattr(model, "normed", _plant(model.normed))
    elif op == "sampling":
        monkeypatch.setattr(Sampler, "_choose", _plant(Sampler._choose))
    elif op == "gate":
        monkeypatch.setattr(SimilarityGate, "__call__", _plant(SimilarityGate.__call__))
    else:
        monkeypatch.setattr(StreamingDetokenizer, "push", _plant(StreamingDetokenizer.push))
    found = profile(engine, (mode,))[0][mode]
    after = decode_seconds(found)
    if op == "gate":
        count = sum(found.runs[0].exit_depths[1:])
    grown = {name: seconds - before[name] for name, seconds in after.items()}
    assert grown.pop(op) == pytest.approx(SLEEP * count, rel=0.01)
    assert max(map(abs, grown.values())) < SLEEP / 10


class _Slow:
    """A matrix that sleeps."""

    def __init__(self, linear: Any) -> None:
        self._linear = linear
        self.in_features, self.weight_bytes, self.bias = linear.in_features, linear.weight_bytes, linear.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        pause()
        return self._linear(x)


def test_runs_are_what_the_engine_says(engine: Engine, clock: Clock) -> None:
    found, _ = profile(engine)
    for mode, each in found.items():
        assert len(each.runs) == WORK.runs
        for number, run in enumerate(each.runs):
            out = engine.generate(IDS, WORK.params(number), mode=mode, river=RIVER if mode == "river" else None)
            assert run.exit_depths == tuple(out.exit_depths)
            assert (run.new_tokens, run.prompt_tokens) == (12, 24)
            assert run.ttft_s + sum(run.intervals_s) == pytest.approx(run.total_s, abs=1e-9)
            assert len(run.intervals_s) == 11
            drafts = out.stats.drafts
            assert (drafts is not None) == (mode == "lossless")


def test_a_context_is_cached_and_not_read_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Output] = []
    plain = engine.generation

    def kept(*args: Any, **options: Any) -> Any:
        made = plain(*args, **options)
        outputs.append(made.output)
        return made

    monkeypatch.setattr(engine, "generation", kept)
    work = Workload(8, 12, 40, runs=2, warmup=0)
    found, _ = profile(engine, work=work)
    assert {output.stats.cached_tokens for output in outputs} == {40}
    assert len({tuple(output.token_ids) for output in outputs if not output.exit_depths}) == 1
    assert {tuple(output.prompt_token_ids) for output in outputs} == {tuple((IDS * 4)[:48])}
    assert found["exact"].runs[0].prompt_tokens == 8
    assert not engine.slots.busy


def test_modes_take_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    plain = runner._Runner.run
    monkeypatch.setattr(
        runner._Runner, "run", lambda self, mode, *args: (order.append(mode), plain(self, mode, *args))[1]
    )
    profile(engine, work=Workload(24, 4, runs=3, warmup=1))
    measured = order[: 4 * 3]
    assert {tuple(measured[i : i + 3]) for i in range(3, 12, 3)} == {
        ("exact", "river", "lossless"), ("river", "lossless", "exact"), ("lossless", "exact", "river"),
    }  # fmt: skip


def test_how_much_of_a_text_repeats_itself() -> None:
    assert runner.repeated([1, 2, 3, 4, 5, 6]) == 0
    assert runner.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert runner.repeated([7] * 23) == pytest.approx(19 / 20)
    assert runner.repeated([1, 2]) == 0
