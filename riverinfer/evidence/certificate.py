"""What a calibration of tau found, kept beside the river's file, and its use by ``tau="auto"``.

A certificate is about one model, river and set of options: whatever else would be run is refused, by name.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import riverinfer
from riverinfer.checkpoint import Checkpoint
from riverinfer.errors import ConversionError, InvalidRequestError, RiverinferWarning, TokenizerError, WeightsError
from riverinfer.evidence.learn_then_test import fixed_sequence
from riverinfer.generation_config import load_generation_config
from riverinfer.weights_convert.river_artifact import RiverSettings, open_river, river_digest, river_path
from riverinfer.whole_file import whole_file

if TYPE_CHECKING:
    import torch

    from riverinfer.river import RiverOptions

AUTO = "auto"
LOSS = (
    "share of a prompt's answer tokens after the first, teacher-forced, at which the river's likeliest token is not"
    " exact's"
)
_VERSION = 2
_SHOWN = {
    "model": "the model's weights",
    "config": "config.json",
    "generation": "the end of text in generation_config.json",
    "tokenizer": "the tokenizer or chat template",
    "river": "the river's file",
}
# All that a tokenizer or ``load_templates`` may read, whichever of them it does.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


@dataclass(frozen=True)
class Setting:
    """One setting: mean backbone layers of a token, mean loss of a prompt, and the p-value of "risk >= epsilon"."""

    tau: float
    mean_depth: float
    mean_loss: float
    p_value: float


@dataclass(frozen=True)
class Certificate:
    """With probability 1 - delta the mean loss over prompts like those tested is below epsilon at ``tau``.

    tau: None if nothing could be certified. prompts: how many, repeated ones once. horizon: tokens judged of each
    answer, at most, after its first, which the exact prompt predicts. grid: the settings, strict to loose, fixed in
    advance. tested: those up to the first that was not certified. model, config, generation, tokenizer, river: see
    ``identities``. prompts_hash: see ``drawn_order``. conditions: see ``text_conditions``.
    """

    tau: float | None
    epsilon: float
    delta: float
    prompts: int
    horizon: int
    grid: tuple[float, ...]
    tested: tuple[Setting, ...]
    model: str
    config: str
    generation: str
    tokenizer: str
    river: str
    prompts_hash: str
    conditions: dict[str, Any]
    date: str
    loss: str = LOSS

    def as_dict(self) -> dict[str, Any]:
        """As in the file."""
        return {"version": _VERSION, **asdict(self)}

    def __post_init__(self) -> None:
        last = fixed_sequence([each.p_value for each in self.tested], self.delta)
        if self.tau != (None if last is None else self.tested[last].tau):
            raise ValueError(f"tau is {self.tau}, which is not the last that was certified")


def text_conditions(
    options: RiverOptions,
    settings: RiverSettings,
    *,
    head: str,
    dtype: torch.dtype,
    device: torch.device,
    fused: bool,
) -> dict[str, Any]:
    """What a text in river mode depends on, beside weights, prompt and tau: JSON values by name."""
    return {
        **{name: value for name, value in asdict(options).items() if name != "tau"},
        "river_settings": str(settings),
        "river_head": head,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "fused": fused,
        "riverinfer": riverinfer.__version__,
    }


def identities(checkpoint: Checkpoint, settings: RiverSettings) -> dict[str, str]:
    """sha256 of what is there now, by name.

    model: the weight files. config: what config.json says. generation: the tokens that end a text. tokenizer: the
    files that prompts' ids depend on, chat templates included. river: the river's file, see ``river_digest``.

    Raises WeightsError without a valid river, ConfigError or TokenizerError for a file that cannot be read.
    """
    river = open_river(checkpoint, settings)
    ends = load_generation_config(checkpoint.model_dir, checkpoint.config).eos_token_ids
    return {
        "model": river.source_hash,
        "config": hashlib.sha256(repr(checkpoint.config).encode()).hexdigest(),
        "generation": hashlib.sha256(repr(ends).encode()).hexdigest(),
        "tokenizer": _tokenizer_hash(checkpoint.model_dir),
        "river": river_digest(river.path),
    }


def _tokenizer_hash(folder: Path) -> str:
    """Of name, length and bytes of each of ``_TOKENIZER_FILES`` that is there."""
    found = hashlib.sha256()
    for path in (path for name in _TOKENIZER_FILES for path in sorted(folder.glob(name)) if path.is_file()):
        try:
            content = path.read_bytes()
        except OSError as exc:
            raise TokenizerError(
                f"cannot be read ({exc.strerror or exc})", file=path, remedy="check its permissions"
            ) from exc
        found.update(f"{path.relative_to(folder)}\n{len(content)}\n".encode(errors="surrogateescape"))
        found.update(content)
    return found.hexdigest()


def certificate_path(river: Path) -> Path:
    """Where the certificate of a river's file is kept."""
    return river.with_suffix(".certificate.json")


def store_certificate(certificate: Certificate, path: Path) -> None:
    """Replace the file at once. Raises ConversionError."""
    try:
        with whole_file(path) as aside:
            aside.write_text(json.dumps(certificate.as_dict(), indent=1) + "\n")
    except OSError as exc:
        raise ConversionError(
            f"cannot be written ({exc.strerror or exc})",
            file=path,
            remedy="check free space and permissions, or choose another folder with RIVERINFER_CACHE",
        ) from exc


def read_certificate(path: Path) -> Certificate:
    """The certificate in a file; whether it holds for what is loaded is not looked at.

    Raises InvalidRequestError if there is none, or it is damaged or of another version.
    """
    remedy = "run: riverinfer calibrate MODEL_DIR --prompts FILE, or give tau a number"
    try:
        data = json.loads(path.read_text())
        version = data.pop("version")
        if version != _VERSION:
            raise InvalidRequestError(f"is {version!r}, not {_VERSION}", file=path, field="version", remedy=remedy)
        tested = tuple(Setting(**{name: float(x) for name, x in each.items()}) for each in data.pop("tested"))
        grid = tuple(float(tau) for tau in data.pop("grid"))
        if not isinstance(data["conditions"], dict):
            raise TypeError("conditions is not an object")
        return Certificate(grid=grid, tested=tested, **data)
    except FileNotFoundError as exc:
        raise InvalidRequestError("no tau is certified for this river", file=path, remedy=remedy) from exc
    except OSError as exc:
        raise InvalidRequestError(f"cannot be read ({exc.strerror or exc})", file=path, remedy=remedy) from exc
    except InvalidRequestError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise InvalidRequestError(f"is damaged ({exc})", file=path, remedy=remedy) from exc


def find_certificate(checkpoint: Checkpoint, settings: RiverSettings, conditions: dict[str, Any]) -> Certificate:
    """The certificate of a model's river, if it is about these files, this river and these conditions.

    Raises InvalidRequestError, naming all that differs, and what ``identities`` raises for files but the river's.
    """
    path = certificate_path(river_path(checkpoint, settings))
    certificate = read_certificate(path)
    there = certificate.conditions
    names = sorted(conditions.keys() | there.keys())
    differing = [
        f"{name} ({there.get(name)} there, {conditions.get(name)} here)"
        for name in names
        if there.get(name) != conditions.get(name)
    ]
    try:
        current = identities(checkpoint, settings)
        differing += [_SHOWN[name] for name, value in current.items() if getattr(certificate, name) != value]
    except WeightsError as exc:
        differing.append(f"the river ({exc.problem})")
    if differing:
        raise InvalidRequestError(
            f"is not about what would run here; these differ: {', '.join(differing)}",
            file=path,
            remedy="calibrate again (riverinfer calibrate, with the same river flags), or give tau a number",
        )
    return certificate


def check_auto(tau: str, mode: str) -> None:
    """Refuse, with InvalidRequestError, a word for tau that is not "auto", or "auto" outside river mode."""
    if tau != AUTO:
        raise InvalidRequestError(f"is {tau!r}", field="tau", remedy=f'give a number, or "{AUTO}"')
    if mode != "river":
        raise InvalidRequestError(f'"{AUTO}" has no effect in {mode} mode', field="tau", remedy='give mode="river"')


def certified_tau(checkpoint: Checkpoint, settings: RiverSettings, conditions: dict[str, Any]) -> float | None:
    """The tau that is certified for what would run. None, with a warning, if a calibration could certify none.

    Raises InvalidRequestError without a certificate that holds.
    """
    if conditions["gate"] != "similarity":
        problem = f'"{AUTO}" has no effect with gate "{conditions["gate"]}"'
        raise InvalidRequestError(problem, field="tau", remedy="leave one of them out")
    if conditions["prefill"] != "exact":
        raise InvalidRequestError(
            f'"{AUTO}" needs exact prompts and the whole backbone',
            field="tau",
            remedy="leave out prefill and backbone_layers (--prefill, --backbone-layers), or give tau a number",
        )
    certificate = find_certificate(checkpoint, settings, conditions)
    if certificate.tau is None:
        warnings.warn(
            f"{checkpoint.model_dir}: the calibration of {certificate.date} could certify no tau"
            f" (disagreement of at most {certificate.epsilon:g}, {certificate.prompts} prompts); running exact mode",
            RiverinferWarning,
            stacklevel=4,
        )
    return certificate.tau
