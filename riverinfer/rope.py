"""Rotary position embeddings: inverse frequencies of every scaling in use, and cos/sin for given positions.

Sources: RoFormer (arXiv 2104.09864); linear and dynamic NTK scaling; YaRN (arXiv 2309.00071); LongRoPE
(arXiv 2402.13753); the Llama 3.1 frequency bands. The pairing is the half-split one: dimension i rotates with
i + rotary_dim / 2.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from riverinfer.config import QueryScaling, RopeConfig


class Rope:
    """Rotary tables for one model.

    For ``dynamic`` and ``longrope`` the frequencies depend on the length of the whole sequence, so callers pass
    ``seq_len``: the number of positions the sequence has once the current tokens are in it.
    """

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.attention_factor = _attention_factor(config)
        regimes = (0, 1) if config.rope_type == "longrope" else (0,)
        self._fixed = {regime: self._inverse_frequencies(regime).to(device) for regime in regimes}
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, positions: int) -> None:
        """Compute the tables of the first ``positions`` positions now, so that decoding only slices them."""
        for regime in self._fixed:
            self._tables[regime] = self._compute(0, positions, self._fixed[regime])

    def reserved(self, regime: int) -> tuple[Tensor, Tensor]:
        """The reserved tables of a regime: cos and signed sin as in ``tables``, float32 [positions, rotary_dim]."""
        cos, sin = self._tables[regime]
        return cos.squeeze(1), sin.squeeze(1)

    @property
    def nbytes(self) -> int:
        """Bytes of the reserved tables."""
        return sum(cos.nbytes + sin.nbytes for cos, sin in self._tables.values())

    @property
    def length_dependent(self) -> bool:
        """True if K of early positions depends on how long the sequence has become since."""
        return self.config.rope_type in ("dynamic", "longrope")

    def regime(self, seq_len: int) -> int:
        """Which set of frequencies a sequence of ``seq_len`` positions needs *for all of them*.

        K cached under another regime must be computed again. Only longrope switches: 0 short, 1 long.
        """
        if self.config.rope_type == "longrope":
            return int(seq_len > self.config.original_max_position_embeddings)
        return 0

    def scaled_by_length(self, seq_len: int) -> bool:
        """True if K written at this length differs from K the same tokens would get in a shorter sequence."""
        if self.config.rope_type == "dynamic":
            return seq_len > self.config.max_position_embeddings
        return self.regime(seq_len) != 0

    def inverse_frequencies(self, seq_len: int) -> Tensor:
        """Float32 [rotary_dim / 2] for a sequence of ``seq_len`` positions."""
        if self.config.rope_type == "dynamic" and seq_len > self.config.max_position_embeddings:
            return self._inverse_frequencies(seq_len).to(self.device)
        return self._fixed[self.regime(seq_len)]

    def tables(self, start: int, end: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin for positions start .. end - 1, each float32 [T, 1, rotary_dim].

        The first half of sin is negated, so that ``x * cos + roll(x, rotary_dim / 2) * sin`` rotates.
        """
        if self.config.rope_type != "dynamic" or not self.scaled_by_length(seq_len):
            cos, sin = self._tables.get(self.regime(seq_len), (None, None))
            if cos is not None and sin is not None and end <= len(cos):
                return cos[start:end], sin[start:end]
        return self._compute(start, end, self.inverse_frequencies(seq_len))

    def _compute(self, start: int, end: int, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, end, dtype=torch.float32, device=self.device)  # [T]
        angles = torch.outer(positions, inverse_frequencies)  # [T, rotary_dim / 2]
        cos, sin = _cos_sin(angles)
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)

    def _inverse_frequencies(self, key: int) -> Tensor:
        c = self.config
        dim = c.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim  # [dim / 2]
        theta = c.theta
        if c.rope_type == "dynamic":
            assert c.factor is not None
            length = max(key, c.max_position_embeddings)
            theta *= (c.factor * length / c.max_position_embeddings - (c.factor - 1)) ** (dim / (dim - 2))
        base = theta**exponents
        if c.rope_type == "linear":
            assert c.factor is not None
            return (1.0 / base) / c.factor
        if c.rope_type == "llama3":
            return _llama3(c, 1.0 / base)
        if c.rope_type == "yarn":
            return _yarn(c, base)
        if c.rope_type == "longrope":
            return 1.0 / (torch.tensor(c.long_factor if key else c.short_factor) * base)
        return 1.0 / base


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Of float32 angles, rounded once.

    On a CPU not by torch: its first cosine in a process was seen to be off by 1e-4 in some rows, in one process of ten
    on a busy machine, and with it the text.
    """
    if angles.device.type != "cpu":
        return angles.cos(), angles.sin()
    exact = angles.numpy().astype(np.float64)
    return torch.from_numpy(np.cos(exact).astype(np.float32)), torch.from_numpy(np.sin(exact).astype(np.float32))


def query_scale(scaling: QueryScaling, positions: Tensor) -> Tensor:
    """Llama-4 query scale for ``positions`` (float32 [T]): float32 [T, 1, 1]."""
    return (1 + scaling.beta * torch.log(1 + torch.floor(positions / scaling.period)))[:, None, None]


def _yarn_mscale(scale: float, mscale: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _attention_factor(c: RopeConfig) -> float:
    """The factor on cos and sin (YaRN section 3.4; LongRoPE)."""
    if c.rope_type not in ("yarn", "longrope"):
        return 1.0
    if c.attention_factor is not None:
        return c.attention_factor
    factor = c.factor or c.max_position_embeddings / c.original_max_position_embeddings
    if c.rope_type == "longrope":
        if factor <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(c.original_max_position_embeddings))
    if c.mscale and c.mscale_all_dim:
        return _yarn_mscale(factor, c.mscale) / _yarn_mscale(factor, c.mscale_all_dim)
    return _yarn_mscale(factor)


def _llama3(c: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Low frequencies are divided by the factor, high ones kept, those between interpolated."""
    assert c.factor is not None
    old_length = c.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    low, high = old_length / c.low_freq_factor, old_length / c.high_freq_factor
    scaled = torch.where(wavelength > low, inv_freq / c.factor, inv_freq)
    smooth = (old_length / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    between = (wavelength >= high) & (wavelength <= low)
    return torch.where(between, (1 - smooth) * scaled / c.factor + smooth * scaled, scaled)


def _yarn(c: RopeConfig, base: Tensor) -> Tensor:
    """Blend of interpolated and kept frequencies over a ramp between two numbers of rotations."""
    dim = c.rotary_dim
    factor = c.factor or c.max_position_embeddings / c.original_max_position_embeddings

    def dimension_of(rotations: float) -> float:
        length = c.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(c.theta))

    low, high = dimension_of(c.beta_fast), dimension_of(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * base) * (1 - kept) + 1.0 / base * kept
