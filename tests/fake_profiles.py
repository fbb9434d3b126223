"""Seeded profiles and recordings of a 30-layer model that nobody ran, in the proportions of a real one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from riverinfer.profiling.result import Breakdown, Limit, Machine, ModeProfile, Profile, Run
from riverinfer.profiling.spans import Recording, Span, TokenSpan, totals

LAYERS = 30
MODES = ("exact", "river", "lossless")
LABELS = {"exact": "exact", "river": "river, tau 0.5", "lossless": "lossless, drafts by river and look-up"}
LAYER_US = {  # of one backbone layer
    "norm": 9,
    "qkv": 95,
    "rope": 8,
    "attention": 25,
    "o": 60,
    "gate_up": 170,
    "silu": 7,
    "down": 90,
}
RIVER_SHARE, VERIFY_FACTOR = 0.42, 1.5
WORDS = (
    *(" then", " was", " in", " of", " to", " we") * 3,
    " the",
    " a",
    " river",
    "\n",
    " meets",
    " sea",
    ",",
    " and",
    "日本",
    " it",
    " is",
    " said",
    ".",
    " " + "x" * 12,
)


@dataclass
class Clocked:
    """A clock that moves by what it is told to, and the spans that it leaves."""

    random: random.Random
    now: float = 1000.0
    spans: list[Span] = field(default_factory=list)

    def run(self, phase: str, path: str, layer: int | None, op: str, microseconds: float) -> None:
        begin, self.now = self.now, self.now + microseconds * 1e-6 * self.random.uniform(0.9, 1.3)
        self.spans.append(Span(begin, self.now, phase, path, layer, op))

    def walk(self, phase: str, depth: int, factor: float = 1.0) -> None:
        """embed, backbone layers up to ``depth``, river layers, head and sampling."""
        self.run(phase, "", None, "embed", 6)
        for layer in range(LAYERS):
            path = "backbone" if layer < depth else "river"
            for op, microseconds in LAYER_US.items():
                self.run(phase, path, layer, op, microseconds * factor * (1 if layer < depth else RIVER_SHARE))
            if layer < depth < LAYERS:
                self.run(phase, path, layer, "gate", 5)
        self.run(phase, "", None, "head", 1700 if factor == 1 else 2600)
        self.run(phase, "", None, "sampling", 40)
        self.run("host", "", None, "host", 25)


def recording(mode: str, *, tokens: int = 24, seed: int = 0, batch: int = 1) -> Recording:
    """One generation of ``tokens`` tokens a sequence."""
    chance = random.Random(f"{mode}{seed}")
    clocked = Clocked(chance)
    last = clocked.now
    clocked.walk("prefill", LAYERS, 4.0)
    made: list[TokenSpan] = []

    def add(index: int, depth: int | None, source: str | None) -> None:
        nonlocal last
        made.extend(
            TokenSpan(last, clocked.now, sequence, index, chance.choice(WORDS), depth, source)
            for sequence in range(batch)
        )
        last = clocked.now

    add(0, LAYERS if mode == "river" else None, "backbone" if mode == "lossless" else None)
    while (count := len(made) // batch) < tokens:
        if mode == "lossless":
            for _ in range(5):
                clocked.walk("draft", 0)
            clocked.walk("verify", LAYERS, VERIFY_FACTOR)
            for place in range(min(8, tokens - count)):
                clocked.run("host", "", None, "host", 12)
                add(count + place, None, "river" if place < 7 else "backbone")
        else:
            depth = chance.choice((1, 1, 1, 2, 3, 6)) if mode == "river" else LAYERS
            clocked.walk("step", depth)
            add(count, depth if mode == "river" else None, None)
    return Recording(mode, tuple(clocked.spans), tuple(made), "cpu")


def _run(mode: str, tokens: int, seed: int) -> Run:
    found = recording(mode, tokens=tokens, seed=seed)
    waits = tuple(token.end - token.begin for token in found.tokens)
    rounds = -(-(tokens - 1) // 8) if mode == "lossless" else 0
    return Run(
        ttft_s=waits[0],
        prefill_s=0.96 * waits[0],
        total_s=sum(waits),
        intervals_s=waits[1:],
        prompt_tokens=64,
        new_tokens=tokens,
        exit_depths=tuple(token.exit_depth for token in found.tokens if token.exit_depth is not None),
        rounds=rounds,
        drafted=9 * rounds,
        accepted=7 * rounds,
        agreement=0.86 if rounds else None,
        draft_s=0.04 * rounds,
        verify_s=0.025 * rounds,
    )


def _mode(mode: str, tokens: int, runs: int, machine: Machine) -> ModeProfile:
    seen = recording(mode, tokens=tokens, seed=99)
    taken = tuple(_run(mode, tokens, seed) for seed in range(runs))
    decode = sum(token.end - token.begin for token in seen.tokens[1:])
    share = {"exact": 1.0, "river": 0.48, "lossless": 0.44}[mode]
    bytes_, operations = 269e6 * share, 269e6 * {"exact": 1.0, "river": 0.5, "lossless": 1.9}[mode]
    limit = max(bytes_ / machine.bytes_per_s, operations / machine.operations_per_s)
    steps: Callable[[Sequence[Run]], float] = lambda each: sum(sum(run.intervals_s) for run in each)  # noqa: E731
    per_token = steps(taken) / max(sum(len(run.intervals_s) for run in taken), 1)
    return ModeProfile(
        mode=mode,
        label=LABELS[mode],
        runs=taken,
        limit=Limit(bytes_, operations, limit, "bandwidth", limit / per_token),
        breakdown=Breakdown(
            operators=totals(seen.spans),
            total_s=seen.spans[-1].end - seen.spans[0].begin,
            decode_s=decode,
            step_s=tuple(token.end - token.begin for token in seen.tokens[1:]),
            tokens=tokens - 1,
            overhead=0.013,
            mark_s=0.4e-6,
            events="cpu clock",
        ),
    )


def profile(
    modes: Sequence[str] = MODES, *, tokens: int = 96, runs: int = 5, name: str = "SmolLM2-135M"
) -> tuple[Profile, list[Recording]]:
    """A profile and the recordings that go with it."""
    machine = Machine(bytes_per_s=20.7e9, operations_per_s=118e9)
    model: dict[str, Any] = {
        "name": name,
        "layers": LAYERS,
        "hidden_size": 576,
        "vocab_size": 49152,
        "parameters": 134_515_008,
        "dtype": "bfloat16",
    }
    environment = {
        "device": "cpu",
        "device_name": "cpu",
        "cpu": "AMD EPYC 9354 32-Core Processor",
        "cores": 8,
        "threads": 4,
        "python": "3.11.2",
        "torch": "2.13.0+cpu",
        "triton": "3.7.1",
        "riverinfer": "0.1.0",
        "date": "2026-11-24",
    }
    settings = {
        "prompt_len": 64,
        "new_tokens": tokens,
        "context": 2048,
        "batch": 1,
        "runs": runs,
        "warmup": 1,
        "temperature": 0.0,
        "seed": 0,
        "tau": 0.5,
        "depth": 5,
        "river": "group 32, rank 8",
    }
    measured = {mode: _mode(mode, tokens, runs, machine) for mode in modes}
    made = Profile(environment, model, settings, 1.8, 691_000_000, machine, measured)
    return made, [recording(mode, tokens=tokens, seed=99) for mode in modes]
