"""The prompts of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from riverinfer.evidence.prompts import SAMPLE

# For figures that are averaged over prompts, with an interval over them.
PROMPTS = list(SAMPLE[:12])

TEXT = (
    "The harbour of Vestermund was built in 1874, when the herring came so close to the coast that children caught "
    "them with baskets. Within ten years the village had four curing houses, a rope works and a narrow railway that "
    "took the barrels inland. The herring left as suddenly as they had come. In the spring of 1903 the boats "
    "returned empty for six weeks, and by the end of the year two of the curing houses were closed. The railway "
    "carried timber for a while, then visitors, who came for the long beach and the clear air. Today the rope works "
    "is a museum. Its oldest machine still runs on Sundays, and the visitors may take home a piece of the rope that "
    "it makes. The harbour holds more sails than nets, but every June the last three fishermen bless the water, as "
    "their grandfathers did."
)


@dataclass(frozen=True)
class Prompt:
    """name: for tables. sampled: at temperature 1.0 with a fixed seed, else greedy."""

    kind: str
    name: str
    text: str
    sampled: bool = False


# Of several kinds, because what drafting gains depends on how predictable the text is.
KINDS = [
    Prompt("chat", "river", "Explain how a river shapes the land it flows through, from its source to the sea."),
    Prompt("chat", "lighthouse", "Tell me a story about a lighthouse keeper who finds a letter in a bottle."),
    Prompt("chat", "mountains", "What should I pack for three days in the mountains, and why?"),
    Prompt("code", "word count", "Write a Python function that counts how often each word occurs in a text file."),
    Prompt("code", "queue", "Write a Python class for a queue of limited length, with a short test of every method."),
    Prompt("repeat", "copy", f"Repeat the following text word for word.\n\n{TEXT}"),
    Prompt("repeat", "summary", f"Summarise the following text, paragraph by paragraph, with all dates.\n\n{TEXT}"),
    Prompt("sampled", "dream", "Tell me about a strange dream.", sampled=True),
    Prompt("sampled", "words", "Write down a long list of unrelated words, no two alike.", sampled=True),
]
