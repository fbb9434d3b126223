"""Twenty prompts of all kinds for the demo model: what a draft is right about differs from kind to kind."""

from __future__ import annotations

from dataclasses import dataclass

from riverinfer import Engine

STORY = (
    "The harbour of Vestermund was built in 1874, when the herring came so close to the coast that children caught them"
    " with baskets. Within ten years the village had four curing houses, a rope works and a narrow railway that took"
    " the barrels inland. The herring left as suddenly as they had come. In the spring of 1903 the boats returned empty"
    " for six weeks, and by the end of the year two of the curing houses were closed. The railway carried timber for a"
    " while, then visitors, who came for the long beach and the clear air. Today the rope works is a museum."
)
VERSE = "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.\n"


@dataclass(frozen=True)
class Prompt:
    """chat: one user message under the model's template; else text that is continued as it stands."""

    kind: str
    text: str
    chat: bool = True


PROMPTS = [
    Prompt("chat", "Explain how a river shapes the land it flows through."),
    Prompt("chat", "What should I pack for three days in the mountains, and why?"),
    Prompt("chat", "Tell me a story about a lighthouse keeper who finds a letter in a bottle."),
    Prompt("chat", "Why do leaves change colour in autumn?"),
    Prompt("code", "Write a Python function that counts how often each word occurs in a text file."),
    Prompt("code", "Write a Python class for a queue of limited length, with a test of every method."),
    Prompt("code", "def fibonacci(n):\n    if n < 2:\n        return n\n", chat=False),
    Prompt("code", "SELECT name, price FROM products WHERE", chat=False),
    Prompt("list", "List the planets of the solar system with one fact each."),
    Prompt("list", "1. January\n2. February\n3. March\n", chat=False),
    Prompt("list", "Give me five ideas for a birthday party."),
    Prompt("repeat", f"Repeat the following text word for word.\n\n{STORY}"),
    Prompt("repeat", VERSE * 3, chat=False),
    Prompt("repeat", "ha " * 40, chat=False),
    Prompt("other language", "Erkläre in zwei Sätzen, warum der Himmel blau ist."),
    Prompt("other language", "¿Cuál es la capital de Perú y qué se come allí?"),
    Prompt("other language", "東京は日本の首都です。", chat=False),
    Prompt("other language", "Сколько будет дважды два? 🙂"),
    Prompt("long", f"Summarise the following text in three sentences.\n\n{STORY}\n\n{STORY.replace('herring', 'cod')}"),
    Prompt("long", " ".join([STORY, VERSE, STORY.upper(), VERSE.lower()]), chat=False),
]


def prompt_ids(engine: Engine, prompt: Prompt) -> list[int]:
    """What the model reads."""
    if not prompt.chat:
        return engine.encode_prompt(prompt.text)
    text = engine.session().prompt_text([{"role": "user", "content": prompt.text}])
    return engine.tokenizer.encode(text, add_special_tokens=False)
