"""Exit depths as terminal colours: blue for tokens that left at once, by green and yellow to red for all layers."""

from __future__ import annotations

# Steps of the 256-colour palette that stay readable on dark and light backgrounds.
_RAMP = (27, 33, 37, 35, 70, 142, 172, 166, 160)
_RESET = "\x1b[0m"


def color(text: str, depth: int, layers: int) -> str:
    """``text`` in the colour of ``depth`` out of ``layers``."""
    step = min(len(_RAMP) - 1, depth * len(_RAMP) // (layers + 1))
    return f"\x1b[38;5;{_RAMP[step]}m{text}{_RESET}"


def legend(layers: int) -> str:
    """The ramp with the depths at which each colour begins."""
    begins = sorted({-(-step * (layers + 1) // len(_RAMP)) for step in range(len(_RAMP))})
    return "exit depth, in layers: " + " ".join(
        color(f"{depth}+", depth, layers) for depth in begins if depth <= layers
    )
