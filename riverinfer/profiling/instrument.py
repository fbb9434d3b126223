"""Put clocks between the operators of a loaded engine, and take them out again. Nothing of it is there otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from riverinfer.errors import InvalidRequestError
from riverinfer.gates import FixedDepth
from riverinfer.generation import Generation
from riverinfer.kernels.scripted import ScriptedLayers, script_layers
from riverinfer.profiling.ranges import Ranges
from riverinfer.profiling.recorder import Place, Recorder
from riverinfer.profiling.spans import TokenSpan
from riverinfer.profiling.timed_layers import TimedLayer

if TYPE_CHECKING:
    from riverinfer.device_walk import DeviceWalk, StepKind
    from riverinfer.engine import Engine
    from riverinfer.model import DecoderLayer, Model, StepContext

Call = Callable[..., Any]


class Watch:
    """The clocks of one engine, and what they told of one generation.

    tokens: as they came. ends: of steps, in seconds of ``time.perf_counter``, the prompt's first; all tokens between
    two passes through the layers end the same one.
    """

    def __init__(self, engine: Engine, ranges: Ranges) -> None:
        self.recorder, self.ranges = Recorder(engine.model.device), ranges
        self.tokens: list[TokenSpan] = []
        self.ends: list[float] = []
        self._reading = False  # a prompt
        self._gated = False  # a gate is asked after each backbone layer
        self._passed = "prefill"  # phase of the last pass
        self._said = False  # a token came since then
        self._sequences = 0

    def start(self) -> float:
        """A generation begins: seconds of ``time.perf_counter``."""
        self.tokens.clear()
        self.ends.clear()
        self._passed, self._said, self._gated, self._sequences = "prefill", False, False, 0
        return self.recorder.start()

    def reading(self, function: Call) -> Call:
        """``Engine.read_prompt``."""

        def call(*args: Any, **options: Any) -> Any:
            self._reading = True
            try:
                return function(*args, **options)
            finally:
                self._reading = False

        return call

    def passing(self, function: Call, phase: str = "step") -> Call:
        """A call that passes the layers: what came before it was the host's."""

        def call(*args: Any, **options: Any) -> Any:
            recorder = self.recorder
            recorder.settle()
            recorder.mark("host")
            self._passed = "prefill" if self._reading else "verify" if options.get("all_logits") else phase
            recorder.phase, self._said = self._passed, False
            gates = [*options.get("gates", ()), options.get("gate")]
            self._gated = any(gate is not None and not isinstance(gate, FixedDepth) for gate in gates)
            with self.ranges.of(recorder.phase):
                return function(*args, **options)

        return call

    def enter(self, layer: int) -> None:
        """A layer begins. If a backbone layer under a gate came before it, what ran since then was the gate."""
        if self._gated and layer and self.recorder.last()[1] == ("backbone", layer - 1, "down"):
            self.recorder.mark("gate", layer - 1, "backbone")

    def logits(self, function: Call, layers: int) -> Call:
        """``Model.logits``: final norm and head."""

        def call(h: Tensor, *, river: bool = False) -> Tensor:
            self.enter(layers)
            logits = function(h, river=river)
            self.recorder.mark("head", None, "river" if river else "backbone")
            return logits

        return call

    def generation(self, make: Callable[..., Generation]) -> Callable[..., Generation]:
        """``Engine.generation``: requests whose choices and tokens are seen."""

        def call(*args: Any, **options: Any) -> Generation:
            generation = make(*args, **options)
            sampler = generation.sampler
            step, number, end = generation.step, self._sequences, self.recorder.last()[0]
            self._sequences += 1

            def stepped(*args: Any, **options: Any) -> Any:
                nonlocal end
                said = step(*args, **options)
                self.recorder.mark("host")
                begin, end = end, self.recorder.last()[0]
                self._end_of_step(end)
                index = len(generation.output.token_ids) - 1
                self.tokens.append(TokenSpan(begin, end, number, index, said.text, said.exit_depth, said.source))
                return said

            generation.choose = self._choosing(generation.choose)  # type: ignore[method-assign]
            sampler.guess = self._choosing(sampler.guess)  # type: ignore[method-assign]
            generation.step = stepped  # type: ignore[method-assign]
            return generation

        return call

    def _choosing(self, function: Call) -> Call:
        def call(*args: Any) -> Any:
            self.recorder.mark("host")
            self.recorder.phase = self._passed
            chosen = function(*args)
            self.recorder.mark("sampling")
            return chosen

        return call

    def _end_of_step(self, end: float) -> None:
        # Several tokens after one pass (a lossless round, the rows of a batch, whose prompts too) end one step.
        if self._said or (self._passed == "prefill" and self.ends):
            self.ends[-1] = end
        else:
            self.ends.append(end)
        self._said, self.recorder.phase = True, "host"


class Instruments:
    """Clocks for a loaded engine, made once: scripts and graphs with marks are compiled anew.

    Steps are taken one by one from the host in the form that they otherwise have: scripted layers on a CPU, fused
    launches, captured, on a GPU. The texts are the same.
    """

    def __init__(self, engine: Engine, ranges: Ranges | None = None) -> None:
        self._engine = engine
        self.watch = watch = Watch(engine, ranges or Ranges())
        model = engine.model
        self._swaps: list[tuple[Any, str, Any]] = []
        for name, path in (("backbone_script", "backbone"), ("river_script", "river")):
            if getattr(model, name) is not None:
                self._swaps.append((model, name, _TimedScript.of(model, path, watch)))
        self._swaps += [
            (model, "layers", _timed(model.layers, "backbone", watch)),
            (model, "river", _timed(model.river, "river", watch)),
            (model, "embed", _TimedEmbedding(model.embed, watch.recorder)),
            (model, "normed", _before_mark(model.normed, "norm", watch.recorder)),
            (model, "logits", watch.logits(model.logits, len(model.layers))),
            (engine, "read_prompt", watch.reading(engine.read_prompt)),
            (engine, "extend", watch.passing(engine.extend)),
            (engine, "extend_batch", watch.passing(engine.extend_batch)),
            (engine, "draft", watch.passing(engine.draft, "draft")),
            (engine, "generation", watch.generation(engine.generation)),
        ]
        # Steps that the device queues by itself pass no place where the host could mark their ends.
        self._stepping = [(engine, "decoder", None), (engine, "rounds", None)]
        walk = model.device_walk
        if walk is not None:
            run, marked = _timed_run(walk, watch.recorder)
            self._swaps += [(walk, "run", run), (walk, "marked", marked)]

    @contextmanager
    def attached(self) -> Iterator[Watch]:
        """The engine has the clocks, and is as it was afterwards. Not for use by several threads."""
        with _swapped([*self._stepping, *self._swaps]):
            yield self.watch

    def stepping(self) -> AbstractContextManager[None]:
        """The engine takes its steps as with clocks, without any: what the clocks cost is the difference."""
        return _swapped(self._stepping)

    def close(self) -> None:
        """Let go of what was captured."""
        if self._engine.model.device_walk is not None:
            self._engine.model.device_walk.unmark()


@contextmanager
def _swapped(swaps: list[tuple[Any, str, Any]]) -> Iterator[None]:
    missing = object()  # an attribute that the class has
    was = [(owner, name, vars(owner).get(name, missing)) for owner, name, _ in swaps]
    try:
        for owner, name, value in swaps:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(was):
            if value is not missing:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


def _before_mark(function: Call, op: str, recorder: Recorder) -> Call:
    def call(*args: Any) -> Any:
        result = function(*args)
        recorder.mark(op)
        return result

    return call


def _timed(layers: list[DecoderLayer], path: str, watch: Watch) -> list[DecoderLayer]:
    mark = watch.recorder.mark

    def enter(layer: int) -> AbstractContextManager[None]:
        watch.enter(layer)
        return watch.ranges.of(f"layer {layer}, {path}")

    return [
        TimedLayer.of(layer, partial(mark, layer=i, path=path), partial(enter, i), watch.ranges)
        for i, layer in enumerate(layers)
    ]


class _TimedScript:
    """``ScriptedLayers`` with marks."""

    def __init__(self, script: ScriptedLayers, watch: Watch) -> None:
        self._script, self._watch = script, watch

    @classmethod
    def of(cls, model: Model, path: str, watch: Watch) -> _TimedScript:
        layers = model.river if path == "river" else model.layers[: model.held_layers]
        script = script_layers(layers, watch.recorder.script_marks(path, len(layers)))
        assert script is not None
        return cls(script, watch)

    def __call__(self, h: Tensor, first: int, last: int, step: StepContext, caches: list[Tensor]) -> Tensor:
        self._watch.enter(first)
        return self._script(h, first, last, step, caches)


class _TimedEmbedding:
    """What comes before it in a pass, rotary tables and masks, is the host's."""

    def __init__(self, embed: Any, recorder: Recorder) -> None:
        self._embed, self._recorder = embed, recorder

    def __call__(self, ids: Tensor) -> Tensor:
        self._recorder.mark("host")
        h = self._embed(ids)
        self._recorder.mark("embed")
        return h

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embed, name)


def _timed_run(walk: DeviceWalk, recorder: Recorder) -> tuple[Call, Call]:
    """``DeviceWalk.run`` and ``marked`` with a mark after each launch; in a graph these are events that it records."""
    captured: dict[StepKind, list[tuple[Any, Place]]] = {}
    now: list[StepKind] = []
    if walk.captures:
        _require_external_events()
    plain, layers = walk.run, len(walk.model.layers)

    def marked(op: str, layer: int | None) -> None:
        if not walk.captures:
            recorder.mark(op, layer)
        elif torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True, external=True)
            event.record(torch.cuda.current_stream(walk.model.device))
            if op == "embed":  # a step's first: what a capture that failed had left is none of its own
                captured[now[0]] = []
            captured[now[0]].append((event, ("", layer, op)))

    def run(kind: StepKind) -> Tensor:
        recorder.mark("host")
        now[:] = [kind]
        first = len(recorder.marks)
        h = plain(kind)
        if walk.captures:
            recorder.add_events(captured[kind])
        depth = {"backbone": layers, "river": 0}.get(kind.path)
        recorder.follow_depth(first, int(walk.state.depth[0]) if depth is None else depth)
        return h

    return run, marked


def _require_external_events() -> None:
    """Events inside a graph that the host can read. Raises InvalidRequestError where torch has none."""
    try:
        torch.cuda.Event(enable_timing=True, external=True)
    except TypeError as exc:
        raise InvalidRequestError(
            f"torch {torch.__version__} cannot time inside a CUDA graph", remedy="give --no-graph, or a newer torch"
        ) from exc
