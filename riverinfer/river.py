"""The river of a loaded model, and the options that say when tokens enter it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from riverinfer.errors import InvalidRequestError
from riverinfer.gates import FixedDepth, Gate, SimilarityGate, always, never
from riverinfer.kernels.linear import Linear
from riverinfer.kernels.quantized_linear import make_quantized_linear
from riverinfer.model import DecoderLayer, Model

if TYPE_CHECKING:
    from riverinfer.weights_convert.river_artifact import River

GATES = ("similarity", "fixed", "never", "always")
PREFILLS = ("exact", "last", "min")


@dataclass(frozen=True)
class RiverOptions:
    """When a token leaves the backbone in river mode.

    tau: similarity above which the similarity gate opens, one number or one per layer, each from -1 to 1.
    min_depth, max_depth: backbone layers that every token passes, and at which the gate is forced open.
    gate: "similarity" (the paper), "fixed" (the first min_depth layers for every token), "never" or "always".
    prefill: "exact" computes what is new of a prompt in the backbone, since every later token reads its K and V;
        "last" and "min" let each chunk of it exit by the similarity of its last token, or of its least similar one.
        What a river turn of the same chat left in the cache is reused as it is.

    Raises InvalidRequestError for values out of range.
    """

    tau: float | Sequence[float] = 0.5
    min_depth: int = 1
    max_depth: int | None = None
    gate: str = "similarity"
    prefill: str = "exact"

    def __post_init__(self) -> None:
        for name, known in (("gate", GATES), ("prefill", PREFILLS)):
            if getattr(self, name) not in known:
                raise InvalidRequestError(f"is {getattr(self, name)!r}", field=name, remedy=f"use {', '.join(known)}")
        SimilarityGate(self.tau, self.min_depth, self.max_depth)

    def make_gate(self) -> Gate:
        """A gate for the decode steps of one sequence."""
        if self.gate == "similarity":
            return SimilarityGate(self.tau, self.min_depth, self.max_depth)
        return {"fixed": FixedDepth(self.min_depth), "never": never(), "always": always()}[self.gate]

    def make_prefill_gate(self) -> Gate | None:
        """A gate for prompts; None keeps them exact."""
        if self.prefill == "exact":
            return None
        if self.gate != "similarity":
            return self.make_gate()
        return SimilarityGate(self.tau, self.min_depth, self.max_depth, scope=self.prefill)


@torch.inference_mode()
def attach_river(model: Model, river: River) -> None:
    """Give ``model`` the river layers of an artifact: the same decoder layers with quantized matrices.

    Norms, rotary tables and biases are the backbone's own tensors.
    """
    model.river = [_river_layer(layer, river, index, model) for index, layer in enumerate(model.layers)]


def _river_layer(layer: DecoderLayer, river: River, index: int, model: Model) -> DecoderLayer:
    def linear(name: str, backbone: Linear) -> Linear:
        matrix = river.matrix(index, name)
        return make_quantized_linear(
            matrix.q.to(model.device),
            matrix.scale.to(model.device),
            matrix.offset.to(model.device),
            bits=matrix.bits,
            dtype=model.dtype,
            bias=backbone.bias,
        )

    return replace(
        layer,
        qkv=linear("qkv", layer.qkv),
        o=linear("o", layer.o),
        gate_up=linear("gate_up", layer.gate_up),
        down=linear("down", layer.down),
    )
