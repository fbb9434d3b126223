"""Prompt lookup against a search through the whole text, on texts that grow."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riverinfer.prompt_lookup import LONGEST, SHORTEST, PromptLookup


def search(context: Sequence[int], longest: int) -> tuple[list[int], int]:
    """The definition: the longest match, of those the latest, and what follows it, as far as need be from itself."""
    for size in range(min(LONGEST, len(context) - 1), SHORTEST - 1, -1):
        for end in range(len(context) - 1, size - 1, -1):
            if list(context[end - size : end]) == list(context[-size:]):
                text = list(context)
                for position in range(end, end + longest):
                    if position >= len(context):
                        text.append(text[position])
                    else:
                        text.append(context[position])
                return text[len(context) :], size
    return [], 0


@given(
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=12),
    longest=st.integers(1, 15),
)
@settings(max_examples=300, deadline=None)
def test_it_finds_what_a_search_finds_however_the_text_grows(pieces: list[list[int]], longest: int) -> None:
    lookup, context = PromptLookup(), list[int]()
    for piece in pieces:
        context += piece
        assert lookup.find(context, longest) == search(context, longest)
    assert lookup.find(context, longest) == search(context, longest)  # asked again: the same
    assert PromptLookup().find(context, longest) == search(context, longest)


@pytest.mark.parametrize(
    ("text", "found", "match"),
    [
        ("", "", 0),
        ("a", "", 0),
        ("aa", "", 0),
        ("aaa", "aaaaa", 2),
        ("abab", "ababa", 2),
        ("abcXabc", "XabcX", 3),
        ("abcdefgXabcdefg", "Xabcd", 6),
        ("abXcabYab", "YabYa", 2),
        ("ab_ab", "_ab_a", 2),
        ("abcd", "", 0),
        ("xabYzabcxab", "Yzabc", 3),  # the longest match, though "ab" stands later too
    ],
)
def test_examples(text: str, found: str, match: int) -> None:
    assert PromptLookup().find([ord(letter) for letter in text], 5) == ([ord(letter) for letter in found], match)


def test_every_token_of_a_loop_is_drafted() -> None:
    loop = [7, 8, 9] * 4
    assert PromptLookup().find(loop, 15)[0] == [7, 8, 9] * 5
