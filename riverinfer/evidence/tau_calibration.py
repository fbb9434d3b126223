"""Which tau keeps the river's disagreement with exact mode below a bound, shown on prompts.

Not ``riverinfer.calibration``, which is about the channel scales of awq rivers. The unit is the prompt: tokens of one
answer depend on each other, prompts are taken to be independent draws from those of later use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from riverinfer.checkpoint import Checkpoint
from riverinfer.errors import InvalidRequestError
from riverinfer.evidence.certificate import Certificate, Setting, identities
from riverinfer.evidence.forced import Text, cut_at_end, exact_texts, walk_forced
from riverinfer.evidence.learn_then_test import betting_p_value, drawn_order, fixed_sequence
from riverinfer.evidence.prompts import different, prompt_ids, require_room
from riverinfer.progress import Progress
from riverinfer.sampling import check_integer

if TYPE_CHECKING:
    from riverinfer.engine import Engine

# Dense where layers of usual models change the state by a few percent. At -1 every token leaves after min_depth layers.
GRID = (0.9999, 0.999, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5, -1.0)
HORIZON = 64
LEAST = 1e-12  # of a bound or a probability, and of what is left to 1


def check_share(name: str, value: float) -> None:
    """Raise InvalidRequestError naming ``name`` unless ``value`` is at least ``LEAST`` from 0 and from 1."""
    if not LEAST <= value <= 1 - LEAST:
        remedy = f"give a number from {LEAST:g} to {1 - LEAST!r}"
        raise InvalidRequestError(f"is {value!r}", field=name, remedy=remedy)


def calibrate_tau(
    engine: Engine,
    prompts: Sequence[str],
    *,
    epsilon: float,
    delta: float,
    horizon: int = HORIZON,
    grid: Sequence[float] = GRID,
    progress: Progress | None = None,
) -> Certificate:
    """Find the loosest tau of ``grid`` (strict to loose) whose risk is below ``epsilon``, wrong with ``delta``.

    The loss of a prompt: of the first ``horizon`` tokens that exact mode says greedily after its answer's first, up to
    the end of text, the share at which the river's likeliest token is another. The exact text is walked token by token
    (``walk_forced``), so what left early is read by all later tokens. Settings are tested by ``fixed_sequence``; those
    after the first that is not certified are not walked. All prompts count, a repeated one once: it is no second draw,
    so what is certified is a mean over different prompts. Only their set decides in which order they are walked and
    tested (``drawn_order``): the test looks along a sequence, and a file that is sorted by difficulty is none of draws.

    The engine must be in river mode with the similarity gate, exact prompts and the whole backbone; its other options
    are those that the certificate is about. Steps of ``progress``: "Exact answers" and, for each setting, "tau T", in
    prompts. Warns, with RiverinferWarning, of repeated prompts.
    Raises InvalidRequestError for other engines or bad values, ContextLengthError for a prompt that does not fit,
    WeightsError if the river is no longer there.
    """
    check_share("epsilon", epsilon)
    check_share("delta", delta)
    check_integer("horizon", horizon, 1)
    _check_grid(grid)
    options, settings = engine.river_options, engine.river_settings
    fits = options.gate == "similarity" and options.prefill == "exact" and not engine.model.offloaded
    if engine.mode != "river" or settings is None or not fits:
        raise InvalidRequestError(
            "needs river mode with the similarity gate, exact prompts and the whole backbone",
            field="calibration",
            remedy='load with mode="river", without gate, prefill and backbone_layers',
        )
    known = identities(Checkpoint.open(engine.model_dir), settings)
    ordered, prompts_hash = drawn_order(different(prompts))
    texts = _answers(engine, ordered, horizon, progress)
    tested: list[Setting] = []

    def p_values() -> Iterator[float]:
        for tau in grid:
            losses, depth = _walk(engine, texts, tau, progress)
            p_value = float(betting_p_value(losses, epsilon, delta))
            tested.append(Setting(float(tau), depth, float(np.mean(losses)), p_value))
            yield p_value

    last = fixed_sequence(p_values(), delta)
    return Certificate(
        tau=None if last is None else float(grid[last]),
        epsilon=epsilon,
        delta=delta,
        prompts=len(texts),
        horizon=horizon,
        grid=tuple(float(tau) for tau in grid),
        tested=tuple(tested),
        prompts_hash=prompts_hash,
        conditions=engine.river_conditions,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **known,
    )


def _check_grid(grid: Sequence[float]) -> None:
    falling = all(after < before for before, after in pairwise(grid))
    if not grid or not falling or not all(-1 <= tau <= 1 for tau in grid):
        raise InvalidRequestError(f"is {grid!r}", field="grid", remedy="give falling numbers from 1 to -1")


def _answers(engine: Engine, prompts: Sequence[str], horizon: int, progress: Progress | None) -> list[Text]:
    """Exact mode's answers, each at most ``horizon`` + 1 tokens, its end of text included."""
    encoded = prompt_ids(engine, prompts)
    require_room(engine, encoded, horizon + 1, "lower --horizon (horizon)")
    texts = []
    for number, prompt_and_ids in enumerate(encoded, 1):
        (text,) = exact_texts(engine, [prompt_and_ids], horizon + 1)
        texts.append(cut_at_end(engine, text))
        if progress is not None:
            progress("Exact answers", number, len(encoded), "prompts")
    return texts


def _walk(engine: Engine, texts: list[Text], tau: float, progress: Progress | None) -> tuple[list[float], float]:
    """Each text's loss at ``tau``, and the mean depth of all tokens. An answer of one token has no loss."""
    options = replace(engine.river_options, tau=tau).limited(engine.config.num_layers, engine.model.held_layers)
    losses: list[float] = []
    depths: list[int] = []
    for number, text in enumerate(texts, 1):
        differ: list[bool] = []
        if len(text.answer) > 1:
            walked = walk_forced(engine, text, options.make_gate(), repair=options.repair)
            said = walked.logits[:, : engine.tokenizer.vocab_size].argmax(-1).tolist()
            differ = [ours != exact for ours, exact in zip(said, text.answer[1:], strict=True)]
            depths += walked.depths
        losses.append(sum(differ) / max(1, len(differ)))
        if progress is not None:
            progress(f"tau {tau:g}", number, len(texts), "prompts")
    return losses, float(np.mean(depths)) if depths else float(engine.config.num_layers)
