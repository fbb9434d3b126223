"""riverinfer: a standalone inference engine for decoder-only language models.

    from riverinfer import Engine, SamplingParams
    engine = Engine.load(model_dir)
    print(engine.generate("Once upon a time", SamplingParams(max_tokens=64)).text)

Names are imported when first used, so that importing the package costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from riverinfer.engine import Engine as Engine
    from riverinfer.outputs import Output as Output
    from riverinfer.outputs import Stats as Stats
    from riverinfer.outputs import Step as Step
    from riverinfer.sampling import SamplingParams as SamplingParams
    from riverinfer.session import ChatSession as ChatSession

_WHERE = {
    "Engine": "riverinfer.engine",
    "SamplingParams": "riverinfer.sampling",
    "Step": "riverinfer.outputs",
    "Output": "riverinfer.outputs",
    "Stats": "riverinfer.outputs",
    "ChatSession": "riverinfer.session",
}
__all__ = ["ChatSession", "Engine", "Output", "SamplingParams", "Stats", "Step", "__version__"]

try:
    __version__ = version("riverinfer")
except PackageNotFoundError:
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
