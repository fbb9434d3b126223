"""Does choosing per token buy anything? A gate against two controls that spend exactly as many backbone layers.

static: the same prefix of backbone layers for every token; where the gate's mean depth is no whole number, the two
nearest depths in the right share, spread evenly. shuffled: the gate's own depths on that prompt, dealt out in random
order, several times. Both have the gate's mean depth on every prompt to the layer. Only shuffled depths isolate the
choice: error is no linear function of depth, so that spreading depths may by itself be better than one depth for all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from riverinfer.evidence.quality import Judge, Quality, Scored, summarize
from riverinfer.evidence.statistics import ENOUGH, Interval, paired
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
    if len(set(walked.depths)) == 1:
        return Trial(walked, walked, (walked,) * shuffles)  # the controls are the gate itself
    static = judge.walk(GivenDepths(static_mix(walked.depths)))
    orders = [shuffled_depths(walked.depths, seed * shuffles + i) for i in range(shuffles)]
    return Trial(walked, static, tuple(judge.walk(GivenDepths(order)) for order in orders))


@dataclass(frozen=True)
class Comparison:
    """A gate against its controls over all prompts.

    over_static, over_shuffled: the control's KL less the gate's, in nats a token, paired by prompt: above zero the
    gate is better. chooses: whether the gate gave tokens of one prompt different depths at all; if not, it *is* a
    static prefix. beats_static, beats_shuffled: whether the whole interval is above zero, of at
    least ``ENOUGH`` prompts.
    """

    name: str
    gate: Quality
    static: Quality
    shuffled: Quality
    over_static: Interval
    over_shuffled: Interval
    chooses: bool
    beats_static: bool
    beats_shuffled: bool

    @property
    def verdict(self) -> str:
        """In plain words, with the intervals."""
        if not self.chooses:
            return f"{self.name} (mean depth {self.gate.mean_depth:.1f}) chooses nothing: all tokens leave alike"
        few = len(self.gate.kl_by_prompt) < ENOUGH
        parts = [
            _against(self.gate, control, difference, what, few)
            for control, difference, what in (
                (self.shuffled, self.over_shuffled, "shuffled depths"),
                (self.static, self.over_static, "a static prefix"),
            )
        ]
        spread = (
            ", but no more surely than its own depths do at random" if self.beats_static > self.beats_shuffled else ""
        )
        return f"{self.name} (mean depth {self.gate.mean_depth:.1f}) {parts[0]}, and {parts[1]}{spread}"


def _against(gate: Quality, control: Quality, difference: Interval, what: str, few: bool) -> str:
    word = "beats" if difference.above_zero else "is worse than" if difference.below_zero else "does not beat"
    if few:
        word = "has too few prompts to be judged by"
    spread = f"{difference.mean:.4f} ({difference.low:.4f}..{difference.high:.4f})"
    return f"{word} {what}: KL {gate.kl.mean:.4f} against {control.kl.mean:.4f}, difference {spread}"


def compare(name: str, trials: Sequence[Trial], layers: int) -> Comparison:
    """``trials``: one a prompt, of a model with ``layers`` layers."""
    gate = [fmean(trial.gate.kl) for trial in trials]
    static = [fmean(trial.static.kl) for trial in trials]
    shuffled = [fmean(fmean(walk.kl) for walk in trial.shuffled) for trial in trials]
    enough = len(trials) >= ENOUGH
    over_static, over_shuffled = paired(static, gate), paired(shuffled, gate)
    return Comparison(
        name=name,
        gate=summarize([[trial.gate] for trial in trials], layers),
        static=summarize([[trial.static] for trial in trials], layers),
        shuffled=summarize([trial.shuffled for trial in trials], layers),
        over_static=over_static,
        over_shuffled=over_shuffled,
        chooses=any(len(set(trial.gate.depths)) > 1 for trial in trials),
        beats_static=enough and over_static.above_zero,
        beats_shuffled=enough and over_shuffled.above_zero,
    )
