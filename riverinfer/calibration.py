"""What the backbone's linears read on a few built-in texts: the calibration data of awq rivers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from riverinfer.calibration_prompts import TEXTS
from riverinfer.errors import InvalidRequestError
from riverinfer.kernels.linear import AbsentLinear, Linear
from riverinfer.model import Model
from riverinfer.tokenizer import Tokenizer

MAX_TOKENS = 512


def calibrate(model: Model, tokenizer: Tokenizer) -> BackboneCalibration:
    """The built-in texts under the model's own tokenizer, each cut to its share of 512 tokens.

    Raises InvalidRequestError if layers of the backbone are not loaded.
    """
    if any(isinstance(layer.qkv, AbsentLinear) for layer in model.layers):
        raise InvalidRequestError(
            "an awq river is made with the whole backbone",
            field="backbone_layers",
            remedy="make it first, with riverinfer river build --method awq --bits B --group G, or load without"
            " backbone_layers",
        )
    share = MAX_TOKENS // len(TEXTS)
    return BackboneCalibration(model, [tokenizer.encode(text)[:share] for text in TEXTS])


class BackboneCalibration:
    """A ``weights_convert.channel_scales.Calibration``: ``model``'s backbone on sequences of token ids.

    Iterating walks the layers anew. In memory are the residual streams and the inputs of one layer. ``digest`` is a
    sha256 of the ids.
    """

    def __init__(self, model: Model, sequences: Sequence[Sequence[int]]) -> None:
        self._model, self._sequences = model, sequences
        self.digest = hashlib.sha256(json.dumps([[*ids] for ids in sequences]).encode()).hexdigest()

    @torch.inference_mode()
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Per layer the inputs of its linears, [tokens of all sequences, K] in the model's dtype on its device."""
        model = self._model
        ids = [torch.tensor(part, dtype=torch.int64, device=model.device) for part in self._sequences]
        steps = [model.step_context(0, len(part), len(part)) for part in ids]
        states = [model.embed(part) for part in ids]  # [T, H] each
        for layer in model.layers:
            qkv, gate_up, down = _Recorder(layer.qkv), _Recorder(layer.gate_up), _Recorder(layer.down)
            recording = replace(layer, qkv=qkv, gate_up=gate_up, down=down)
            for index, step in enumerate(steps):
                shape = (layer.num_kv_heads, step.end, layer.head_dim)
                k, v = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in "kv")
                states[index] = recording(states[index], step, k, v)
            recorders = {"qkv": qkv, "gate_up": gate_up, "down": down}
            yield {name: torch.cat(recorder.inputs) for name, recorder in recorders.items()}


class _Recorder:
    """A linear that keeps what it reads. Only its input can be had: its weights may be packed."""

    def __init__(self, linear: Linear) -> None:
        self.in_features, self.weight_bytes, self.bias = linear.in_features, linear.weight_bytes, linear.bias
        self._linear = linear
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return self._linear(x)
