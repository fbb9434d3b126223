"""Which river a model gets when it is loaded, and its way into memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import torch

from riverinfer.calibration import calibrate
from riverinfer.checkpoint import Checkpoint
from riverinfer.config import ModelConfig
from riverinfer.errors import ConversionError, InvalidRequestError, RiverinferWarning, WeightsError
from riverinfer.kernels.quantized_linear import packed_group, quantized_bytes
from riverinfer.loader import head_rows
from riverinfer.model import Model
from riverinfer.progress import Progress
from riverinfer.river import HEADS, attach_river
from riverinfer.river_choice import choose_settings
from riverinfer.river_head import river_head_bytes
from riverinfer.tokenizer import Tokenizer
from riverinfer.weights_convert.quantize import check_shape
from riverinfer.weights_convert.river_artifact import RiverSettings, find_river, head_group, linear_shapes

DRAFTS = ("auto", "river", "lookup")


@dataclass(frozen=True)
class RiverRequest:
    """What river is wanted. ``bits`` and ``group`` None: 4 and 64; in lossless mode, what drafts fastest here.

    head: "quantized" or "exact". draft, in lossless mode: "river" drafts in it, "lookup" only repeats what stands in
    the text and needs none, "auto" has a river where a packed kernel makes it cheaper than the backbone.

    Raises InvalidRequestError for what does not exist.
    """

    bits: int | None = None
    group: int | None = None
    method: str = "hqq"
    head: str = "quantized"
    draft: str = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (("river_head", self.head, HEADS), ("draft", self.draft, DRAFTS)):
            if value not in known:
                remedy = f"use {', '.join(known[:-1])} or {known[-1]}"
                raise InvalidRequestError(f"is {value!r}", field=name, remedy=remedy)
        RiverSettings(*self._settings())

    def _settings(self) -> tuple[int, int, str]:
        return 4 if self.bits is None else self.bits, 64 if self.group is None else self.group, self.method

    @property
    def named(self) -> bool:
        """Whether a certain river is asked for, or one at all, not only whatever drafts fastest."""
        return self.bits is not None or self.group is not None or self.draft == "river"

    def candidates(
        self, config: ModelConfig, mode: str, dtype: torch.dtype, device: torch.device
    ) -> list[RiverSettings]:
        """The settings to choose from in a mode: none if it needs no river, several where speed is to decide.

        Raises InvalidRequestError if what is asked for by name does not fit the model's shapes.
        """
        if mode == "exact" or (mode == "lossless" and self.draft == "lookup"):
            return []
        if mode == "lossless" and self.bits is None and self.group is None:
            # The finest group for 4 bits: its scales cost a tenth more to read and are accepted far more often.
            # A GPU is short of bandwidth only: there the scales of a finer group cost what they weigh.
            groups = (32, 64, 128) if device.type == "cpu" else (64, 32, 128)
            choices = [[RiverSettings(bits, group, self.method) for group in groups] for bits in (4, 8)]
            packed = [[each for each in group if _is_packed(config, each, dtype, device)] for group in choices]
            found = [group[0] for group in packed if group]
            if found or self.draft != "river":
                return found
        named = RiverSettings(*self._settings())
        if mode in ("river", "lossless"):
            for rows, columns in linear_shapes(config).values():
                check_shape((rows, columns), named.bits, named.group)
            return [named]
        return []


def _is_packed(config: ModelConfig, settings: RiverSettings, dtype: torch.dtype, device: torch.device) -> bool:
    return all(
        columns % settings.group == 0 and packed_group(rows, columns, settings.bits, settings.group, dtype, device)
        for rows, columns in linear_shapes(config).values()
    )


def river_bytes(
    config: ModelConfig, settings: RiverSettings, head: str, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that a river holds in memory."""
    total = 0
    for rows, columns in linear_shapes(config).values():
        total += config.num_layers * quantized_bytes(rows, columns, settings.bits, settings.group, dtype, device)
    if head == "quantized":
        group = head_group(config, settings)
        total += river_head_bytes(config.vocab_size, config.hidden_size, group, dtype=dtype, device=device)
    return total


def load_river(
    model: Model,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    candidates: list[RiverSettings],
    *,
    head: str,
    progress: Progress | None = None,
    optional: bool = False,
    fused: bool = False,
) -> RiverSettings | None:
    """Give ``model`` its river, made if there is none; of several candidates the one that drafts fastest.

    fused: steps will be those of a GPU's kernels. Raises what ``find_river`` raises. An ``optional`` one that cannot be
    made or kept is done without, with a warning.
    """
    calibrated = partial(calibrate, model, tokenizer)

    def attach(settings: RiverSettings) -> None:
        model.river, model.river_script, model.river_head = [], None, None  # never two in memory
        river = find_river(checkpoint, settings, device=model.device, progress=progress, calibrate=calibrated)
        attach_river(model, river, head_rows(checkpoint, model) if head == "quantized" else None)
        model.script()

    try:
        if len(candidates) == 1:
            attach(candidates[0])
            return candidates[0]
        return choose_settings(model, tokenizer, checkpoint, candidates, attach, progress=progress, fused=fused)
    except (ConversionError, WeightsError) as exc:
        if not optional:
            raise
        model.river, model.river_head = [], None
        message = f"{checkpoint.model_dir}: there is no river, drafts only repeat what stands in the text ({exc})"
        warnings.warn(message, RiverinferWarning, stacklevel=4)
        return None
