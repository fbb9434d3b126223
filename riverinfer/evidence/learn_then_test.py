"""Learn then Test (Angelopoulos et al., arXiv 2110.01052): which of several settings has a risk below a bound, surely.

Each setting has the hypothesis H0 "its risk is at least epsilon". A fixed sequence tests them one after another, each
at the full level delta, and ends at the first that is not rejected: to certify a setting whose risk is too high, the
first such one in the sequence must be rejected, which happens with probability at most delta. So the order must be
fixed before the losses are seen. That losses grow along it is not needed; it only lets the sequence come further.

The p-value is that of a bettor (Waudby-Smith & Ramdas, arXiv 2010.09686), chosen once and not by the data. The loss of
a prompt is a mean over many tokens, so losses vary far less than the zeros and ones that the Hoeffding-Bentkus p-value
(Bates et al., arXiv 2101.02703) must allow for: the bettor rejects with far fewer prompts, and where all losses are
zero needs hardly more than it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riverinfer.errors import InvalidRequestError

_MOST = 0.99  # of the bet that one loss of 1 would ruin


def betting_p_value(losses: ArrayLike, epsilon: float, delta: float) -> NDArray[np.float64]:
    """p-values [...] of "the mean is at least epsilon" for independent losses [..., n] in [0, 1], n >= 1.

    Capital starts at 1 and is multiplied by 1 + b_t (epsilon - x_t). The bet b_t, at most 0.99 / (1 - epsilon), knows
    only losses before x_t, so under H0 capital is a supermartingale and the inverse of its highest value a p-value, at
    every level (Ville's inequality). Bets are the predictable plug-in ones for n losses at level ``delta``,
    sqrt(2 log(1 / delta) / (n s2)) with s2 the variance of the losses so far (there, section 4.2), which starts at
    epsilon / 4.

    Raises InvalidRequestError for no losses, or losses outside [0, 1].
    """
    x = np.asarray(losses, dtype=np.float64)
    if x.ndim < 1 or x.shape[-1] < 1 or not bool(((x >= 0) & (x <= 1)).all()):
        raise InvalidRequestError("must be numbers from 0 to 1, at least one", field="losses")
    n = x.shape[-1]
    seen = np.arange(1, n + 1)
    mean = (epsilon + x.cumsum(-1)) / (seen + 1)
    squares = ((x - mean) ** 2).cumsum(-1)
    before = np.concatenate([np.zeros_like(x[..., :1]), squares[..., :-1]], axis=-1)
    variance = (epsilon / 4 + before) / seen
    bets = np.minimum(np.sqrt(2 * math.log(1 / delta) / (n * variance)), _MOST / (1 - epsilon))
    capital = np.log1p(bets * (epsilon - x)).cumsum(-1)
    return np.exp(-np.maximum(capital.max(-1), 0.0))


def drawn_order(texts: Iterable[str]) -> tuple[list[str], str]:
    """The different texts in an order drawn by a hash of their set, and that: sha256, sorted, each with a newline.

    ``betting_p_value`` wants draws in no order of their own. The same prompts are always tested in the same order,
    however they were listed, so that nobody can shuffle a file until one order passes.
    """
    ordered = sorted(set(texts))
    text_hash = hashlib.sha256("".join(f"{text}\n" for text in ordered).encode()).hexdigest()
    drawn = np.random.default_rng(int(text_hash, 16)).permutation(len(ordered))
    return [ordered[index] for index in drawn], text_hash


def fixed_sequence(p_values: Iterable[float], delta: float) -> int | None:
    """Index of the last p-value that is rejected (at most ``delta``) before the first that is not; None without one.

    Takes no value after the first that is not rejected, so they may be computed on the way.
    """
    last = None
    for index, p_value in enumerate(p_values):
        if not p_value <= delta:
            break
        last = index
    return last


def fewest_prompts(epsilon: float, delta: float) -> int:
    """The least n for which n losses of zero have a ``betting_p_value`` of at most ``delta``.

    No other n losses have a lower one where zeros are bet on with ``_MOST`` from the first on, as for small epsilon. A
    bet is never above that, which says from which n on to look.
    """
    fewest = max(1, math.ceil(math.log(1 / delta) / math.log1p(_MOST * epsilon / (1 - epsilon))))
    # Beyond a million epsilon is so small that all bets are: nothing to add.
    while fewest <= 1_000_000 and not _zeros_pass(fewest, epsilon, delta):
        fewest += 1
    return fewest


def least_bound(prompts: int, delta: float) -> float:
    """The least epsilon that ``prompts`` losses certify at level ``delta`` if all are zero; 1 if none."""
    low, high = 0.0, 1.0
    for _ in range(50):  # a larger epsilon is easier to reject: each zero multiplies capital by more
        middle = (low + high) / 2
        low, high = (low, middle) if _zeros_pass(prompts, middle, delta) else (middle, high)
    return high


def _zeros_pass(prompts: int, epsilon: float, delta: float) -> bool:
    return bool(betting_p_value(np.zeros(prompts), epsilon, delta) <= delta)
