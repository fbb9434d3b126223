"""The river: a quantized copy of every decoder layer's linears and of the head, one safetensors file in the cache.

Tensors ``layers.{i}.{linear}.q|scale|offset`` for the linears ``qkv`` (q, k and v stacked by rows), ``o``,
``gate_up`` (gate over up) and ``down``; ``q`` in the order of ``packing``, ``scale`` and ``offset`` bfloat16
[N, K / group]. ``head.q|scale|offset`` are the same for the head (a tied one: the embedding), always of 4 bits and the
group of ``head_group``; they are not there if that is 0. Norms, biases and embedding are the backbone's; but with
method ``awq`` the inputs of ``qkv`` and ``gate_up`` are to be divided by ``layers.{i}.{linear}.channel_scale``,
float32 [K] (see ``channel_scales``). The head is not scaled: its method is then ``hqq``. The metadata, all strings:
``format`` (version of this layout), ``method``, ``bits``, ``group``, ``source_hash``,
``source_name``, ``source_folder``, ``fingerprint``, ``riverinfer``, and for ``awq`` ``calibration``, a hash of the
calibration tokens.

A river must never be that of other weights, yet hashing 16 GB at every start is too slow. So two things are stored:
``source_hash``, a sha256 over the sizes that shape the linears and over every byte of the weight files, computed once
when the river is built; and ``fingerprint``, for every weight file its name, size, modification time and a sha256 of
its safetensors header and 64 sampled blocks of 4 KiB. A river is accepted if the fingerprint is still that of the
files. If only modification times differ (a copy, a touch), the files are hashed in full, and it is accepted if they
are the same; nothing is rewritten. What is not noticed: an edit outside the sampled blocks that keeps size and
modification time to the nanosecond.

The file's name holds a hash of the model folder's path, not of its weights: weights that change in place meet their
old river, which is refused by name and replaced by the next build.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import riverinfer
from riverinfer.cache_dir import cache_dir
from riverinfer.checkpoint import Checkpoint, TensorReader
from riverinfer.config import ModelConfig
from riverinfer.errors import ConversionError, InvalidRequestError, WeightsError
from riverinfer.progress import Progress
from riverinfer.weights_convert.channel_scales import NORMED, Calibration, LayerScaling
from riverinfer.weights_convert.output_folder import process_is_running
from riverinfer.weights_convert.packing import pack, unpack
from riverinfer.weights_convert.quantize import QuantizedMatrix, check_settings, check_shape, quantize
from riverinfer.whole_file import whole_file

LINEARS = ("qkv", "o", "gate_up", "down")
METHODS = ("hqq", "awq", "rtn")
FORMAT = "2"
HEAD_BITS = 4
_HEAD = "head"
_PARTS = ("q", "scale", "offset")
_CHANNEL_SCALE = "channel_scale"
_DTYPE_NAMES = {torch.int16: "I16", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
_CHUNK = 4 * 2**20
_SAMPLES, _SAMPLE_BYTES, _READ_WHOLE = 64, 4096, 2**20
_CPU = torch.device("cpu")
_building = threading.Lock()


@dataclass(frozen=True)
class RiverSettings:
    """How a river is quantized: 4 or 8 bits; group 32, 64, 128, or 0 for whole rows (8 bits); the method.

    ``hqq`` and ``rtn`` are those of ``quantize``; ``awq`` is ``hqq`` on matrices whose columns were scaled by what the
    model reads on calibration text. Raises InvalidRequestError for what does not exist.
    """

    bits: int = 4
    group: int = 64
    method: str = "hqq"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidRequestError(
                f"unknown method {self.method!r}", field="method", remedy=f"use {', '.join(METHODS)}"
            )
        check_settings(self.bits, self.group, self.quantizer)

    @property
    def quantizer(self) -> str:
        """The method of ``quantize`` that makes the integers."""
        return "hqq" if self.method == "awq" else self.method

    def __str__(self) -> str:
        return f"w{self.bits}g{self.group}-{self.method}"


@dataclass(frozen=True)
class RiverInfo:
    """What a river file says about itself. ``problem`` is None, or why it cannot be read; then settings are None."""

    path: Path
    source_name: str
    source_folder: str
    settings: RiverSettings | None
    source_hash: str
    nbytes: int  # of the file
    problem: str | None = None


class River:
    """An opened river. Tensors are views of the mapped file, which stays mapped only as long as one of them lives.

    ``nbytes``: bytes of all tensors as packed, scales and offsets included. ``weights``: how many they stand for.
    """

    def __init__(self, path: Path, settings: RiverSettings, source_hash: str, shapes: list[_Shape]) -> None:
        self.path, self.settings, self.source_hash = path, settings, source_hash
        self.nbytes = sum(shape.nbytes for shape in shapes)
        self.weights = sum(shape.weights for shape in shapes if shape.name.endswith(".q"))
        self.num_layers = sum(shape.name.endswith(f".{LINEARS[0]}.q") for shape in shapes)
        self._head_group = next((shape.group for shape in shapes if shape.name == f"{_HEAD}.q"), 0)
        self._identity = _identity(path)

    def packed(self, layer: int, linear: str) -> tuple[Tensor, Tensor, Tensor]:
        """Packed q (int16 [N, K/4] or uint8 [N, K]), scale and offset (bfloat16 [N, K / group]) on the CPU.

        Raises InvalidRequestError for a layer or linear that does not exist, WeightsError if the file was replaced
        since it was opened.
        """
        q, scale, offset = self._read(layer, linear, *_PARTS)
        return q, scale, offset

    def channel_scale(self, layer: int, linear: str) -> Tensor | None:
        """What the input of the linear is to be divided by, float32 [K] on the CPU, all positive and finite, or None.

        Raises like ``packed``.
        """
        if self.settings.method != "awq" or linear not in NORMED:
            return None
        return self._read(layer, linear, _CHANNEL_SCALE)[0]

    def _read(self, layer: int, linear: str, *parts: str) -> list[Tensor]:
        if linear not in LINEARS or not 0 <= layer < self.num_layers:
            raise InvalidRequestError(f"the river has no linear {linear!r} in layer {layer}")
        return self._tensors(f"layers.{layer}.{linear}", *parts)

    def _tensors(self, name: str, *parts: str) -> list[Tensor]:
        try:
            if _identity(self.path) != self._identity:
                raise WeightsError("was replaced while in use", file=self.path, remedy="load the model again")
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return [file.get_tensor(f"{name}.{part}") for part in parts]
        except (SafetensorError, OSError) as exc:
            raise WeightsError(f"cannot be read ({exc})", file=self.path, remedy="build the river again") from exc

    def matrix(self, layer: int, linear: str) -> QuantizedMatrix:
        """The linear with its integers unpacked: uint8 [N, K]. Raises like ``packed``."""
        q, scale, offset = self.packed(layer, linear)
        bits, group = self.settings.bits, self.settings.group
        return QuantizedMatrix(bits, group, unpack(q, bits, group), scale, offset)

    def head(self) -> QuantizedMatrix | None:
        """The head [vocab, H] in 4 bits, or None if no group divides H. Raises WeightsError like ``packed``."""
        if not self._head_group:
            return None
        q, scale, offset = self._tensors(_HEAD, *_PARTS)
        return QuantizedMatrix(HEAD_BITS, self._head_group, unpack(q, HEAD_BITS, self._head_group), scale, offset)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns [N, K] of a layer's fused linears."""
    hidden = config.hidden_size
    return {
        "qkv": (config.qkv_size, hidden),
        "o": (hidden, config.num_heads * config.head_dim),
        "gate_up": (2 * config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
    }


def head_group(config: ModelConfig, settings: RiverSettings) -> int:
    """The group of the head's copy: that of the linears, else 64, else 32, as divides its columns; 0 if none does."""
    return next((size for size in (settings.group, 64, 32) if size and config.hidden_size % size == 0), 0)


def river_path(checkpoint: Checkpoint, settings: RiverSettings) -> Path:
    """``cache/rivers/<folder name>-<hash of the folder's path>-w4g64-hqq.safetensors``, whether it exists or not."""
    return _rivers_dir() / f"{_model_prefix(checkpoint)}{settings}.safetensors"


def build_river(
    checkpoint: Checkpoint,
    settings: RiverSettings,
    *,
    device: torch.device = _CPU,
    progress: Progress | None = None,
    calibrate: Callable[[], Calibration] | None = None,
) -> Path:
    """The path of the model's river, which is made on ``device`` unless a valid one exists.

    The file is written aside and renamed: an interrupted build leaves nothing, or, if the process was killed, a file
    that the next build removes. One layer is in memory at a time. Steps of ``progress``: "Hashing the weights" (bytes)
    and "Making the river (4-bit)" (layers, the head counting as one). ``calibrate`` is called only to make a river of
    method ``awq``, which needs it; what it returns is walked once, and gives tensors on ``device``.

    Raises InvalidRequestError if the group does not divide a linear's columns or the method wants calibration and there
    is none, WeightsError if the weights cannot be read or hold NaN or inf, ConversionError if the cache cannot be
    written or the weights change meanwhile.
    """
    if settings.method == "awq" and calibrate is None:
        raise InvalidRequestError(
            "awq needs what the model reads on calibration text", field="method", remedy="give calibrate, or use hqq"
        )
    for name, matrix_shape in linear_shapes(checkpoint.config).items():
        check_shape(matrix_shape, settings.bits, settings.group, name)
    path = river_path(checkpoint, settings)
    with _building, _os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        with suppress(WeightsError):
            return open_river(checkpoint, settings).path
        with whole_file(path) as aside:
            calibration = calibrate() if calibrate is not None and settings.method == "awq" else None
            _write(aside, checkpoint, settings, device, progress, calibration)
    return path


def open_river(checkpoint: Checkpoint, settings: RiverSettings) -> River:
    """The model's river, checked from its header and the fingerprint of the weight files.

    Raises WeightsError if there is none, or it is damaged, of other weights, other settings or another version.
    """
    path = river_path(checkpoint, settings)
    if not path.is_file():
        raise WeightsError("there is no such river", file=path, remedy=_build_again(checkpoint, settings))
    shapes = _shapes(checkpoint.config, settings)
    metadata = _read_checked(path, shapes, checkpoint, settings)
    stored, now = _loads(metadata.get("fingerprint")), _fingerprint(checkpoint)
    same = stored == now
    if not same and _without_times(stored) == _without_times(now):
        same = _source_hash(checkpoint, None) == metadata.get("source_hash")
    if not same:
        raise WeightsError(
            "was made from other weights than the model folder now holds",
            file=path,
            remedy=_build_again(checkpoint, settings),
        )
    return River(path, settings, metadata["source_hash"], shapes)


def find_river(
    checkpoint: Checkpoint,
    settings: RiverSettings,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    progress: Progress | None = None,
    calibrate: Callable[[], Calibration] | None = None,
) -> River:
    """The valid river of ``checkpoint``, made if there is none. Nothing is written, or cleaned up, if there is one.

    The options are those of ``build_river``. Raises what ``build_river`` raises.
    """
    try:
        return open_river(checkpoint, settings)
    except WeightsError:
        build_river(checkpoint, settings, device=device, progress=progress, calibrate=calibrate)
        return open_river(checkpoint, settings)


def river_digest(path: Path) -> str:
    """A hash of a river's file: its size, its header and sampled blocks (see above). Raises WeightsError."""
    try:
        sample = _sample(path)
    except OSError as exc:
        raise WeightsError(f"cannot be read ({exc})", file=path, remedy="build the river again") from exc
    return hashlib.sha256(f"{sample['size']} {sample['sampled']}".encode()).hexdigest()


def list_rivers(checkpoint: Checkpoint | None = None) -> list[RiverInfo]:
    """The rivers in the cache, of one model or of all, by name. Whether the weights still match is not looked at."""
    prefix = "" if checkpoint is None else _model_prefix(checkpoint)
    files = (path for path in sorted(_rivers_dir().glob("*.safetensors")) if path.is_file())
    return [_describe(path) for path in files if path.name.startswith(prefix)]


def remove_rivers(checkpoint: Checkpoint | None) -> int:
    """Delete the rivers of one model, or all, and what is kept beside them; returns how many rivers.

    Raises ConversionError if they cannot be deleted.
    """
    with _os_errors(_rivers_dir()):
        infos = list_rivers(checkpoint)
        for info in infos:
            info.path.unlink(missing_ok=True)
        prefix = "" if checkpoint is None else _model_prefix(checkpoint)
        for pattern in ("*choice.json", "*.certificate.json"):
            for beside in _rivers_dir().glob(pattern):
                if beside.name.startswith(prefix):
                    beside.unlink(missing_ok=True)
        if _rivers_dir().is_dir():
            _remove_abandoned(_rivers_dir())
    return len(infos)


# --- the file ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    group: int = 0  # of a packed ``q``, 0 for whole rows

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def weights(self) -> int:
        """Integers in a packed ``q``."""
        return math.prod(self.shape) * (4 if self.dtype == torch.int16 else 1)


def _shapes(config: ModelConfig, settings: RiverSettings) -> list[_Shape]:
    """Every tensor of the file: in the order of the layers, then the head's."""
    shapes = []
    for layer in range(config.num_layers):
        for linear, (rows, columns) in linear_shapes(config).items():
            name = f"layers.{layer}.{linear}"
            shapes += _matrix_shapes(name, rows, columns, settings.bits, settings.group)
            if settings.method == "awq" and linear in NORMED:
                shapes.append(_Shape(f"{name}.{_CHANNEL_SCALE}", torch.float32, (columns,)))
    group = head_group(config, settings)
    if group:
        shapes += _matrix_shapes(_HEAD, config.vocab_size, config.hidden_size, HEAD_BITS, group)
    return shapes


def _matrix_shapes(name: str, rows: int, columns: int, bits: int, group: int) -> list[_Shape]:
    packed = (torch.int16, columns // 4) if bits == 4 else (torch.uint8, columns)
    scales = (rows, columns // (group or columns))
    return [
        _Shape(f"{name}.q", packed[0], (rows, packed[1]), group),
        *[_Shape(f"{name}.{part}", torch.bfloat16, scales) for part in _PARTS[1:]],
    ]


def _write(
    path: Path,
    checkpoint: Checkpoint,
    settings: RiverSettings,
    device: torch.device,
    progress: Progress | None,
    calibration: Calibration | None,
) -> None:
    fingerprint = _fingerprint(checkpoint)
    metadata = {
        "format": FORMAT,
        "method": settings.method,
        "bits": str(settings.bits),
        "group": str(settings.group),
        "source_hash": _source_hash(checkpoint, progress),
        "source_name": _folder(checkpoint).name,
        "source_folder": str(_folder(checkpoint)),
        "fingerprint": json.dumps(fingerprint),
        "riverinfer": riverinfer.__version__,
    }
    if calibration is not None:
        metadata["calibration"] = calibration.digest
    layers = checkpoint.config.num_layers
    with path.open("wb") as stream:
        places = _write_header(stream, metadata, _shapes(checkpoint.config, settings))

        def write(tensors: Iterable[tuple[str, Tensor]]) -> None:
            for name, tensor in tensors:
                stream.seek(places[name])
                stream.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)

        inputs: Iterable[Mapping[str, Tensor] | None] = calibration or itertools.repeat(None, layers)
        for layer, read_on_text in zip(range(layers), inputs, strict=True):
            write(_layer_tensors(checkpoint, layer, settings, device, read_on_text))
            if progress is not None:
                progress(_label(settings), layer + 1, layers + 1, "layers")
        write(_head_tensors(checkpoint, settings, device))
        stream.flush()
        os.fsync(stream.fileno())
    if _fingerprint(checkpoint) != fingerprint:
        raise ConversionError(
            "the weights changed while the river was made", file=checkpoint.model_dir, remedy="try again"
        )
    if progress is not None:
        progress(_label(settings), layers + 1, layers + 1, "layers")


def _layer_tensors(
    checkpoint: Checkpoint,
    layer: int,
    settings: RiverSettings,
    device: torch.device,
    inputs: Mapping[str, Tensor] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a layer's tensors in the file; ``inputs``: its calibration, None for no scaling."""
    scaling = None
    if inputs is not None:
        no_bias = not checkpoint.config.mlp_bias
        scaling = LayerScaling(inputs, bits=settings.bits, group=settings.group, scale_down=no_bias)
    with checkpoint.reader() as read:
        for linear in ("qkv", "o", "down", "gate_up"):  # the order that ``LayerScaling`` wants
            name = f"layers.{layer}.{linear}"
            weight = _read_fused(read, checkpoint.config, layer, linear, device)
            with _named(name):
                if scaling is not None:
                    weight, channel_scale = scaling(linear, weight)
                    if channel_scale is not None:
                        yield f"{name}.{_CHANNEL_SCALE}", channel_scale
                yield from _matrix_tensors(name, weight, settings.bits, settings.group, settings.quantizer)


def _head_tensors(
    checkpoint: Checkpoint, settings: RiverSettings, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    group = head_group(checkpoint.config, settings)
    if not group:
        return
    with checkpoint.reader() as read, _named(_HEAD):
        weight = read(checkpoint.head_name).to(device)  # [vocab, H], as stored
        yield from _matrix_tensors(_HEAD, weight, HEAD_BITS, group, settings.quantizer)


def _matrix_tensors(name: str, weight: Tensor, bits: int, group: int, method: str) -> Iterator[tuple[str, Tensor]]:
    matrix = quantize(weight, bits=bits, group=group, method=method)
    packed = pack(matrix.q, bits, group)
    for part, tensor in zip(_PARTS, (packed, matrix.scale, matrix.offset), strict=True):
        yield f"{name}.{part}", tensor


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Damaged weights say whose they are."""
    try:
        yield
    except WeightsError as exc:
        raise WeightsError(exc.problem, field=name, remedy=exc.remedy) from exc


def _write_header(stream: BinaryIO, metadata: dict[str, str], shapes: list[_Shape]) -> dict[str, int]:
    """Write the safetensors header and return where in the file each tensor belongs."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset, offsets = 0, {}
    # Wide types first keeps every tensor aligned to its own item size.
    for item in sorted(shapes, key=lambda item: -item.dtype.itemsize):
        header[item.name] = {
            "dtype": _DTYPE_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.nbytes],
        }
        offsets[item.name] = offset
        offset += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + place for name, place in offsets.items()}


def _read_fused(read: TensorReader, config: ModelConfig, layer: int, linear: str, device: torch.device) -> Tensor:
    """A layer's fused linear, float32 [N, K] on ``device``."""
    names = {
        "qkv": ["self_attn.qkv_proj"] if config.fused_checkpoint else [f"self_attn.{x}_proj" for x in "qkv"],
        "o": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_up_proj"] if config.fused_checkpoint else ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }[linear]
    return torch.cat([read(f"model.layers.{layer}.{x}.weight").to(device, torch.float32) for x in names])


def _read_checked(path: Path, shapes: list[_Shape], checkpoint: Checkpoint, settings: RiverSettings) -> dict[str, str]:
    """The metadata of a river file whose header is as ``shapes`` and ``settings`` say."""
    remedy = _build_again(checkpoint, settings)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            wanted = {"format": FORMAT, "method": settings.method}
            wanted |= {"bits": str(settings.bits), "group": str(settings.group)}
            for field, value in wanted.items():
                if metadata.get(field) != value:
                    raise WeightsError(f"is {metadata.get(field)}, not {value}", file=path, field=field, remedy=remedy)
            names = {item.name for item in shapes}
            differing = names ^ set(file.keys())
            if differing:
                odd = min(differing)
                raise WeightsError(
                    f"is {'missing' if odd in names else 'not known'}: the file does not hold the layers of this model",
                    file=path,
                    field=odd,
                    remedy=remedy,
                )
            for item in shapes:
                view = file.get_slice(item.name)
                if tuple(view.get_shape()) != item.shape or view.get_dtype() != _DTYPE_NAMES[item.dtype]:
                    raise WeightsError(
                        f"is {view.get_dtype()} {list(view.get_shape())}, not "
                        f"{_DTYPE_NAMES[item.dtype]} {list(item.shape)}",
                        file=path,
                        field=item.name,
                        remedy=remedy,
                    )
                if item.name.endswith(f".{_CHANNEL_SCALE}"):
                    scale = file.get_tensor(item.name)
                    if not bool(((scale > 0) & scale.isfinite()).all()):
                        raise WeightsError(
                            "has scales that are not positive and finite", file=path, field=item.name, remedy=remedy
                        )
    except (SafetensorError, OSError) as exc:
        raise WeightsError(f"is damaged or cut off ({exc})", file=path, remedy=remedy) from exc
    return metadata


def _describe(path: Path) -> RiverInfo:
    nbytes = 0
    try:
        nbytes = path.stat().st_size
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"has format {metadata.get('format')}, not {FORMAT}")
        settings = RiverSettings(int(metadata["bits"]), int(metadata["group"]), metadata["method"])
        name, folder, source_hash = (metadata[x] for x in ("source_name", "source_folder", "source_hash"))
    except (SafetensorError, OSError, ValueError, KeyError) as exc:
        return RiverInfo(path, "", "", None, "", nbytes, problem=f"{exc}")
    return RiverInfo(path, name, folder, settings, source_hash, nbytes)


# --- the source -------------------------------------------------------------------------------------------------


def _source_files(checkpoint: Checkpoint) -> list[Path]:
    return sorted({entry.file for entry in checkpoint.entries.values()})


def _source_hash(checkpoint: Checkpoint, progress: Progress | None) -> str:
    """sha256 over what of config.json shapes the linears, and name, size and bytes of every weight file."""
    config, files = checkpoint.config, _source_files(checkpoint)
    layout = [config.num_layers, config.fused_checkpoint, config.nested, linear_shapes(config)]
    digest = hashlib.sha256(json.dumps(layout, sort_keys=True).encode())
    try:
        sizes = [path.stat().st_size for path in files]
        done, total = 0, sum(sizes)
        for path, size in zip(files, sizes, strict=True):
            digest.update(f"\0{path.name}\0{size}\0".encode())
            with path.open("rb", buffering=0) as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None and done < total:
                        progress("Hashing the weights", done, total, "B")
    except OSError as exc:
        raise WeightsError(f"cannot be read ({exc})", file=checkpoint.model_dir, remedy="check the files") from exc
    if progress is not None:
        progress("Hashing the weights", total, total, "B")
    return digest.hexdigest()


def _fingerprint(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """For each weight file its name, size in bytes, modification time in ns and the sha256 of sampled bytes."""
    try:
        return [_sample(path) for path in _source_files(checkpoint)]
    except OSError as exc:
        raise WeightsError(f"cannot be read ({exc})", file=checkpoint.model_dir, remedy="check the files") from exc


def _sample(path: Path) -> dict[str, Any]:
    with path.open("rb", buffering=0) as stream:
        stat = os.fstat(stream.fileno())
        size = stat.st_size
        if size <= _READ_WHOLE:
            digest = hashlib.sha256(stream.read())
        else:
            length = 8 + min(int.from_bytes(stream.read(8), "little"), size)
            stream.seek(0)
            digest = hashlib.sha256(stream.read(length))
            for number in range(_SAMPLES):
                stream.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return {"name": path.name, "size": size, "mtime_ns": stat.st_mtime_ns, "sampled": digest.hexdigest()}


def _without_times(fingerprint: Any) -> Any:
    if not isinstance(fingerprint, list) or not all(isinstance(item, dict) for item in fingerprint):
        return None
    return [{key: value for key, value in item.items() if key != "mtime_ns"} for item in fingerprint]


def _loads(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except ValueError:
        return None


# --- names ------------------------------------------------------------------------------------------------------


def _rivers_dir() -> Path:
    return cache_dir() / "rivers"


def _folder(checkpoint: Checkpoint) -> Path:
    return Path(os.path.realpath(checkpoint.model_dir))


def _model_prefix(checkpoint: Checkpoint) -> str:
    folder = _folder(checkpoint)
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    # File names end at 255 bytes.
    name = os.fsencode(folder.name)[:100].decode("utf-8", errors="ignore") or "model"
    return f"{name}-{digest}-"


def _label(settings: RiverSettings) -> str:
    return f"Making the river ({settings.bits}-bit)"


def _build_again(checkpoint: Checkpoint, settings: RiverSettings) -> str:
    flags = f"--bits {settings.bits} --group {settings.group} --method {settings.method}"
    return f"build it with: riverinfer river build {checkpoint.model_dir} {flags}"


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _remove_abandoned(folder: Path) -> None:
    """Files aside of builds whose process is gone."""
    for path in folder.glob(".*.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not process_is_running(int(pid)):
            path.unlink(missing_ok=True)


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConversionError(
            f"cannot be written ({exc.strerror or exc})",
            file=path,
            remedy="check free space and permissions, or choose another folder with RIVERINFER_CACHE",
        ) from exc
