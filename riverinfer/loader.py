"""Weights from a checkpoint to a model: fused where the runtime fuses, converted once, straight to their place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from riverinfer.checkpoint import Checkpoint, TensorReader
from riverinfer.config import DTYPES
from riverinfer.errors import InvalidRequestError, WeightsError
from riverinfer.kernels.linear import AbsentLinear, Linear, PlainLinear, make_linear, packing_works, triton_runs
from riverinfer.model import DecoderLayer, Model
from riverinfer.progress import Progress
from riverinfer.upload import Upload


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first CUDA GPU if there is one, else the CPU. Raises InvalidRequestError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as exc:
        raise InvalidRequestError(
            f"unknown device {device!r}", field="device", remedy="use auto, cpu, cuda or cuda:N"
        ) from exc
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InvalidRequestError(f"there is no {device} on this machine", field="device", remedy="use auto or cpu")
    if resolved.type not in ("cpu", "cuda"):
        raise InvalidRequestError(
            f"device {device!r} is not supported", field="device", remedy="use auto, cpu, cuda or cuda:N"
        )
    return resolved


def resolve_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """``auto`` is the checkpoint's dtype; on a CPU bfloat16 where it is fast there and stored so, else float32."""
    if dtype == "auto":
        if device.type != "cpu":
            return stored
        return torch.bfloat16 if stored == torch.bfloat16 and packing_works(stored) else torch.float32
    name = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}.get(
        dtype, dtype
    )
    if name not in DTYPES:
        raise InvalidRequestError(f"unknown dtype {dtype!r}", field="dtype", remedy=f"use auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


@torch.inference_mode()
def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backbone_layers: int | None = None,
    check: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Read every weight once. ``check`` refuses NaN and infinite weights (WeightsError).

    ``backbone_layers``: of the layers from there on only norms and biases are read, for the river's use.

    On a CPU the embedding stays in the mapped file and only its used rows become resident; the file must not be
    overwritten in place while the model is loaded.
    """
    config = checkpoint.config
    report = progress or (lambda *_: None)
    total = config.num_layers + 1
    report("Loading weights", 0, total, "layers")
    # The head comes first: it is the largest matrix, and nothing else is resident yet while it is blocked.
    upload = Upload(device) if device.type == "cuda" else None
    with checkpoint.reader() as reader:
        place = _Placer(reader, device, dtype, check, upload)
        final_norm = place.norm("model.norm.weight")
        head = place.linear(checkpoint.head_name.removesuffix(".weight"))
    layers = []
    for index in range(config.num_layers):
        report("Loading weights", index + 1, total, "layers")
        with checkpoint.reader() as reader:
            absent = backbone_layers is not None and index >= backbone_layers
            layers.append(_load_layer(_Placer(reader, device, dtype, check, upload, absent=absent), checkpoint, index))
    if device.type != "cpu" and checkpoint.head_name == "model.embed_tokens.weight":
        assert isinstance(head, PlainLinear)
        embed = Embedding(head.weight, shared=True)
    else:
        with checkpoint.reader() as reader:
            embed = _embedding(reader("model.embed_tokens.weight"), device, dtype, check, upload)
    report("Loading weights", total, total, "layers")
    return Model(config, embed=embed, layers=layers, final_norm=final_norm, head=head, dtype=dtype, device=device)


def head_rows(checkpoint: Checkpoint, model: Model) -> Callable[[Tensor], Tensor]:
    """Lookup of rows of the head, int64 [n] to float32 [n, H] on the model's device. No copy of it is made.

    A head that was blocked at load is looked up in its mapped file, in the dtype it is stored in.
    """
    if checkpoint.head_name == "model.embed_tokens.weight":
        return model.embed
    if isinstance(model.head, PlainLinear):
        weight = model.head.weight
        return lambda ids: weight[ids].float()
    with checkpoint.reader() as reader:
        return _embedding(reader(checkpoint.head_name), model.device, model.dtype, check=False)


def check_finite(checkpoint: Checkpoint) -> None:
    """Read every weight; raise WeightsError naming the first tensor with NaN or infinite values."""
    for name in checkpoint.entries:
        with checkpoint.reader() as reader:
            _require_finite(reader(name), name)


class _Placer:
    """Copies tensors from the mapped files to their device and dtype, several stacked row-wise into one."""

    def __init__(
        self,
        reader: TensorReader,
        device: torch.device,
        dtype: torch.dtype,
        check: bool,
        upload: Upload | None = None,
        *,
        absent: bool = False,
    ) -> None:
        """``upload``: the way to a GPU. ``absent``: leave matrices out."""
        self._reader, self._device, self._dtype, self._check = reader, device, dtype, check
        self._upload, self._absent = upload, absent

    def __call__(self, *names: str) -> Tensor:
        sources = [self._reader(name) for name in names]
        rows = sum(source.shape[0] for source in sources)
        out = torch.empty((rows, *sources[0].shape[1:]), dtype=self._dtype, device=self._device)
        row = 0
        for name, source in zip(names, sources, strict=True):
            if self._check:
                _require_finite(source, name)
            part = out[row : row + source.shape[0]]
            if self._upload is None:
                part.copy_(source)
            else:
                self._upload(source, part)
            row += source.shape[0]
        return out

    def norm(self, name: str) -> Tensor:
        source = self._reader(name)
        if self._check:
            _require_finite(source, name)
        return source.to(device=self._device, dtype=torch.float32, copy=True)

    def linear(self, *names: str) -> Linear:
        biases = [f"{name}.bias" for name in names]
        bias = self(*biases) if biases[0] in self._reader else None
        if self._absent:
            return AbsentLinear(bias)
        weights = [f"{name}.weight" for name in names]
        blocked = self._device.type == "cpu" and packing_works(self._dtype) and not triton_runs("cpu")
        if len(names) == 1 and blocked:
            # Blocking copies anyway: no need for a second copy when the mapped one has the right dtype.
            source = self._reader(weights[0])
            if source.dtype == self._dtype:
                if self._check:
                    _require_finite(source, weights[0])
                return make_linear(source, bias)
        return make_linear(self(*weights), bias)


def _load_layer(place: _Placer, checkpoint: Checkpoint, index: int) -> DecoderLayer:
    config = checkpoint.config
    layer = f"model.layers.{index}"
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    if config.fused_checkpoint:
        qkv, gate_up = ("qkv_proj",), ("gate_up_proj",)  # type: ignore[assignment]
    return DecoderLayer(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        use_rope=config.rope_layers[index],
        window=config.windows[index],
        input_norm=place.norm(f"{layer}.input_layernorm.weight"),
        qkv=place.linear(*[f"{attn}.{name}" for name in qkv]),
        o=place.linear(f"{attn}.o_proj"),
        post_norm=place.norm(f"{layer}.post_attention_layernorm.weight"),
        gate_up=place.linear(*[f"{mlp}.{name}" for name in gate_up]),
        down=place.linear(f"{mlp}.down_proj"),
        q_norm=place.norm(f"{attn}.q_norm.weight") if config.qk_norm else None,
        k_norm=place.norm(f"{attn}.k_norm.weight") if config.qk_norm else None,
    )


class Embedding:
    """Lookup of rows, int64 [n] to float32 [n, H].

    ``mapped``: the table stays in its file. ``shared``: it is the head's, and counted there.
    """

    def __init__(self, table: Tensor, *, mapped: bool = False, shared: bool = False) -> None:
        self.table = table
        self.mapped, self.nbytes = mapped, 0 if shared else table.nbytes

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table[ids].float()


def _embedding(
    table: Tensor, device: torch.device, dtype: torch.dtype, check: bool, upload: Upload | None = None
) -> Embedding:
    """On a CPU the table is the mapped file, in the dtype it is stored in."""
    if check:
        _require_finite(table, "model.embed_tokens.weight")
    if device.type == "cpu":
        return Embedding(table, mapped=True)
    if upload is None:
        return Embedding(table.to(device=device, dtype=dtype))
    held = torch.empty(table.shape, dtype=dtype, device=device)
    upload(table, held)
    return Embedding(held)


def _require_finite(tensor: Tensor, name: str) -> None:
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise WeightsError(
            f"has {bad} weights that are NaN or infinite", field=name, remedy="download the checkpoint again"
        )
