"""The text that profiles continue."""

from __future__ import annotations

from riverinfer.tokenizer import Tokenizer

TEXT = """The ferry to Halden Island leaves at six in the morning, before the wind gets up, and it does not wait. Marta
had missed it twice that spring, so on the last Friday of May she slept in her clothes and walked to the pier by the
light of the harbour lamps. The captain, an old man who had carried her mother and her grandmother before her, nodded
once and let her stand in the wheelhouse, where it was warm.

They said little. The engine was new, paid for by the county, and quieter than the one she remembered. On the chart
table lay a ruler, a pencil and a notebook in which he wrote down every crossing: the hour, the wind, the number of
passengers, and in the last column a word or two that only he could read. She asked him what the words were for. He
thought about it until they had passed the second buoy. Then he said that a crossing was easily forgotten, because it
was like the one before, and that a word was enough to bring it back.

The island came out of the mist as it always did, first the chapel, then the white wall of the school, then the
houses, one by one, as if somebody were counting them. There had been forty families when she was a child. Now there
were eleven, and the school had two pupils and a teacher who came over on Mondays. The council wanted to close it. That
was why she had come: to measure the building, to write down what was sound and what was rotten, and to say what it
would cost to keep.

She began with the roof. Seen from below it looked whole, but between the third and the fifth rafter the boards had
gone soft, and a knife went into them up to the handle. The chimney leaned. The windows on the north side had been
painted shut so many times that their frames had become one piece with the wall. In the classroom, however, the floor
was as firm as on the day it was laid, and the stove, when she opened its door, still held a little ash from the
winter. She counted the desks, although nobody had asked her to. There were nineteen, in three sizes, and on the lid of
the smallest a child had cut a ship with all its sails set, and under the ship a date.

At noon the teacher brought bread and soup, and they ate on the steps. The teacher was young and had opinions. A
school, she said, was not a matter of rafters. If the council counted only what a building cost, it would close every
one of them in the end, for a building always costs something, and what it gives does not stand in any column. Marta
answered that she had been sent to look at rafters. But in the afternoon, when she wrote her list, she left a space
beneath the last figure, and after some time she wrote a few words into it, in pencil, so that they could still be
taken back.
"""


def profile_ids(tokenizer: Tokenizer, length: int) -> list[int]:
    """``length`` token ids of the text, which begins anew where it is too short, after the tokenizer's own start."""
    ids = tokenizer.encode(TEXT)
    begin = tokenizer.encode(TEXT, add_special_tokens=False)
    while len(ids) < length:
        ids += begin
    return ids[:length]
