"""The attention kernels without a GPU: interpreted against their references and the torch path, and compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_process import LARGEST, collect, compile_kernel, needs_triton

NAN = float("nan")
BACKBONE, RIVER, FINISHED = 0, 1, 2


@needs_triton
def test_kernels_agree_with_their_references_when_interpreted(tmp_path: Path) -> None:
    collect(__file__, "interpreted_", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_hopper_and_ampere(tmp_path: Path) -> None:
    collect(__file__, "compiled_", tmp_path)


# --- interpreted ---


def interpreted() -> tuple[Any, Any, Any]:
    from riverinfer.kernels import triton_attention, triton_reference, triton_rope

    return triton_rope, triton_attention, triton_reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def halves(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).bfloat16()


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bits(x: Tensor) -> Tensor:
    """To compare NaN with NaN, and 0 with -0."""
    return x.view(torch.int16)


def tables(length: int, rotary: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin [S, rotary]."""
    angles = torch.outer(torch.arange(length).float(), 100.0 ** -(torch.arange(rotary // 2) / rotary))
    return torch.cat((angles.cos(), angles.cos()), 1), torch.cat((-angles.sin(), angles.sin()), 1)


def assert_rounded(got: Tensor, want: Tensor) -> None:
    """bfloat16 ``got`` is ``want`` to nearest, but where float32 sums in another order fall on the other side."""
    apart = (bits(got).int() - bits(want.bfloat16()).int()).abs()
    assert got.shape == want.shape
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 0.01


def assert_close(got: Tensor, want: Tensor, tolerance: float = 4e-3) -> None:
    """bfloat16 against float32: row by row, and with no bias."""
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).norm(dim=1) <= tolerance * want.norm(dim=1)).all()
    assert abs((got.float() * want).sum() / want.square().sum() - 1) < tolerance / 4


ROPE = [  # heads, kv heads, head dimension, rotary dimension, norms, query scale
    (4, 2, 16, 16, False, False),
    (3, 1, 8, 8, False, False),
    (2, 2, 96, 96, True, False),
    (2, 1, 64, 16, True, True),
    (2, 1, 128, 96, False, True),
    (3, 3, 16, 0, False, False),
    (2, 1, 16, 0, False, True),
    (1, 1, 256, 256, True, True),
]


def rope_arguments(
    rows: int, length: int, heads: int, kv_heads: int, dim: int, rotary: int, norms: bool, scale: bool
) -> dict[str, Any]:
    """Those of ``rope_and_store`` but for ``kv`` and where the rows are."""
    cos, sin = tables(length, rotary) if rotary else (None, None)
    return {
        "qkv": halves(rows, (heads + 2 * kv_heads) * dim, seed=1) * 3,
        "cos": cos, "sin": sin, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim,
        "q_norm": random(dim, seed=2) if norms else None, "k_norm": random(dim, seed=3) if norms else None,
        "eps": 0.1 if norms else 0.0, "query_scale": random(length, seed=4).abs() if scale else None,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def interpreted_rope(kind: tuple[Any, ...]) -> None:
    """Against the reference; whatever is not a live row's stays as it is."""
    triton_rope, _, reference = interpreted()
    _, kv_heads, dim, *_ = kind
    arguments = rope_arguments(4, 11, *kind)
    where = {"position": ints([10, 3, 0, 7]), "slot": ints([1, 0, 2, 1]), "path": ints([0, 2, 1, 0])}
    block = halves(3, 2, 2, kv_heads, 11, dim, seed=5)  # [slots, layers, ...]: slots are apart
    others, want_others = block.clone(), block.clone()
    kv, want_kv = others[:, 1], want_others[:, 1]
    sevens = torch.full((4, kind[0], dim), 7).bfloat16()
    want = reference.rope_and_store(**arguments, **where, kv=want_kv, out=sevens.clone())
    got = triton_rope.rope_and_store(**arguments, **where, kv=kv, out=sevens.clone())
    assert_rounded(got, want.float())
    assert_rounded(others, want_others.float())
    assert torch.equal(others[:, 0], block[:, 0])
    assert torch.equal(kv[:, 1], want_kv[:, 1])
    assert torch.equal(got[1], sevens[1])
    changed = (kv != block[:, 1]).any(-1).nonzero()[:, [0, 3]].unique(dim=0)  # slot, position
    assert changed.tolist() == [[1, 7], [1, 10], [2, 0]]


def interpreted_far_slot() -> None:
    """A slot that lies more than 2 ** 31 elements into the arena."""
    triton_rope, triton_attention, reference = interpreted()
    heads, dim, length, stride = 2, 16, 8, 2**30 + 16
    memory = torch.empty(2 * stride + 2 * length * dim, dtype=torch.bfloat16)  # mostly never touched
    kv = memory.as_strided((3, 2, 1, length, dim), (stride, length * dim, length * dim, dim, 1))
    where = {"position": ints([0]), "slot": ints([2]), "path": ints([0])}
    arguments = rope_arguments(1, length, heads, 1, dim, dim, False, False)
    q = triton_rope.rope_and_store(**arguments, **where, kv=kv)
    assert torch.equal(kv[2, 1, 0, 0], arguments["qkv"][0, -dim:])
    got = triton_attention.decode_attention(q, kv, **where, rows_per_sequence=1)
    assert torch.equal(got, reference.decode_attention(q, kv, **where).bfloat16())


def case(ends: list[int], n: int, heads: int, kv_heads: int, dim: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``decode_attention``: a sequence whose last row is at ``end`` for each, NaN behind that."""
    count = len(ends)
    kv = torch.full((2, count + 1, 2, kv_heads, length, dim), NAN, dtype=torch.bfloat16)[1]
    slots = torch.randperm(count + 1, generator=torch.Generator().manual_seed(seed)).tolist()[:count]
    for index, (slot, end) in enumerate(zip(slots, ends, strict=True)):
        kv[slot, :, :, : end + 1] = halves(2, kv_heads, end + 1, dim, seed=seed + index)
    return {
        "q": halves(count * n, heads, dim, seed=seed + 99) * 2,
        "kv": kv,
        "position": ints([end + 1 - n + i for end in ends for i in range(n)]),
        "slot": ints([slot for slot in slots for _ in range(n)]),
        "path": ints([i % 2 for i in range(count * n)]),
        "rows_per_sequence": n,
    }


def expected(arguments: dict[str, Any], window: int | None = None) -> Tensor:
    _, _, reference = interpreted()
    return reference.decode_attention(
        *(arguments[name] for name in ("q", "kv", "position", "slot", "path")), window=window
    )


@pytest.mark.parametrize(
    ("ends", "n", "heads", "kv_heads", "dim", "length", "window"),
    [
        ([0], 1, 4, 2, 16, 20, None),
        ([127, 128, 383, 5], 1, 3, 1, 16, 384, None),
        ([40, 255, 256, 299], 2, 7, 1, 8, 300, 60),
        ([270], 5, 8, 2, 64, 280, None),
        ([264, 7], 8, 3, 3, 96, 270, None),
        ([200], 9, 7, 1, 80, 201, 70),
        ([144], 16, 4, 1, 128, 150, 20),
        ([129], 2, 16, 1, 256, 130, None),
        ([131, 4, 129, 3], 4, 2, 2, 16, 132, 1),
        ([255], 1, 71, 1, 16, 256, None),
        ([300], 1, 1, 1, 24, 400, 128),
        ([4095], 2, 2, 1, 16, 4096, None),  # 32 splits
        ([3500], 2, 2, 1, 16, 4096, 700),
    ],
)
def interpreted_formula(
    ends: list[int], n: int, heads: int, kv_heads: int, dim: int, length: int, window: int | None
) -> None:
    """Against the reference; again with the same workspace, which had NaN in it, to the same bits."""
    _, triton_attention, _ = interpreted()
    arguments = case(ends, n, heads, kv_heads, dim, length)
    rows = len(ends) * n
    size = triton_attention.workspace_size(
        rows, n, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, length=length
    )  # fmt: skip
    workspace = triton_attention.Workspace("cpu", *size)
    workspace.sums.fill_(NAN)
    got = triton_attention.decode_attention(**arguments, window=window, workspace=workspace)
    assert_close(got, expected(arguments, window))
    assert not workspace.counters.any()
    if length < 4096:
        out = torch.full_like(got, 7)
        again = triton_attention.decode_attention(**arguments, window=window, workspace=workspace, out=out)
        assert again is out
        assert torch.equal(out, got)


@pytest.mark.parametrize(
    ("n", "start", "window", "kind"),
    [
        (1, 0, None, (4, 2, 16, 16, False, False)),
        (1, 140, None, (4, 2, 16, 8, True, True)),
        (4, 126, None, (3, 1, 64, 64, True, False)),
        (3, 60, 9, (2, 2, 16, 0, False, False)),
    ],
)
def interpreted_layer(n: int, start: int, window: int | None, kind: tuple[Any, ...]) -> None:
    """Both kernels, one after the other, against the layer's own torch path."""
    from riverinfer.kernels.torch_ops import causal_mask
    from riverinfer.model import DecoderLayer, StepContext

    triton_rope, triton_attention, _ = interpreted()
    heads, kv_heads, dim, rotary, _, _ = kind
    length, end = 160, start + n
    arguments = rope_arguments(n, length, *kind)
    cos, sin, scale = (arguments[name] for name in ("cos", "sin", "query_scale"))
    kv = halves(1, 2, kv_heads, length, dim, seed=9)
    mine = kv.clone()
    nothing: Any = None
    layer = DecoderLayer(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, eps=arguments["eps"], use_rope=rotary > 0, window=window,
        q_norm=arguments["q_norm"], k_norm=arguments["k_norm"],
        input_norm=nothing, qkv=nothing, o=nothing, post_norm=nothing, gate_up=nothing, down=nothing,
    )  # fmt: skip
    step = StepContext(
        start=start, end=end,
        cos=cos[start:end, None] if rotary else nothing, sin=sin[start:end, None] if rotary else nothing,
        query_scale=None if scale is None else scale[start:end, None, None],
        masks={window: causal_mask(start, n, window, torch.device("cpu"))},
    )  # fmt: skip
    want = layer._mix(arguments["qkv"], step, kv[0, 0], kv[0, 1])
    where = {"position": ints([*range(start, end)]), "slot": ints([0] * n), "path": ints([0] * n)}
    q = triton_rope.rope_and_store(**arguments, **where, kv=mine)
    got = triton_attention.decode_attention(q, mine, **where, rows_per_sequence=n, window=window)
    assert_rounded(mine, kv.float())
    assert_close(got, want.float(), 8e-3)


@pytest.mark.parametrize(
    ("end", "rows", "heads", "window", "length"),
    [
        (135, 16, 3, None, 256),  # around the end of a split
        (131, 8, 8, 100, 256),
        (131, 8, 4, 3, 256),
        (2303, 2, 2, 1280, 2304),  # the first row begins a split earlier, in another part of the sum
    ],
)
def interpreted_rows(end: int, rows: int, heads: int, window: int | None, length: int) -> None:
    """A row has the same bits alone, and in a batch of any size and order.

    What the last row sees adds up to 0, so that its bits are the roundings of all sums.
    """
    _, triton_attention, _ = interpreted()
    arguments = case([end], rows, heads, 1, 16, length)
    half = (end + 1 if window is None else window) // 2
    keys, values = arguments["kv"][arguments["slot"][0], :, 0, end + 1 - 2 * half : end + 1]  # [2 half, D] each
    keys[half:], values[half:] = keys[:half], -values[:half]
    names = ("q", "position", "slot", "path")

    def call(chosen: list[int], n: int) -> Tensor:
        taken = {name: arguments[name][chosen].contiguous() for name in names}
        return triton_attention.decode_attention(kv=arguments["kv"], **taken, rows_per_sequence=n, window=window)

    whole = call([*range(rows)], rows)
    assert torch.equal(call([*range(rows)], 1), whole)
    assert torch.equal(call([*range(rows)], 2), whole)
    for first, last in ((1, 2), (3, 8), (7, 16)) if rows == 16 else ((0, 1), (1, rows)):
        chosen = [*range(first, last)]
        assert torch.equal(call(chosen, len(chosen)), whole[chosen])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()[:4]
    assert torch.equal(call(order, 1), whole[order])


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


def touches(low: int, high: int, tensor: Tensor) -> bool:
    """Whether a load may be of the memory from the first to the last element of ``tensor``."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return low < tensor.data_ptr() + span * tensor.itemsize and high >= tensor.data_ptr()


def interpreted_finished(loads: list[tuple[int, int]]) -> None:
    """Finished rows keep what is in ``out``, whatever stands in their other fields; nobody reads K and V for them."""
    _, triton_attention, _ = interpreted()
    arguments = case([130, 131, 20, 135], 4, 6, 2, 16, 256)
    flags = [[0] * 4, [1, 0, 2, 2], [2] * 4, [0, 2, 2, 2]]
    path = ints([flag for sequence in flags for flag in sequence])
    clean = triton_attention.decode_attention(**arguments)
    live = path != FINISHED
    kept = halves(16, 96, seed=8)
    arguments |= {"path": path}
    for name, garbage in (("q", NAN), ("position", 10**9), ("slot", 10**9)):
        arguments[name][~live] = garbage
    arguments["kv"][arguments["slot"][4], :, :, 130:] = NAN  # where rows 2 and 3 of sequence 1 would have been
    out = kept.clone()
    loads.clear()
    triton_attention.decode_attention(**arguments, out=out)
    assert torch.equal(out, torch.where(live[:, None], clean, kept))
    kv = arguments["kv"]
    heads = [kv[arguments["slot"][row]].flatten(0, 1) for row in (0, 4, 12)]  # [2 Hkv, S, D] of the sequences
    allowed = [head[: last + 1] for sequence, last in zip(heads, (130, 129, 132), strict=True) for head in sequence]
    inside = [(low, high) for low, high in loads if touches(low, high, kv)]
    assert all(any(touches(low, high, head) for low, high in inside) for head in allowed)
    ranges = [(head.data_ptr(), head.data_ptr() + head.nbytes) for head in allowed]
    assert all(any(start <= low and high < end for start, end in ranges) for low, high in inside)

    arguments["path"].fill_(FINISHED)
    loads.clear()
    triton_attention.decode_attention(**arguments, out=out)
    assert not any(touches(low, high, kv) for low, high in loads)


def interpreted_nan() -> None:
    """A row that is not a number makes those that see it such, and no other, in its tile or elsewhere."""
    triton_rope, triton_attention, _ = interpreted()
    arguments = rope_arguments(8, 140, 2, 2, 16, 16, True, False)
    where = {"position": ints([*range(126, 130), *range(4)]), "slot": ints([0] * 4 + [1] * 4), "path": ints([0] * 8)}
    kv = halves(2, 2, 2, 140, 16, seed=5)
    kv[0, :, :, 130:] = kv[1, :, :, 4:] = NAN
    heads = arguments["qkv"].view(8, 6, 16)

    def call() -> Tensor:
        cache = kv.clone()
        q = triton_rope.rope_and_store(**arguments, **where, kv=cache)
        return triton_attention.decode_attention(q, cache, **where, rows_per_sequence=4)

    def check(bad: list[int], columns: slice) -> None:
        """In ``columns`` the rows ``bad``, and nothing else, are NaN."""
        want = clean.clone()
        want[bad, columns] = NAN
        assert torch.equal(bits(call()), bits(want))

    clean = call()
    assert clean.isfinite().all()
    heads[2, 5, 7] = float("inf")  # V alone, of the second kv head
    check([2, 3], slice(16, 32))
    heads[2] = NAN
    check([2, 3], slice(0, 32))
    heads[2] = 1
    clean = call()
    heads[3, 0] = NAN  # a query alone
    check([3], slice(0, 16))


def interpreted_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler is told depends on the model and the arena's length alone, and so do the splits."""
    triton_rope, triton_attention, _ = interpreted()
    launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **options: launches.append((grid, options))

    monkeypatch.setattr(triton_rope, "rope_kernel", Recorder())
    monkeypatch.setattr(triton_attention, "attention_kernel", Recorder())
    kv = halves(1, 2, 2, 512, 16)
    for n, count in ((1, 1), (1, 2), (1, 16), (2, 3), (4, 4), (5, 1), (8, 2), (16, 1)):
        rows = n * count
        q, where = halves(rows, 8, 16), [ints([0] * rows)] * 3
        for window in (None, 7):
            triton_attention.decode_attention(q, kv, *where, rows_per_sequence=n, window=window)
            assert launches[-1] == ((count * -(-n * 4 // 16), 2, 4), launches[0][1])
    launches.clear()
    heads = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
    for rows in range(1, 17):
        where = [ints([0] * rows)] * 3
        triton_rope.rope_and_store(halves(rows, 12 * 16), *where, *tables(512, 16), kv, **heads)
        assert launches[-1] == ((rows, 12), launches[0][1])
    lengths = {1: 128, 4096: 128, 4097: 256, 8192: 256, 32768: 1024, 131072: 1024}
    assert {length: triton_attention.split_for(length) for length in lengths} == lengths


def interpreted_errors() -> None:
    from riverinfer.errors import InvalidRequestError

    triton_rope, triton_attention, _ = interpreted()
    kv, q, row = halves(2, 2, 2, 64, 16), halves(4, 4, 16), ints([0] * 4)
    qkv, (cos, sin), norm = halves(4, 8 * 16), tables(64, 16), random(16)

    def attend(q: Tensor = q, kv: Tensor = kv, rows: Tensor = row, n: int = 2, **options: Any) -> Any:
        return triton_attention.decode_attention(q, kv, rows, row, row, rows_per_sequence=n, **options)

    def rope(**options: Any) -> Any:
        given = {
            "qkv": qkv, "position": row, "slot": row, "path": row, "cos": cos, "sin": sin, "kv": kv,
            "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        }  # fmt: skip
        return triton_rope.rope_and_store(**{**given, **options})

    cases: list[tuple[str, Callable[[], Any]]] = [
        ("q", lambda: attend(halves(17, 4, 16))),
        ("q", lambda: attend(halves(4, 64))),
        ("q", lambda: attend(halves(4, 3, 16))),
        ("q", lambda: attend(random(4, 4, 16))),
        ("q", lambda: attend(halves(4, 8, 16)[:, ::2])),
        ("head_dim", lambda: attend(halves(4, 4, 20), halves(2, 2, 2, 64, 20))),
        ("head_dim", lambda: attend(halves(4, 4, 264), halves(2, 2, 2, 64, 264))),
        ("kv", lambda: attend(kv=halves(2, 2, 2, 64, 32))),
        ("kv", lambda: attend(kv=kv[0])),
        ("kv", lambda: attend(kv=kv.float())),
        ("kv", lambda: attend(kv=halves(2, 3, 2, 64, 16))),
        ("kv", lambda: attend(kv=halves(2, 2, 2, 128, 16)[:, :, :, ::2])),
        ("kv", lambda: attend(kv=kv.to("meta"))),
        ("kv", lambda: attend(kv=halves(9000)[:8200].as_strided((2, 2, 2, 64, 16), (4100, 2048, 1024, 16, 1)))),
        ("position", lambda: attend(rows=row[:3])),
        ("position", lambda: attend(rows=row.long())),
        ("position", lambda: attend(rows=ints([0] * 5)[1:])),
        ("rows_per_sequence", lambda: attend(n=3)),
        ("rows_per_sequence", lambda: attend(n=0)),
        ("window", lambda: attend(window=0)),
        ("out", lambda: attend(out=halves(4, 4, 16))),
        ("split", lambda: attend(split=96)),
        ("split", lambda: attend(split=0)),
        ("workspace", lambda: attend(workspace=triton_attention.Workspace("cpu", 8, 8))),
        ("workspace", lambda: attend(workspace=triton_attention.Workspace("meta"))),
        ("qkv", lambda: rope(qkv=halves(17, 128))),
        ("qkv", lambda: rope(qkv=qkv.float())),
        ("qkv", lambda: rope(num_heads=3)),
        ("kv", lambda: rope(num_kv_heads=1)),
        ("head_dim", lambda: rope(head_dim=12)),
        ("slot", lambda: rope(slot=row.long())),
        ("path", lambda: rope(path=row[:1])),
        ("cos", lambda: rope(cos=cos[:63])),
        ("cos", lambda: rope(cos=cos[:, :15], sin=sin[:, :15])),
        ("cos", lambda: rope(cos=cos.bfloat16())),
        ("sin", lambda: rope(sin=None)),
        ("sin", lambda: rope(sin=sin[:, :8])),
        ("q_norm", lambda: rope(q_norm=norm.bfloat16(), k_norm=norm)),
        ("k_norm", lambda: rope(q_norm=norm)),
        ("query_scale", lambda: rope(query_scale=random(63))),
        ("out", lambda: rope(out=halves(4, 64))),
    ]
    for field, call in cases:
        with pytest.raises(InvalidRequestError, match=f"^{field}: "):
            call()


# --- compiled ---

MODELS = {  # query heads, kv heads, head dimension, norms of the heads
    "Llama-3.1-8B": (32, 8, 128, False),
    "Llama-3.2-1B": (32, 8, 64, False),
    "Phi-4-mini": (24, 8, 128, False),
    "SmolLM2-135M": (9, 3, 64, False),
    "256": (16, 2, 256, True),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("model", MODELS)
def compiled_attention(model: str, capability: int) -> None:
    """One kind of matrix instruction, 16-byte copies of K and V, no spills, and two programs a multiprocessor."""
    from riverinfer.kernels.triton_attention import attention_kernel, blocks_for

    heads, kv_heads, dim, _ = MODELS[model]
    blocks = blocks_for(dim)
    types = {
        **dict.fromkeys(("position", "slot", "path", "counters"), "*i32"), **dict.fromkeys(("q", "kv", "out"), "*bf16"),
        **dict.fromkeys(("n", "length", "slot_stride", "window"), "i32"), "workspace": "*fp32",
    }  # fmt: skip
    constants = {
        "G": heads // kv_heads, "D": dim, "DP": dim, "COLUMNS": blocks.columns, "KEYS": blocks.keys, "SPLIT": 256,
        "STAGES": blocks.stages, "PAIRS": blocks.pairs, "PARTS": blocks.parts,
    }  # fmt: skip
    made = compile_kernel(
        attention_kernel, types, constants, warps=blocks.warps, capability=capability, multiples=["slot_stride"]
    )
    assert set(re.findall(r"\bmma\.\S+", made.ptx)) == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
    assert "wgmma" not in made.ptx  # it rounds otherwise
    assert re.search(r"cp\.async\.cg\.shared\.global.*0x10,", made.ptx)
    assert not re.search(r"cp\.async\.ca", made.ptx)
    assert made.shared <= LARGEST
    assert not made.spills
    assert made.registers * 32 * blocks.warps * 2 <= 65536


@pytest.mark.parametrize(("model", "capability"), [("Llama-3.1-8B", 80), ("Llama-3.1-8B", 90), ("256", 90)])
def compiled_rope(model: str, capability: int) -> None:
    from riverinfer.kernels.triton_rope import rope_kernel

    heads, kv_heads, dim, norms = MODELS[model]
    types = {
        **dict.fromkeys(("position", "slot", "path"), "*i32"), **dict.fromkeys(("qkv", "kv", "out"), "*bf16"),
        **dict.fromkeys(("cos", "sin", "q_norm", "k_norm", "query_scale"), "*fp32"),
        "length": "i32", "slot_stride": "i32", "eps": "fp32",
    }  # fmt: skip
    constants: dict[str, Any] = {"HQ": heads, "HKV": kv_heads, "D": dim, "DP": dim, "ROTARY": dim}
    constants |= dict.fromkeys(["query_scale"] + ["q_norm", "k_norm"] * (not norms))
    made = compile_kernel(rope_kernel, types, constants, warps=1, capability=capability, multiples=["slot_stride"])
    assert not made.local
    assert made.registers <= 64


def compiled_for_any_number_of_rows() -> None:
    """Neither rows nor positions are constants, and not even their divisibility is: one kernel for all."""
    from riverinfer.kernels.triton_attention import attention_kernel
    from riverinfer.kernels.triton_rope import rope_kernel

    for kernel, names in ((attention_kernel, ("n", "length", "window")), (rope_kernel, ("length", "eps"))):
        by_name = {parameter.name: parameter for parameter in kernel.params}
        assert all(by_name[name].do_not_specialize and not by_name[name].is_constexpr for name in names)
