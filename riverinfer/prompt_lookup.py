"""Drafts for free: what followed the last time these tokens stood in the text (prompt lookup decoding).

Saxena, "Prompt Lookup Decoding", 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST, LONGEST = 2, 6  # tokens of a match


class PromptLookup:
    """Finds earlier occurrences of the end of a growing text."""

    def __init__(self) -> None:
        # By the last n tokens, the position after their latest occurrence that something follows.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(SHORTEST, LONGEST + 1)]
        self._seen = 0

    def find(self, context: Sequence[int], longest: int) -> tuple[list[int], int]:
        """(``longest`` tokens that followed the longest earlier match, length of the match); ([], 0) if none.

        Where they reach the end of the text they go on as if it had gone on with them. Of several matches of that
        length the latest counts. ``context`` is what it was at the last call, or longer.
        """
        # The end of the text itself is no earlier occurrence: it is entered once something follows it.
        for end in range(max(self._seen, SHORTEST), len(context)):
            for size, table in enumerate(self._after, SHORTEST):
                if size <= end:
                    table[tuple(context[end - size : end])] = end
        self._seen = len(context)
        for size in range(min(LONGEST, len(context)), SHORTEST - 1, -1):
            start = self._after[size - SHORTEST].get(tuple(context[-size:]))
            if start is not None:
                period = len(context) - start
                found = list(context[start : start + longest])
                while len(found) < longest:
                    found.append(found[-period])
                return found, size
        return [], 0
