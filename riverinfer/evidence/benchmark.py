"""What the evaluations share: questions, how a model is asked them, and a verdict for each answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from riverinfer.sampling import SamplingParams

if TYPE_CHECKING:
    from riverinfer.engine import Engine


@dataclass(frozen=True)
class Item:
    """One question, examples included: the (role, content) of a chat, or a text to be continued up to a ``stop``."""

    name: str
    chat: tuple[tuple[str, str], ...]
    text: str
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """name: as the paper calls it. source: where its questions come from. shots: solved examples before each.

    score: from the answers' texts, one for each item, and the name of who gave them, which are right. It may raise
    RiverinferError.
    """

    name: str
    source: str
    shots: int
    items: tuple[Item, ...]
    score: Callable[[Sequence[str], str], list[bool]]


def ask(engine: Engine, item: Item, *, chat: bool, max_tokens: int) -> tuple[list[int], SamplingParams]:
    """The prompt's ids and greedy sampling. ``chat``: under the model's template, where the model ends its answer.

    Raises ChatTemplateError for a model without a template, ContextLengthError for a prompt too long.
    """
    params = SamplingParams(max_tokens=max_tokens, stop=() if chat else item.stop)
    if not chat:
        return engine.encode_prompt(item.text), params
    shown = engine.session().prompt_text([{"role": role, "content": content} for role, content in item.chat])
    return engine.check_ids(engine.tokenizer.encode(shown, add_special_tokens=False)), params
