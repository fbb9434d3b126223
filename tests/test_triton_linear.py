"""The matrix kernels without a GPU: interpreted against their references, and compiled for NVIDIA's architectures."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_process import LARGEST, Compiled, collect, compile_kernel, needs_triton

HERE = Path(__file__)

Bits = tuple[int, int]  # bits and group; 16, 0: bfloat16
DENSE = (16, 0)
KINDS: list[Bits] = [DENSE, *product((4, 8), (32, 64, 128)), (8, 0)]


@needs_triton
def test_kernels_agree_with_their_references_when_interpreted(tmp_path: Path) -> None:
    collect(__file__, "interpreted_", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_hopper_and_ampere(tmp_path: Path) -> None:
    collect(__file__, "compiled_", tmp_path)


# --- interpreted ---


def interpreted() -> tuple[Any, Any, Any]:
    from riverinfer.kernels import triton_dual_linear, triton_linear, triton_reference

    return triton_linear, triton_dual_linear, triton_reference


def launching() -> Any:
    from riverinfer.kernels import linear_launch

    return linear_launch


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(n: int, k: int, bits: int, group: int, seed: int = 0) -> Any:
    """PackedWeights of random integers; every third row has scale 0."""
    from riverinfer.kernels.packed_weights import packed_weights
    from riverinfer.weights_convert.packing import pack

    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    count = k // group if group else 1
    scale, offset = random(n, count, seed=seed + 1).abs() / 2**bits, random(n, count, seed=seed + 2) / 9
    scale[::3] = 0
    words = pack(q, bits, group or k)
    return packed_weights(words, scale.bfloat16(), offset.bfloat16(), bits=bits, group=group)


def weights(n: int, k: int, kind: Bits) -> tuple[Any, Tensor]:
    """What ``linear`` takes, and the matrix it stands for."""
    if kind == DENSE:
        dense = random(n, k).bfloat16()
        return dense, dense
    made = packed(n, k, *kind)
    return made, made.dequantize()


def surroundings(tokens: int, n: int, k: int, norm: bool, bias: bool, silu: bool, residual: bool) -> dict[str, Any]:
    """Arguments of ``linear``, x included."""
    return {
        "x": random(tokens, k, seed=3) if norm else random(tokens, k, seed=3).bfloat16(),
        "norm": random(k, seed=4) if norm else None,
        "eps": 1e-5,
        "bias": random(n, seed=5).bfloat16() if bias else None,
        "silu": silu,
        "residual": random(tokens, n // 2 if silu else n, seed=6) if residual else None,
    }


def assert_close(got: Tensor, want: Tensor, tolerance: float = 3e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).norm() <= tolerance * want.norm()


OPTIONS = list(product((False, True), repeat=4))  # norm, bias, silu, residual


@pytest.mark.parametrize("kind", KINDS)
def interpreted_formula(kind: Bits) -> None:
    """Combinations of options, of the commonest kinds all, with shapes, splits and numbers of tokens in turn."""
    triton_linear, _, reference = interpreted()
    group = kind[1] or 16
    shapes = [(n, k) for n, k in ((70, 96), (40, 112), (64, 128), (34, 64), (6, 256)) if k % group == 0]
    if kind == (8, 0):
        shapes = [(70, 96), (34, 192)]
    every = 1 if kind in (DENSE, (4, 64)) else 5
    for index, options in enumerate(OPTIONS[::every]):
        n, k = shapes[index % len(shapes)]
        tokens = (1, 3, 8, 9, 16)[index % 5]
        config = launching().Config(block_n=32, split=(1, 2, 3)[index % 3], block_k=(16, 64)[index % 2])
        arguments = surroundings(tokens, n, k, *options)
        weight, matrix = weights(n, k, kind)
        x = arguments.pop("x")
        got = triton_linear.linear(x, weight, **arguments, out_dtype=torch.float32, config=config)
        assert_close(got, reference.linear(x, matrix, **arguments))


@pytest.mark.parametrize(("n", "k"), [(50, 576), (20, 1536)])
@pytest.mark.parametrize("kind", [DENSE, (4, 64), (8, 64)])
def interpreted_default_blocks(n: int, k: int, kind: Bits) -> None:
    """The blocks that ``config_for`` chooses, for widths that they do not divide; bfloat16 rounds to nearest even."""
    triton_linear, _, reference = interpreted()
    weight, matrix = weights(n, k, kind)
    x = random(2, k).bfloat16()
    got = triton_linear.linear(x, weight)
    want = reference.linear(x, matrix)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, 3e-3)
    exact = triton_linear.linear(x, weight, out_dtype=torch.float32)
    assert torch.equal(got, exact.bfloat16())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", [DENSE, (4, 64), (8, 64)])
def interpreted_rows(kind: Bits, norm: bool) -> None:
    """A row has the same bits alone, in a batch of any size, and in another place of it."""
    triton_linear, _, _ = interpreted()
    config = launching().Config(block_n=32, split=2, packed_k=64)
    weight, _ = weights(24, 128, kind)
    arguments = surroundings(16, 24, 128, norm, True, False, True)
    x, residual = arguments.pop("x"), arguments.pop("residual")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(9))

    def call(rows: Tensor | slice) -> Tensor:
        given = {**arguments, "residual": residual[rows].contiguous(), "config": config}
        return triton_linear.linear(x[rows].contiguous(), weight, **given)

    whole = call(slice(0, 16))
    assert torch.equal(call(order), whole[order])
    for tokens in (1, 7, 8, 9, 15) if norm else range(1, 16):
        assert torch.equal(call(slice(0, tokens)), whole[:tokens])
        assert torch.equal(call(slice(tokens, tokens + 1)), whole[tokens : tokens + 1])


def interpreted_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler is told does not depend on the number of tokens, which only adds blocks of columns."""
    triton_linear, triton_dual_linear, _ = interpreted()
    launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **options: launches.append((grid, options))

    monkeypatch.setattr(triton_linear, "linear_kernel", Recorder())
    monkeypatch.setattr(triton_dual_linear, "dual_linear_kernel", Recorder())
    dense, river = random(512, 512).bfloat16(), packed(512, 512, 4, 64)
    for call in (
        lambda x: triton_linear.linear(x, dense),
        lambda x: triton_linear.linear(x, river),
        lambda x: triton_dual_linear.dual_linear(
            x, torch.zeros(len(x), dtype=torch.int32), dense, river, out=torch.empty(len(x), 512)
        ),
    ):
        launches.clear()
        for tokens in range(1, 17):
            call(random(tokens, 512).bfloat16())
        assert all(options == launches[0][1] for _, options in launches)
        assert [grid for grid, _ in launches] == [(1 + (t > 8), *launches[0][0][1:]) for t in range(1, 17)]
        assert launches[0][0][2] > 1  # split, so that this covers it


@pytest.mark.parametrize("kind", [DENSE, (4, 64), (8, 32)])
@pytest.mark.parametrize("norm", [False, True])
def interpreted_nan(kind: Bits, norm: bool) -> None:
    """NaN and infinity stay in their rows."""
    triton_linear, _, _ = interpreted()
    weight, _ = weights(24, 128, kind)
    arguments = surroundings(9, 24, 128, norm, False, False, False)
    x = arguments.pop("x")
    clean = triton_linear.linear(x, weight, **arguments)
    x[2, 5], x[8, 100] = float("nan"), float("inf")
    got = triton_linear.linear(x, weight, **arguments)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(got[others], clean[others])
    assert got[2].isnan().all()
    assert not got[8].isfinite().any()


def interpreted_norm() -> None:
    """The deferred norm is as close to the exact one as the plain order, rounded after the norm, is."""
    triton_linear, _, _ = interpreted()
    weight = random(64, 256).bfloat16()
    x, norm = random(4, 256, seed=1) * 30, random(256, seed=2)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.double()
    want = exact @ weight.double().T
    plain = exact.bfloat16().double() @ weight.double().T
    got = triton_linear.linear(x, weight, norm=norm, eps=1e-5, out_dtype=torch.float32)
    assert (got - want).norm() < 1.2 * (plain - want).norm()


def interpreted_in_place() -> None:
    """``out`` may be ``residual``; one workspace serves matrices of several shapes, and its counters return to zero."""
    triton_linear, _, reference = interpreted()
    workspace = launching().Workspace("cpu", 2**15, 64)
    for n, k, kind in ((48, 96, DENSE), (70, 128, (4, 64)), (48, 96, (8, 32))):
        weight, matrix = weights(n, k, kind)
        x, residual = random(9, k).bfloat16(), random(9, n)
        want = reference.linear(x, matrix, residual=residual)
        config = launching().Config(block_n=32, split=2)
        got = triton_linear.linear(
            x, weight, residual=residual, out=residual, config=config, workspace=workspace
        )  # fmt: skip
        assert got is residual
        assert_close(got, want)
        assert not workspace.counters.any()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Lowest and highest address of each load of the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: list[tuple[int, int]] = []
    load = InterpreterBuilder.create_masked_load

    def record(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        addresses = ptrs.data[mask.data]
        if addresses.size:
            seen.append((int(addresses.min()), int(addresses.max())))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", record)
    return seen


def reads(loads: list[tuple[int, int]], tensor: Tensor) -> bool:
    return any(low < tensor.data_ptr() + tensor.nbytes and high >= tensor.data_ptr() for low, high in loads)


@pytest.mark.parametrize(
    ("kind", "split", "options"),
    [
        ((4, 64), 1, (True, True, True, False)),
        ((4, 32), 2, (False, False, False, True)),
        ((8, 32), 2, (True, True, False, True)),
    ],
)
def interpreted_dual(kind: Bits, split: int, options: tuple[bool, ...], loads: list[tuple[int, int]]) -> None:
    """Each row has the bits of its path alone; weights that no row needs are not read; finished rows stay."""
    triton_linear, triton_dual_linear, reference = interpreted()
    n, k = 40, 128
    config = launching().Config(block_n=32, split=split)
    dense, river = random(n, k).bfloat16(), packed(n, k, *kind)
    workspace = launching().Workspace("cpu", 2**15, 64)
    for flags in ([0], [1], [2], [0, 1, 2, 1, 0], [0] * 8 + [1, 2, 1], [2] * 8 + [0, 1]):
        path = torch.tensor(flags, dtype=torch.int32)
        arguments = surroundings(len(flags), n, k, *options)
        x, residual = arguments.pop("x"), arguments["residual"]
        river_norm = random(k, seed=8) if options[0] else None
        width = n // 2 if options[2] else n
        out = random(len(flags), width, seed=7)
        if residual is None:
            out = out.bfloat16()
        x[path == 2] = float("nan")
        kept = out.clone()
        wanted = reference.dual_linear(x, path, dense, river.dequantize(), out=out, river_norm=river_norm, **arguments)
        alone = {0: triton_linear.linear(x, dense, out=out.clone(), config=config, **arguments)}
        arguments_river = {**arguments, "norm": river_norm}
        alone[1] = triton_linear.linear(x, river, out=out.clone(), config=config, **arguments_river)
        alone[2] = kept
        loads.clear()
        got = triton_dual_linear.dual_linear(
            x, path, dense, river, out=out, river_norm=river_norm, config=config, workspace=workspace, **arguments
        )
        assert got is out
        assert reads(loads, dense) == (0 in flags)
        assert reads(loads, river.q) == reads(loads, river.pairs) == (1 in flags)
        assert reads(loads, x) == any(flag != 2 for flag in flags)
        optional = (arguments["norm"], river_norm, arguments["bias"], residual)
        given = [x, path, dense, river.q, river.pairs, workspace.sums, *(t for t in optional if t is not None)]
        for low, high in loads:
            assert any(t.data_ptr() <= low and high < t.data_ptr() + t.nbytes for t in given)
        for row, flag in enumerate(flags):
            assert torch.equal(out[row], alone[flag][row])
        assert_close(out.float(), wanted.float(), 3e-3)


def interpreted_errors() -> None:
    triton_linear, triton_dual_linear, _ = interpreted()
    from riverinfer.errors import InvalidRequestError
    from riverinfer.kernels.packed_weights import packed_weights

    linear, dense, river = triton_linear.linear, random(32, 64).bfloat16(), packed(32, 64, 4, 32)
    x, h = random(2, 64).bfloat16(), random(2, 64)
    path = torch.zeros(2, dtype=torch.int32)
    config, out = launching().Config(), torch.empty(2, 32)

    def dual(*args: Any, **options: Any) -> Any:
        return triton_dual_linear.dual_linear(x, *args, **{"out": out, **options})

    scale = torch.ones(32, 2, dtype=torch.bfloat16)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("x", lambda: linear(random(17, 64).bfloat16(), dense)),
        ("x", lambda: linear(random(0, 64).bfloat16(), dense)),
        ("x", lambda: linear(h, dense)),
        ("x", lambda: linear(x, dense, norm=random(64))),
        ("x", lambda: linear(x[:, :32], dense)),
        ("x", lambda: linear(random(64, 2).bfloat16().t(), dense)),
        ("x", lambda: linear(random(129).bfloat16()[1:].view(2, 64), dense)),
        ("weight", lambda: linear(x, random(32, 64))),
        ("weight", lambda: linear(random(1, 60).bfloat16(), random(32, 60).bfloat16())),
        ("weight", lambda: linear(x, random(31, 64).bfloat16(), silu=True)),
        ("weight", lambda: linear(x.to("meta"), dense)),
        ("norm", lambda: linear(h, dense, norm=random(32))),
        ("bias", lambda: linear(x, dense, bias=random(16))),
        ("residual", lambda: linear(x, dense, residual=random(2, 64))),
        ("out", lambda: linear(x, dense, out=random(2, 16))),
        ("out", lambda: linear(x, dense, residual=random(2, 32), out=random(2, 32).bfloat16())),
        ("config", lambda: linear(x, dense, config=replace(config, block_n=48))),
        ("config", lambda: linear(x, dense, config=replace(config, split=0))),
        ("config", lambda: linear(x, dense, silu=True, config=replace(config, block_n=16))),
        (
            "workspace",
            lambda: linear(x, dense, config=replace(config, split=2), workspace=launching().Workspace("cpu", 8, 1)),
        ),
        ("path", lambda: dual(path[:1], dense, river)),
        ("path", lambda: dual(path.long(), dense, river)),
        ("river", lambda: dual(path, dense, dense)),
        ("weight", lambda: dual(path, dense, packed(32, 128, 4, 32))),
        ("bits", lambda: packed_weights(river.q, scale, scale, bits=3, group=32)),
        ("group", lambda: packed_weights(river.q, scale, scale, bits=4, group=48)),
        ("q", lambda: packed_weights(river.q, scale, scale, bits=8, group=32)),
        ("scale", lambda: packed_weights(river.q, scale[:, :1], scale, bits=4, group=32)),
        ("offset", lambda: packed_weights(river.q, scale, scale.float(), bits=4, group=32)),
    ]
    for field, call in cases:
        with pytest.raises(InvalidRequestError, match=f"^{field}: "):
            call()


# --- compiled ---

TYPES = {
    "path": "*i32", "norm": "*fp32", "river_norm": "*fp32", "w": "*bf16", "pairs": "*i32", "bias": "*bf16",
    "residual": "*fp32", "workspace": "*fp32", "counters": "*i32", "T": "i32", "eps": "fp32",
}  # fmt: skip
LAYER = {  # of Llama 3.1 8B: N, K, norm, silu, residual
    "qkv": (6144, 4096, True, False, False),
    "o": (4096, 4096, False, False, True),
    "gate_up": (28672, 4096, True, True, False),
    "down": (4096, 14336, False, False, True),
}


def build(matrix: str, kind: Bits, *, dual: bool, capability: int) -> Compiled:
    """The kernel for a matrix of ``LAYER``, alone or ``dual``."""
    from riverinfer.kernels.linear_launch import COLUMNS, config_for
    from riverinfer.kernels.triton_dual_linear import dual_linear_kernel
    from riverinfer.kernels.triton_linear import linear_kernel

    n, k, norm, silu, residual = LAYER[matrix]
    config, (bits, group) = config_for(n, k), kind
    stored = {16: "*bf16", 4: "*i16", 8: "*u8"}[bits]
    types = {**TYPES, "x": "*fp32" if norm else "*bf16", "out": "*fp32" if residual else "*bf16", "q": stored}
    packed_stages = bits != 16 and not dual
    constants: dict[str, Any] = {
        "SILU": silu, "N": n, "K": k, "BITS": bits, "GROUP": group, "BN": config.block_n, "BM": COLUMNS,
        "BK": config.block_k, "STAGES": config.packed_stages if packed_stages else config.stages,
        "PACKED_STAGES": config.packed_stages, "UNROLL": 1 if bits == 16 else config.unroll(group),
        "SPLIT": config.split,
    }  # fmt: skip
    if not dual:
        types["w"] = stored
    absent = ["bias"] + ["norm", "river_norm"] * (not norm) + ["residual"] * (not residual)
    absent += ["workspace", "counters"] * (config.split == 1) + ["pairs"] * (bits == 16)
    constants |= dict.fromkeys(absent)
    function = dual_linear_kernel if dual else linear_kernel
    return compile_kernel(function, types, constants, warps=config.warps, capability=capability)


@pytest.mark.parametrize(
    ("matrix", "kind", "dual", "capability"),
    [
        *((matrix, (4, 64), True, 90) for matrix in ("qkv", "gate_up")),
        *(("gate_up", kind, True, 90) for kind in ((4, 32), (4, 128), (8, 128))),
        ("gate_up", DENSE, False, 90),
        ("down", DENSE, False, 90),
        ("down", (4, 64), False, 90),
        ("o", (8, 64), True, 90),
        ("gate_up", (4, 64), True, 80),
    ],
)
def compiled_instructions(matrix: str, kind: Bits, dual: bool, capability: int) -> None:
    """One kind of matrix instruction, 16-byte copies of weights, no spills, and room on every GPU."""
    made = build(matrix, kind, dual=dual, capability=capability)
    ptx = made.ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx
    assert "wgmma" not in ptx  # it rounds otherwise
    assert re.search(r"cp\.async\.cg\.shared\.global.*0x10,", ptx)
    assert made.shared <= LARGEST
    assert not made.spills
    if kind[0] == 4:
        assert "lop3.b32" in ptx
        assert not re.search(r"cvt\.rn\.f32\.[su]", ptx.replace("cvt.rn.f32.s32", ""))  # no integer is converted


def compiled_for_any_number_of_tokens() -> None:
    """The number of tokens is no constant, and not even its divisibility is: one kernel for all."""
    from riverinfer.kernels.triton_dual_linear import dual_linear_kernel
    from riverinfer.kernels.triton_linear import linear_kernel

    for kernel in (linear_kernel, dual_linear_kernel):
        by_name = {parameter.name: parameter for parameter in kernel.params}
        assert by_name["T"].do_not_specialize
        assert not by_name["T"].is_constexpr
