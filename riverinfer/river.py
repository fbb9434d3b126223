"""The river of a loaded model, and the options that say when tokens enter it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from riverinfer.errors import InvalidRequestError
from riverinfer.gates import FixedDepth, Gate, SimilarityGate, never
from riverinfer.kernels.linear import Linear
from riverinfer.kernels.quantized_linear import make_quantized_linear
from riverinfer.model import DecoderLayer, Model
from riverinfer.river_head import make_river_head
from riverinfer.sampling import check_integer

if TYPE_CHECKING:
    from riverinfer.weights_convert.river_artifact import River

GATES = ("similarity", "fixed", "never", "always")
PREFILLS = ("exact", "last", "min", "fixed")
SCOPES = ("sequence", "batch")
HEADS = ("quantized", "exact")
# What a gate does not read. Prompts at a fixed depth read the depths all the same.
UNREAD = {"fixed": ("tau", "max_depth"), "never": ("tau", "min_depth"), "always": ("tau", "min_depth", "max_depth")}


@dataclass(frozen=True)
class RiverOptions:
    """When a token leaves the backbone in river mode.

    tau: similarity above which the similarity gate opens, one number or one per layer, each from -1 to 1.
    min_depth, max_depth: backbone layers that every token passes, and at which the gate is forced open.
    gate: "similarity" (the paper), "fixed" (the first min_depth layers for every token), "never" or "always".
    prefill: "exact" computes what is new of a prompt in the backbone, since every later token reads its K and V;
        "last" and "min" let each chunk of it exit by the similarity of its last token, or of its least similar one;
        "fixed" lets all of it exit after ``prefill_depth`` layers (None: min_depth).
        What a river turn of the same chat left in the cache is reused as it is.
    scope: in ``Engine.generate_batch``, "sequence" lets each exit for itself, "batch" all at once, when the least
        similar one may (the paper).

    repair: every so many tokens one batched backbone pass rewrites their K and V exactly; the text stays as it was
        said. 0 never does.

    Raises InvalidRequestError for values out of range, and for a ``prefill_depth`` that ``prefill`` does not use.
    """

    tau: float | Sequence[float] = 0.5
    min_depth: int = 1
    max_depth: int | None = None
    gate: str = "similarity"
    prefill: str = "exact"
    prefill_depth: int | None = None
    scope: str = "sequence"
    repair: int = 0

    def __post_init__(self) -> None:
        for name, known in (("gate", GATES), ("prefill", PREFILLS), ("scope", SCOPES)):
            if getattr(self, name) not in known:
                raise InvalidRequestError(f"is {getattr(self, name)!r}", field=name, remedy=f"use {', '.join(known)}")
        check_integer("repair", self.repair, 0)
        if self.repair and self.prefill != "exact":
            raise InvalidRequestError("needs exact prompts", field="repair", remedy='leave prefill at "exact"')
        if self.prefill_depth is not None:
            check_integer("prefill_depth", self.prefill_depth, 0)
            if self.prefill != "fixed":
                raise InvalidRequestError(
                    f'has no effect with prefill "{self.prefill}"',
                    field="prefill_depth",
                    remedy='give prefill="fixed" (--prefill fixed) too, or leave it out',
                )
        SimilarityGate(self.tau, self.min_depth, self.max_depth)

    def limited(self, layers: int, held: int) -> RiverOptions:
        """These options for a model of ``layers`` layers of which the backbone holds only the first ``held``.

        The gate is then forced open there, for prompts too. Raises InvalidRequestError for a depth the model has not.
        """
        if held < self.min_depth == 1:
            return replace(self, min_depth=held).limited(layers, held)  # the default asks for nothing
        for name in ("min_depth", "prefill_depth"):
            depth = getattr(self, name)
            if depth is not None and depth > held:
                problem = f"is {depth}, the model has {layers} layers"
                if held < layers:
                    problem = f"is {depth}, but only {held} backbone layers are loaded"
                raise InvalidRequestError(problem, field=name, remedy="lower it")
        if held == layers:
            return self
        options = replace(self, max_depth=held if self.max_depth is None else min(self.max_depth, held))
        if self.repair:
            raise InvalidRequestError(
                f"needs the whole backbone, {held} layers of {layers} are loaded", field="repair", remedy="leave it out"
            )
        if self.prefill == "exact":
            options = replace(options, prefill="fixed", prefill_depth=held)
        return options

    def make_gate(self, scope: str = "last") -> Gate:
        """A gate for the decode steps of one sequence; with scope "min", of several that exit together."""
        if self.gate == "similarity":
            return SimilarityGate(self.tau, self.min_depth, self.max_depth, scope)
        depth = {"fixed": self.min_depth, "never": never().depth, "always": 0}[self.gate]
        return FixedDepth(depth if self.max_depth is None else min(depth, self.max_depth))

    def make_prefill_gate(self) -> Gate | None:
        """A gate for prompts; None keeps them exact."""
        if self.prefill == "exact":
            return None
        if self.prefill == "fixed":
            depth = self.min_depth if self.prefill_depth is None else self.prefill_depth
            return FixedDepth(depth if self.max_depth is None else min(depth, self.max_depth))
        if self.gate != "similarity":
            return self.make_gate()
        return SimilarityGate(self.tau, self.min_depth, self.max_depth, scope=self.prefill)


@torch.inference_mode()
def attach_river(model: Model, river: River, head_rows: Callable[[Tensor], Tensor] | None = None) -> None:
    """Give ``model`` the river layers of an artifact: the same decoder layers with quantized matrices.

    ``head_rows`` are those of ``loader.head_rows``: with them the river also gets the artifact's head, where that is
    of use (see ``make_river_head``). Without, the exact head serves.

    Rotary tables and biases are the backbone's own tensors; so are norms, unless they bear a channel scale: a linear
    that was quantized as W * s reads x / s, and the norm before it divides.
    """
    # The head comes first: to unpack it takes several times its size, room that the layers fill afterwards.
    model.river_head = None
    if head_rows is not None:
        model.river_head = make_river_head(river.head(), head_rows, dtype=model.dtype, device=model.device)
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

    def norm(weight: Tensor, linear: str) -> Tensor:
        scale = river.channel_scale(index, linear)
        return weight if scale is None else weight / scale.to(model.device)

    return replace(
        layer,
        input_norm=norm(layer.input_norm, "qkv"),
        post_norm=norm(layer.post_norm, "gate_up"),
        qkv=linear("qkv", layer.qkv),
        o=linear("o", layer.o),
        gate_up=linear("gate_up", layer.gate_up),
        down=linear("down", layer.down),
    )
