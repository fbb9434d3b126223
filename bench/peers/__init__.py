"""Other engines as contenders: one small adapter a module, none of which must be installed."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Times(NamedTuple):
    """first: seconds from the ids to the first token. rest: from there to the last."""

    first: float
    rest: float


class Peer(Protocol):
    """An engine with one sequence of tokens in its cache. Tokens are chosen greedily and go past any end of text."""

    def version(self) -> tuple[str, str]:
        """The package and its version."""

    def write(self, ids: list[int], count: int, *, sampled: bool = False) -> Times:
        """``count`` tokens after ``ids``, from an empty cache; the cache of ``ids`` stays.

        ``sampled``: at temperature 1.0, by those engines that the benchmark compares on sampled text.
        """

    def resume(self, count: int) -> float:
        """Seconds of ``count`` tokens, a step each, after the ids of the last ``write`` and one token more.

        The ids are not computed again, but for the last ones at most: everything after them is taken back first.
        """
