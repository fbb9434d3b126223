"""What a Llama-shaped model takes in memory, from its shapes alone, and the paper's figures as such sums.

Nothing here asks the engine: parameters x bytes, 4 bits and their scales, K and V. Left out are biases and the norms of
queries and keys, which are kilobytes, and all that is computed in.
"""

from __future__ import annotations

from dataclasses import dataclass

from riverinfer.config import ModelConfig

GIB = 2**30
SCALES = 4  # bytes a group: scale and offset, bfloat16 both


@dataclass(frozen=True)
class Shapes:
    """What of a model shapes its matrices and its cache."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: ModelConfig, *, tied: bool) -> Shapes:
        sizes = (config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads)
        return cls(*sizes, config.num_kv_heads, config.head_dim, config.vocab_size, tied)

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate)

    @property
    def table(self) -> int:
        """Weights of the embedding; of the head as many."""
        return self.vocab * self.hidden

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def weights(self) -> int:
        """All of them, a tied head counted once."""
        return self.layers * self.layer + self.table * (1 if self.tied else 2) + self.norms

    def kv(self, context: int, itemsize: int = 2) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * context * itemsize


def packed(weights: int, group: int | None) -> int:
    """Bytes of 4-bit weights with the scales of their groups; None: without scales."""
    return weights // 2 + (weights // group * SCALES if group else 0)


def engine_parts(
    shapes: Shapes, context: int, *, backbone: int, group: int | None, itemsize: int = 2, mapped: bool = False
) -> dict[str, int]:
    """Bytes of what riverinfer holds for one sequence: ``backbone`` layers as they are, and the river.

    group: the river's; None: there is no river. mapped: the embedding stays in its file. Elsewhere a tied one is the
    head's. The river has a copy of the head beside it; norms and rotary tables are float32.
    """
    river = group is not None
    rotary = 2 * context * shapes.head_dim
    return {
        "backbone": backbone * shapes.layer * itemsize,
        "river": packed(shapes.layers * shapes.layer, group) if river else 0,
        "head": shapes.table * itemsize + (packed(shapes.table, group) if river else 0),
        "embedding": 0 if mapped or shapes.tied else shapes.table * itemsize,
        "other": (shapes.norms + rotary) * 4,
        "kv": shapes.kv(context, itemsize),
    }


# --- the paper ------------------------------------------------------------------------------------------------------

LLAMA_8B = Shapes(4096, 14336, 32, 32, 8, 128, 128256, tied=False)  # Llama-3.1-8B
PAPER_CONTEXT = 65536
# Peak memory of Llama-3.1-8B at 64K tokens in GiB: arXiv 2604.18396, as ../shared/river-llm.md gives it.
PAPER = {"backbone": 22.96, "Balcony": 26.90, "EE-LLM": 26.47, "full W4": 12.47, "River": 14.73}
PAPER_BACKBONE = 5  # layers of 16 bits with which River's figure comes out
BALCONY_EXITS = 6  # layers more, with which Balcony's does


def paper_sums() -> dict[str, tuple[str, float]]:
    """By the paper's name: a sum that gives its figure to two decimals, in words and GiB. None is known for EE-LLM.

    Our reading: the plainest sums that fit.
    """
    shapes = LLAMA_8B
    kv = shapes.kv(PAPER_CONTEXT)
    whole = 2 * shapes.weights + kv
    rest = 2 * (shapes.table + shapes.norms) + kv  # of a quantized model: one table of 16 bits
    w4 = packed(shapes.layers * shapes.layer + shapes.table, None) + rest
    deep = packed((shapes.layers - PAPER_BACKBONE) * shapes.layer, None)
    river = 2 * (PAPER_BACKBONE * shapes.layer + shapes.table) + deep + rest
    balcony = whole + BALCONY_EXITS * (2 * shapes.layer + shapes.kv(PAPER_CONTEXT) // shapes.layers)
    sums = {
        "backbone": ("all weights in 16 bits + KV", whole),
        "Balcony": (f"that + {BALCONY_EXITS} more layers with their own KV", balcony),
        "full W4": ("layers and head in 4 bits without scales, embedding in 16 + KV", w4),
        "River": (
            f"{PAPER_BACKBONE} layers in 16 bits, only the other {shapes.layers - PAPER_BACKBONE} in 4 bits without"
            " scales, embedding and head in 16 + KV",
            river,
        ),
    }
    return {name: (words, total / GIB) for name, (words, total) in sums.items()}


def ours_as_paper(group: int) -> dict[str, dict[str, int]]:
    """By the paper's name, what riverinfer holds in its place: 8B at 64K in bfloat16, the river in groups of ``group``.

    As on a GPU: the embedding counts. Workspace is left out, as in the paper.
    """
    settings = {"backbone": (LLAMA_8B.layers, None), "full W4": (0, group), "River": (PAPER_BACKBONE, group)}
    return {
        name: engine_parts(LLAMA_8B, PAPER_CONTEXT, backbone=layers, group=river)
        for name, (layers, river) in settings.items()
    }


def ours_over_paper(name: str, group: int) -> dict[str, int]:
    """Bytes by which riverinfer's sum is above the paper's, part by part: they add up to the difference."""
    shapes = LLAMA_8B
    quantized = shapes.layers * shapes.layer + shapes.table
    tables = 2 * shapes.norms + 4 * 2 * PAPER_CONTEXT * shapes.head_dim
    scales = packed(quantized, group) - packed(quantized, None)
    parts = {
        "backbone": {},
        "full W4": {"scales": scales, "head in 16 bits too": 2 * shapes.table},
        "River": {
            "scales": scales,
            f"first {PAPER_BACKBONE} layers in 4 bits too": packed(PAPER_BACKBONE * shapes.layer, None),
            "head in 4 bits too": packed(shapes.table, None),
        },
    }[name]
    return {**parts, "norms in float32, rotary tables": tables}
