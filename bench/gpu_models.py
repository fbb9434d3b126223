"""Models of known shapes with random weights, made on the device, and their steps as the engine takes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_run import DEVICE, DRY
from torch import Tensor

from riverinfer.config import ModelConfig, RopeConfig
from riverinfer.device_decode import DeviceDecoder
from riverinfer.device_rounds import RoundLaunches
from riverinfer.device_walk import DeviceWalk, StepKind
from riverinfer.draft_policy import BINS, Plan
from riverinfer.gates import FixedDepth
from riverinfer.kernels import linear_launch, triton_tuning
from riverinfer.kernels.linear import AbsentLinear, Linear, PlainLinear
from riverinfer.kernels.linear_launch import Config
from riverinfer.kernels.quantized_linear import TritonPackedLinear
from riverinfer.kv_arena import KVArena
from riverinfer.loader import Embedding
from riverinfer.model import DecoderLayer, Model
from riverinfer.river_head import RiverHead
from riverinfer.sampling import SamplingParams
from riverinfer.weights_convert.quantize import quantize

GROUP = 32 if DRY else 64
Matrix = tuple[int, int, bool, bool, bool]  # N, K, norm, silu, residual


@dataclass(frozen=True)
class Shape:
    """What of a Llama shapes its matrices and its cache."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    theta: float = 500000.0

    @property
    def matrices(self) -> dict[str, Matrix]:
        queries = self.heads * self.head_dim
        return {
            "qkv": (queries + 2 * self.kv_heads * self.head_dim, self.hidden, True, False, False),
            "o": (self.hidden, queries, False, False, True),
            "gate_up": (2 * self.intermediate, self.hidden, True, True, False),
            "down": (self.hidden, self.intermediate, False, False, True),
            "head": (self.vocab, self.hidden, True, False, False),
        }

    def config(self) -> ModelConfig:
        positions = 131072
        return ModelConfig(
            family="llama",
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=1e-5,
            max_position_embeddings=positions,
            rope=RopeConfig("default", self.theta, self.head_dim, positions, positions),
            rope_layers=(True,) * self.layers,
            windows=(None,) * self.layers,
            tie_word_embeddings=self.tied,
        )


LLAMA_8B = Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, False)
LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, True)
SMOLLM = Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, True, 100000.0)
TINY = Shape("tiny", 64, 96, 2, 4, 2, 16, 176, True)
SHAPES = (TINY,) if DRY else (LLAMA_8B, LLAMA_1B, SMOLLM)


def know_blocks(table: Path | None) -> None:
    """Let the kernels use the blocks that are shipped for this GPU, and over them those of ``table``."""
    shipped = [] if DRY else [triton_tuning.SHIPPED / triton_tuning.file_name(torch.cuda.get_device_name())]
    for path in [*shipped, *([table] if table else [])]:
        if path.is_file():
            known = json.loads(path.read_text())
            found = {tuple(int(size) for size in key.split("x")): Config(**fields) for key, fields in known.items()}
            linear_launch.measured.update(found)  # type: ignore[arg-type]


# --- weights ---


def random_matrix(n: int, k: int) -> Tensor:
    """bfloat16 [N, K], such that products have the size of what is multiplied."""
    return torch.empty(n, k, dtype=torch.bfloat16, device=DEVICE).normal_(0, k**-0.5)


def random_packed(n: int, k: int, bits: int = 4, group: int = GROUP) -> TritonPackedLinear:
    """Of the same size."""
    q = torch.randint(0, 2**bits, (n, k), device=DEVICE, dtype=torch.uint8)
    scale = (0.5 + torch.rand(n, k // group, device=DEVICE)) * (k**-0.5 / 0.29 / 2**bits)
    offset = torch.randn(n, k // group, device=DEVICE) * (0.1 * k**-0.5)
    return TritonPackedLinear(q, scale.bfloat16(), offset.bfloat16(), bits=bits)


def packed_copy(weight: Tensor) -> TritonPackedLinear:
    """4 bits, rounded to nearest."""
    made = quantize(weight, bits=4, group=GROUP, method="rtn")
    return TritonPackedLinear(made.q, made.scale, made.offset, bits=4)


def random_model(shape: Shape, *, river: bool = True, held: int | None = None, copy: bool = False) -> Model:
    """A model with as many ``held`` backbone layers (None: all), and its river.

    copy: the river is one of the backbone, rounded; else it has random numbers of its own, which are made sooner.
    """
    config = shape.config()
    head = PlainLinear(random_matrix(shape.vocab, shape.hidden))
    table = head.weight if shape.tied else random_matrix(shape.vocab, shape.hidden)
    packed: Callable[[Tensor], TritonPackedLinear] = packed_copy if copy else lambda w: random_packed(*w.shape)
    layers, rivers = [], []
    for index in range(shape.layers):
        norms = {name: 1 + 0.1 * torch.randn(shape.hidden, device=DEVICE) for name in ("input_norm", "post_norm")}
        absent = held is not None and index >= held
        backbone: dict[str, Linear] = {}
        quantized: dict[str, Linear] = {}
        for name, (n, k, *_) in shape.matrices.items():
            if name == "head":
                continue
            plain = PlainLinear(random_matrix(n, k))
            backbone[name] = AbsentLinear() if absent else plain
            if river:
                quantized[name] = packed(plain.weight)
        layers.append(_layer(config, norms, backbone))
        if river:
            rivers.append(_layer(config, norms, quantized))
    model = Model(
        config,
        embed=Embedding(table, shared=shape.tied),
        layers=layers,
        final_norm=1 + 0.1 * torch.randn(shape.hidden, device=DEVICE),
        head=head,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    model.river = rivers
    if river:
        model.river_head = RiverHead(packed(head.weight), lambda ids: head.weight[ids].float())
    return model


def _layer(config: ModelConfig, norms: dict[str, Tensor], linears: dict[str, Linear]) -> DecoderLayer:
    return DecoderLayer(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        use_rope=True,
        window=None,
        **norms,
        **linears,
    )  # type: ignore[arg-type]


def cut(shape: Shape, layers: int) -> Shape:
    return replace(shape, layers=min(layers, shape.layers))


# --- steps ---


class Steps:
    """The steps of a model on a cache that is full of random numbers."""

    def __init__(self, model: Model, ctx_size: int, *, graphs: bool = True) -> None:
        self.model = model
        self.arena = KVArena(model.config, slots=1, ctx_size=ctx_size, dtype=torch.bfloat16, device=DEVICE)
        for layer in self.arena.block:
            layer.normal_()
        model.rope.reserve(ctx_size)
        self.launch(graphs=graphs)

    def launch(self, *, graphs: bool) -> None:
        """New launches on the same model and cache."""
        self.walk = DeviceWalk(self.model, self.arena, graphs=graphs)
        self.decoder = DeviceDecoder(self.walk, self.model.config.vocab_size)
        self.rounds = RoundLaunches(self.decoder)
        self.model.device_walk = self.walk

    def place(self, position: int, token: int = 7, params: SamplingParams | None = None) -> None:
        """The next step reads ``token`` at ``position``."""
        sequence: Any = SimpleNamespace(tokens=[0] * position, slot=0)
        generation: Any = SimpleNamespace(context=[0] * position + [token], params=params or SamplingParams())
        self.decoder.place(generation, [(sequence, generation)])

    def path(self, depth: int | None) -> str:
        """Steps that leave the backbone after ``depth`` layers; None: never."""
        return self.walk.set_gate(None if depth is None else FixedDepth(depth))

    def queue(self, path: str) -> Any:
        """A step of the placed row, which is then the token that it chose; what ``read`` gives its record."""
        return self.decoder._queue(StepKind(path, 1, 1))

    def say(self, position: int, token: int, count: int, path: str = "backbone") -> list[tuple[int, float]]:
        """Tokens after ``token`` at ``position``, and their log-probabilities, a step each."""
        self.place(position, token)
        said = []
        for _ in range(count):
            (record,) = self.queue(path).read()
            said.append((int(record[0]), record[1]))
        return said

    def round(self, last: int, position: int, *, given: list[int] | None = None, drafts: int = 0) -> tuple[Any, ...]:
        """Queue a round: verify the ``given`` tokens, or ``drafts`` of the river. ``RoundLaunches.queue``'s moments."""
        plan = Plan(drafts, [1.0] * BINS, 0.0)
        return self.rounds.queue(last, position, position + 1, given or [], plan, [], 0)

    def say_in_rounds(self, position: int, token: int, count: int, drafts: int) -> tuple[list[tuple[int, float]], int]:
        """What ``say`` gives, by drafting and verifying, and in how many rounds."""
        self.place(position, token)
        said: list[tuple[int, float]] = []
        rounds = 0
        while len(said) < count:
            *_, done = self.round(token, position, drafts=drafts)
            done.wait()
            choices, drafted = self.rounds.read()
            agreed = 0
            for draft, choice in zip(drafted, choices, strict=False):
                if draft[0] != choice.token_id:
                    break
                agreed += 1
            said += [(choice.token_id, choice.logprob) for choice in choices[: agreed + 1]]
            position, token, rounds = position + agreed + 1, choices[agreed].token_id, rounds + 1
        return said[:count], rounds

    def scratch_bytes(self) -> int:
        """What steps compute in: buffers that are neither weights nor cache."""
        return int(getattr(self.walk, "nbytes", 0)) + int(getattr(self.decoder, "nbytes", 0))
