"""Two profiles held against each other: what is noise stays noise, what is slower is found, and where it is.

Simulated token latencies are autocorrelated, have rare spikes, and share what their run and their process are off by.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_profile_tables import TOKEN_S, TOKENS, fake_breakdown, fake_mode, fake_profile

from riverinfer.errors import InvalidRequestError
from riverinfer.profiling.compare import (
    NO_CHANGE,
    Change,
    Comparison,
    _blocks,
    _drawn,
    compare,
    student_t,
    terminal_comparison,
)
from riverinfer.profiling.result import METRICS, Profile, Run, figures

RESAMPLES = 100
EXACT = fake_profile(modes=["exact"])
TAILS = ("inter-token p99", "inter-token max", "jitter")


def noise(rng: np.random.Generator, runs: int) -> np.ndarray:
    """A row a run: stationary, standard deviation 2 %, correlation of neighbours 0.8."""
    shocks = rng.normal(0, 0.02, (TOKENS, runs))
    shocks[1:] *= 0.6
    for place in range(1, TOKENS):
        shocks[place] += 0.8 * shocks[place - 1]
    return shocks.T


def simulated(
    rng: np.random.Generator, *, slower: float = 1.0, runs: int = 5, run_effect: float = 0.006, process: float = 0.01
) -> Profile:
    """Exact mode in one process. Effects are standard deviations of log latency."""
    shift, found = rng.normal(0, process), []
    for logs in noise(rng, runs):
        factor = slower * np.exp(shift + rng.normal(0, run_effect))
        spikes = (rng.random(TOKENS) < 0.01) * rng.exponential(0.3, TOKENS)
        waits = 0.018 * factor * np.exp(logs) * (1 + spikes)
        prefill = 0.2 * factor * np.exp(rng.normal(0, 0.01))
        found.append(Run(prefill + 0.001, prefill, prefill + waits.sum(), tuple(waits.tolist()), 128, TOKENS + 1))
    return with_runs(EXACT, found)


def with_runs(profile: Profile, runs: list[Run], mode: str = "exact") -> Profile:
    return replace(profile, modes={mode: replace(profile.modes[mode], runs=tuple(runs))})


def scaled(run: Run, factor: float) -> Run:
    return replace(run, intervals_s=tuple(wait * factor for wait in run.intervals_s))


def verdicts(comparison: Comparison, mode: int = 0) -> dict[str, str]:
    return {change.name: change.verdict for change in comparison.modes[mode].changes}


def change(comparison: Comparison, name: str = "inter-token mean", mode: int = 0) -> Change:
    return next(each for each in comparison.modes[mode].changes if each.name == name)


def alarms(trials: int, *, margin: float = 0.03, slower: float = 1.0, seed: int = 1, **effects: float) -> Counter[str]:
    """In how many of ``trials`` each metric changed; "any" counts trials with at least one."""
    rng, found = np.random.default_rng(seed), Counter[str]()
    for _ in range(trials):
        a = simulated(rng, **effects)  # type: ignore[arg-type]
        b = simulated(rng, slower=slower, **effects)  # type: ignore[arg-type]
        changed = [
            name
            for name, verdict in verdicts(compare(a, b, margin=margin, resamples=RESAMPLES)).items()
            if verdict in ("slower", "faster")
        ]
        found.update(changed + (["any"] if changed else []))
    return found


def test_the_same_thing_twice_seldom_alarms() -> None:
    trials = 60
    found = alarms(trials)
    assert found["any"] <= trials * 0.1
    assert sum(found[name] for name in TAILS) <= trials * 0.05, "tails need no margin of their own"


def test_without_a_margin_a_process_looks_like_a_change() -> None:
    trials = 40
    assert alarms(trials, margin=0.0)["any"] > trials * 0.2


def test_tokens_taken_as_independent_alarm_most_of_the_time() -> None:
    """What ``compare`` is there to avoid; the noise of these tests is not too tame to show it."""
    rng, trials, found = np.random.default_rng(1), 60, 0
    for _ in range(trials):
        logs = [
            np.log([wait for run in simulated(rng).modes["exact"].runs for wait in run.intervals_s]) for _ in range(2)
        ]
        error = np.sqrt(sum(each.var() / each.size for each in logs))
        found += abs(logs[0].mean() - logs[1].mean()) > 1.96 * error
    assert found > trials * 0.5


def test_a_throttle_of_a_tenth_is_found() -> None:
    trials = 40
    found = alarms(trials, slower=1.1)
    for name in ("inter-token mean", "inter-token p50", "decode (tg)"):
        assert found[name] >= trials * 0.95
    assert found["prefill (pp)"] >= trials * 0.8


@pytest.mark.parametrize("runs", [2, 3])
def test_few_runs_make_the_interval_wide_enough(runs: int) -> None:
    """Between runs that differ by much more than their tokens say."""
    trials = 60
    found = alarms(trials, margin=0.0, runs=runs, run_effect=0.05, process=0.0)
    assert found["inter-token mean"] <= trials * 0.12
    assert found["time to first token"] <= trials * 0.12


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_student_t(degrees: int, expected: float) -> None:
    assert student_t(degrees) == pytest.approx(expected, abs=2e-3)


def test_tokens_are_compared_with_those_at_the_same_place() -> None:
    """River tokens differ by depth, alike in both: only pairs of positions and of runs see through that."""
    rng = np.random.default_rng(0)
    base = [0.01 * np.exp(rng.normal(0, 0.3) + rng.normal(0, 0.5, TOKENS)) for _ in range(5)]
    runs = [Run(0.2, 0.2, 2.0, tuple(waits.tolist()), 128, TOKENS + 1) for waits in base]
    slower = [scaled(run, 1.05) for run in runs]
    profile = fake_profile(modes=["exact"])
    found = compare(with_runs(profile, runs), with_runs(profile, slower))
    assert found.modes[0].by_token
    for name in ("inter-token mean", "inter-token p90", "inter-token max", "jitter"):
        each = change(found, name)
        assert (each.low, each.ratio, each.high) == pytest.approx((1.05, 1.05, 1.05))
        assert each.verdict == "slower"
    shorter = [replace(run, intervals_s=run.intervals_s[1:]) for run in slower]
    unpaired = compare(with_runs(profile, runs), with_runs(profile, shorter))
    assert not unpaired.modes[0].by_token
    each = change(unpaired)
    assert each.high is not None
    assert each.high > 1.1
    assert "not by token" in terminal_comparison(unpaired)


def test_what_is_drawn_has_the_figures_of_a_run() -> None:
    run = fake_mode(np.random.default_rng(0), "river").runs[0]
    drawn = _drawn(run, np.arange(TOKENS)[None])
    expected = figures(run)
    assert drawn.keys() == expected.keys()
    for name, values in drawn.items():
        known = expected[name]
        # The first difference stands in for the one after the last token.
        assert values[0] == pytest.approx(
            np.nan if known is None else known, rel=0.05 if name == "jitter" else 1e-9, nan_ok=True
        )


def test_blocks_keep_neighbours_together() -> None:
    blocks = _blocks(np.random.default_rng(0), 50, 100)
    assert blocks.shape == (50, 100)
    assert set(blocks.ravel()) == set(range(100))
    followed = np.mean((blocks[:, 1:] - blocks[:, :-1]) % 100 == 1)
    assert followed == pytest.approx(0.9, abs=0.02), "blocks of ten"
    assert (blocks[:, ::10].std(axis=0) > 20).all(), "that begin anywhere"


def test_jitter_knows_no_difference_where_blocks_meet() -> None:
    rng = np.random.default_rng(0)
    run = replace(EXACT.modes["exact"].runs[0], intervals_s=tuple(np.linspace(0.01, 0.02, TOKENS).tolist()))
    jitter = _drawn(run, _blocks(rng, 50, TOKENS))["jitter"]
    assert jitter == pytest.approx(np.full(50, 0.01 / (TOKENS - 1)))


def test_verdicts_follow_what_is_better() -> None:
    profile = fake_profile()
    runs = profile.modes["river"].runs
    deeper = [
        replace(scaled(run, 0.8), prefill_s=run.prefill_s * 1.5, exit_depths=tuple(d * 2 for d in run.exit_depths))
        for run in runs
    ]
    profile = with_runs(profile, list(runs), "river")
    found = verdicts(compare(profile, with_runs(profile, deeper, "river")))
    assert found["inter-token mean"] == found["decode (tg)"] == "faster"
    assert found["prefill (pp)"] == "slower"
    assert found["exit depth"] == ""  # neither is better: it has no verdict
    assert found["time to first token"] == NO_CHANGE
    back = verdicts(compare(with_runs(profile, deeper, "river"), profile))
    assert back["inter-token mean"] == back["decode (tg)"] == "slower"
    assert back["prefill (pp)"] == "faster"
    assert back["exit depth"] == ""


def test_the_whole_interval_must_lie_beyond_the_margin() -> None:
    a = fake_profile(modes=["exact"])
    b = with_runs(a, [scaled(run, 1.05) for run in a.modes["exact"].runs])
    assert verdicts(compare(a, b, margin=0.049))["inter-token mean"] == "slower"
    assert verdicts(compare(a, b, margin=0.051))["inter-token mean"] == NO_CHANGE
    assert verdicts(compare(b, a, margin=0.047))["inter-token mean"] == "faster"
    assert verdicts(compare(b, a, margin=0.048))["inter-token mean"] == NO_CHANGE


def test_microseconds_between_tokens_of_one_round_are_no_change() -> None:
    profile = fake_profile(modes=["lossless"])

    def bursts(at_once: float) -> Profile:
        waits = tuple(0.036 if place % 3 == 2 else at_once for place in range(TOKENS))
        runs = [replace(run, intervals_s=waits) for run in profile.modes["lossless"].runs]
        return with_runs(profile, runs, "lossless")

    found = compare(bursts(2e-6), bursts(4e-6))
    assert change(found, "inter-token p50").ratio == pytest.approx(2.0)
    assert change(found, "inter-token p50").verdict == NO_CHANGE
    assert not found.slower
    assert verdicts(compare(bursts(2e-3), bursts(4e-3)))["inter-token p50"] == "slower"


def test_where_names_operators_only_of_a_change() -> None:
    a = fake_profile(modes=["exact"])
    mode = a.modes["exact"]
    slow = replace(mode, breakdown=fake_breakdown("exact", {"down": 1.5, "qkv": 1.1}))
    same = compare(a, replace(a, modes={"exact": slow}))
    assert same.modes[0].where == ()
    slow = replace(slow, runs=tuple(scaled(run, 1.1) for run in mode.runs))
    where = compare(a, replace(a, modes={"exact": slow})).modes[0].where
    assert [each.op for each in where] == ["down", "qkv"]
    assert where[0].b / where[0].a == pytest.approx(1.5)
    assert where[0].a == pytest.approx(TOKEN_S["exact"] * 0.8 * 0.25)


def test_what_is_not_alike_comes_first() -> None:
    a, b = fake_profile(), fake_profile()
    a.environment["date"], b.environment["date"] = "one day", "another"
    b.environment.update(threads=4, triton="3.1")
    b.settings.update(context=512, runs=6)
    b.model.update(name="large")
    found = compare(a, b, resamples=RESAMPLES)
    assert [(each.name, each.a, each.b) for each in found.differences] == [
        ("model", "small", "large"),
        ("context", 0, 512),
        ("threads", 2, 4),
        ("triton", None, "3.1"),
    ]
    text = terminal_comparison(found, width=200)
    line = "not like with like: model small -> large; context 0 -> 512; threads 2 -> 4; triton unknown -> 3.1"
    assert line in text
    assert text.index(line) < text.index("inter-token")
    assert "not like" not in terminal_comparison(compare(a, a, resamples=RESAMPLES))


def test_pairs_of_runs_and_modes_that_both_have() -> None:
    a, b = fake_profile(modes=["exact", "river"], runs=5), fake_profile(modes=["lossless", "exact"], runs=3)
    found = compare(a, b)
    assert [mode.mode for mode in found.modes] == ["exact"]
    assert found.modes[0].pairs == 3
    assert (found.only_a, found.only_b) == (("river",), ("lossless",))
    mean = np.exp(np.mean(np.log([run.ttft_s for run in a.modes["exact"].runs[:3]])))
    assert change(found, "time to first token").a == pytest.approx(mean)
    with pytest.raises(InvalidRequestError, match="no mode in common: river; exact"):
        compare(fake_profile(modes=["river"]), fake_profile(modes=["exact"]))


@pytest.mark.parametrize("wrong", [{"margin": -0.1}, {"margin": float("nan")}, {"resamples": 1}])
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        compare(fake_profile(), fake_profile(), **wrong)  # type: ignore[arg-type]


def test_one_run_and_figures_of_zero_have_no_verdict() -> None:
    profile = fake_profile(modes=["lossless"], runs=1)
    found = compare(profile, profile)
    assert change(found).ratio == pytest.approx(1.0)
    assert (change(found).low, change(found).verdict) == (None, "")
    assert "one pair tells nothing" in terminal_comparison(found)
    profile = fake_profile(modes=["lossless"])
    none = with_runs(profile, [replace(run, accepted=0) for run in profile.modes["lossless"].runs], "lossless")
    each = change(compare(profile, none), "drafts accepted")
    assert (each.b, each.ratio, each.verdict) == (0.0, None, "")


def test_an_interval_without_bounds_is_still_a_number() -> None:
    first, second = EXACT.modes["exact"].runs[:2]
    a = with_runs(EXACT, [replace(first, ttft_s=1e20), replace(second, ttft_s=1e-20)])
    b = with_runs(EXACT, [replace(first, ttft_s=1e-20), replace(second, ttft_s=1e20)])
    found = compare(a, b, resamples=RESAMPLES)
    assert change(found, "time to first token").verdict == NO_CHANGE
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_same_seed_gives_the_same_json() -> None:
    a, b = fake_profile(0), fake_profile(1)
    first, second, other = (
        json.dumps(compare(a, b, resamples=RESAMPLES, seed=seed).as_dict(), allow_nan=False) for seed in (0, 0, 1)
    )
    assert first == second != other
    data = json.loads(first)
    assert data["modes"][0]["changes"][0].keys() == {"name", "a", "b", "ratio", "low", "high", "verdict"}
    assert data["slower"] is False


def test_the_terminal_shows_every_figure() -> None:
    a, b = fake_profile(0), fake_profile(1)
    slow = tuple(scaled(run, 1.2) for run in b.modes["exact"].runs)
    b.modes["exact"] = replace(b.modes["exact"], runs=slow, breakdown=fake_breakdown("exact", {"down": 2.0}))
    found = compare(a, replace(b, load_s=2.48))
    assert found.slower
    text = terminal_comparison(found, names=("old.json", "new.json"), width=80)
    assert max(map(len, text.splitlines())) <= 80
    each = change(found)
    shown = [f"{each.a * 1e3:.1f}", f"{each.b * 1e3:.1f}", f"{each.ratio:.3f}", f"{each.low:.3f}..{each.high:.3f}"]
    assert re.search(rf"inter-token mean, ms +{' +'.join(map(re.escape, shown))}  slower\n", text)
    assert re.search(r"load, s +1.24 +2.48 +2.000\n", text)
    assert "peak memory" in text
    assert "A: old.json · B: new.json" in text
    assert text.count("where: down") == 1
    assert {metric.name for metric in METRICS} == {each.name for mode in found.modes for each in mode.changes}
    colored = terminal_comparison(found, color=True)
    assert colored.count("\x1b[31mslower\x1b[0m") == sum(
        each.verdict == "slower" for mode in found.modes for each in mode.changes
    )
