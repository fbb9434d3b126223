"""Does choosing per token buy anything? A gate against two controls that spend exactly as many backbone layers.

static: the same prefix of backbone layers for every token; where the gate's mean depth is no whole number, the two
nearest depths in the right share, spread evenly. shuffled: the gate's own depths on that prompt, dealt out in random
order, several times. Both have the gate's mean depth on every prompt to the layer. Only shuffled depths isolate the
choice: error is no linear function of depth, so that spreading depths may by itself be better than one depth for all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from riverinfer.evidence.quality import Judge, Quality, Scored, summarize
from riverinfer.evidence.statistics import TAIL, Interval, bootstrap, can_pass, holm, least_p, sign_flip
from riverinfer.gates import FixedDepth, Gate


class GivenDepths(FixedDepth):
    """Deals out ``depths``, one a step, whatever the token. Raises IndexError when they are used up.

    A fixed depth within each step, so that a control is as fast as a walk that asks no gate.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        super().__init__(0)
        self._depths, self._step = list(depths), 0

    def start(self) -> bool:
        self.depth = self._depths[self._step]
        self._step += 1
        return super().start()


def static_mix(depths: Sequence[int]) -> list[int]:
    """As many depths of the same sum, all one number or the two next to their mean, the deeper ones evenly spread."""
    count = len(depths)
    shallow, deeper = divmod(sum(depths), count)
    return [shallow + ((i + 1) * deeper // count > i * deeper // count) for i in range(count)]


def shuffled_depths(depths: Sequence[int], seed: int) -> list[int]:
    """The same depths in random order."""
    return random.Random(seed).sample(list(depths), len(depths))


@dataclass(frozen=True)
class Trial:
    """A gate and its controls on one prompt; ``shuffled`` has a walk a shuffle."""

    gate: Scored
    static: Scored
    shuffled: tuple[Scored, ...]


def run_trial(judge: Judge, gate: Gate, *, shuffles: int, seed: int = 0) -> Trial:
    """Walk the judge's text through ``gate``, then through the depths of each control."""
    walked = judge.walk(gate)
    static = judge.walk(GivenDepths(static_mix(walked.depths)))
    if len(set(walked.depths)) == 1:  # the controls are the gate itself, but for the time it takes to ask it
        same = replace(walked, seconds=static.seconds)
        return Trial(walked, same, (same,) * shuffles)
    orders = [shuffled_depths(walked.depths, seed * shuffles + i) for i in range(shuffles)]
    return Trial(walked, static, tuple(judge.walk(GivenDepths(order)) for order in orders))


@dataclass(frozen=True)
class Against:
    """A gate against one control over all prompts.

    difference: the control's KL less the gate's, in nats a token, paired by prompt: above zero the gate is better.
    differing: prompts on which it is not zero. p_better, p_worse: ``sign_flip`` of the difference and of its opposite,
    adjusted (``holm``) for how many settings are judged together against this control; 1 where ``judged`` is False.
    judged: whether so many differing prompts could show anything beside the other settings (``can_pass``).
    """

    control: Quality
    difference: Interval
    differing: int
    judged: bool
    p_better: float
    p_worse: float

    @property
    def p(self) -> float:
        """Of the direction that the difference has."""
        return self.p_better if self.difference.mean >= 0 else self.p_worse

    @property
    def beats(self) -> bool:
        """Of settings judged together of which none is better than its control, one is said to be with ``TAIL``."""
        return self.p_better <= TAIL

    @property
    def loses(self) -> bool:
        return self.p_worse <= TAIL


@dataclass(frozen=True)
class Comparison:
    """A gate and its controls over all prompts.

    chooses: whether the gate gave tokens of one prompt different depths at all; if not, it *is* a static prefix.
    """

    name: str
    gate: Quality
    static: Against
    shuffled: Against
    chooses: bool

    @property
    def verdict(self) -> str:
        """In plain words, with the intervals."""
        if not self.chooses:
            return f"{self.name} (mean depth {self.gate.mean_depth:.1f}) chooses nothing: all tokens leave alike"
        parts = self._against(self.shuffled, "shuffled depths"), self._against(self.static, "a static prefix")
        spread = self.static.beats and not (self.shuffled.beats or self.shuffled.loses)
        return f"{self.name} (mean depth {self.gate.mean_depth:.1f}) {parts[0]}, and {parts[1]}" + (
            ", but is not told from its own depths at random" if spread else ""
        )

    def _against(self, against: Against, what: str) -> str:
        difference, count = against.difference, len(self.gate.kl_by_prompt)
        p = f", p = {against.p:.2g}" if against.judged else ""
        if against.beats or against.loses:
            said = f"{'beats' if against.beats else 'is worse than'} {what}"
        elif against.judged:
            said = f"does not surely beat {what}"
        else:
            said = f"differs from {what} on {against.differing} of {count} prompts, too few to tell which is better"
        spread = f"{difference.mean:.4f} ({difference.low:.4f}..{difference.high:.4f})"
        return f"{said}: KL {self.gate.kl.mean:.4f} against {against.control.kl.mean:.4f}, difference {spread}{p}"


def compare(trials: Mapping[str, Sequence[Trial]], layers: int) -> tuple[Comparison, ...]:
    """Settings by name, judged together. ``trials``: one a prompt, of a model with ``layers`` layers."""
    choosing = {name for name, tried in trials.items() if any(len(set(trial.gate.depths)) > 1 for trial in tried)}
    static = _against(trials, choosing, layers, lambda trial: (trial.static,))
    shuffled = _against(trials, choosing, layers, lambda trial: trial.shuffled)
    return tuple(
        Comparison(
            name=name,
            gate=summarize([[trial.gate] for trial in tried], layers),
            static=static[name],
            shuffled=shuffled[name],
            chooses=name in choosing,
        )
        for name, tried in trials.items()
    )


def _against(
    trials: Mapping[str, Sequence[Trial]],
    choosing: Collection[str],
    layers: int,
    control: Callable[[Trial], Sequence[Scored]],
) -> dict[str, Against]:
    differences = {
        name: [fmean(fmean(walk.kl) for walk in control(trial)) - fmean(trial.gate.kl) for trial in tried]
        for name, tried in trials.items()
    }
    differing = {name: sum(x != 0 for x in values) for name, values in differences.items()}
    # A setting that chooses nothing is its own control: it claims nothing, and must not weigh on those that do.
    claiming = [name for name in trials if name in choosing]
    able = can_pass([least_p(differing[name]) for name in claiming])
    judged = [name for name, can in zip(claiming, able, strict=True) if can]
    better = dict(zip(judged, holm([sign_flip(differences[name]) for name in judged]), strict=True))
    worse = dict(zip(judged, holm([sign_flip([-x for x in differences[name]]) for name in judged]), strict=True))
    return {
        name: Against(
            control=summarize([control(trial) for trial in tried], layers),
            difference=bootstrap(differences[name]),
            differing=differing[name],
            judged=name in judged,
            p_better=better.get(name, 1.0),
            p_worse=worse.get(name, 1.0),
        )
        for name, tried in trials.items()
    }
