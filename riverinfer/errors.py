"""Every error riverinfer raises on purpose. The message names the file, the field and the remedy."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from riverinfer.outputs import Output


class RiverinferError(Exception):
    """Base of all errors caused by input, files or limits rather than by a bug in riverinfer.

    The text reads ``file: field: problem; remedy``, with the parts that are known.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | PathLike[str] | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.field = field
        self.remedy = remedy
        parts = [part for part in (self.file, field, problem) if part]
        super().__init__(": ".join(parts) + (f"; {remedy}" if remedy else ""))


class ModelNotFoundError(RiverinferError):
    """No such folder, a file where a folder was meant, or a folder that holds no model."""


class ConfigError(RiverinferError):
    """``config.json`` or ``generation_config.json`` cannot be read or contradicts itself."""


class UnsupportedModelError(RiverinferError):
    """The checkpoint is well formed but needs a feature riverinfer does not implement."""


class WeightsError(RiverinferError):
    """Weight files are missing, damaged, or do not match the configuration."""


class TokenizerError(RiverinferError):
    """Tokenizer files are missing, damaged, or do not match the model."""


class ChatTemplateError(RiverinferError):
    """A chat template is missing, does not parse, raises, or does not finish."""


class ConversionError(RiverinferError):
    """A source checkpoint cannot be converted, or the destination cannot be written."""


class DemoModelError(RiverinferError):
    """The demo model could not be fetched or is not the file it should be."""


class InvalidRequestError(RiverinferError, ValueError):
    """A prompt, a sampling parameter or an option has a value that cannot be served."""


class ContextLengthError(InvalidRequestError):
    """The tokens do not fit into the context the engine was loaded with.

    ``output``: what had been generated when the context ran full, None if nothing was. ``outputs``: in a batch, all.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str | None = None,
        output: Output | None = None,
        outputs: Sequence[Output] = (),
    ) -> None:
        super().__init__(problem, remedy=remedy)
        self.output, self.outputs = output, outputs


class EngineMemoryError(RiverinferError, MemoryError):
    """Weights or KV arena do not fit into memory. Says how much was needed and what to lower."""


class NoFreeSlotError(RiverinferError):
    """Every KV slot is held by a sequence that is still generating."""


class EngineClosedError(RiverinferError):
    """The engine, or the session, was closed."""


class SessionFileError(RiverinferError):
    """A saved chat cannot be read or written."""


class RiverinferWarning(UserWarning):
    """Something was skipped or chosen on the user's behalf that they may want to know."""
