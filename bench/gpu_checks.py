"""Are the kernels right on this card, do batches and single tokens have the same bits, and is a graph what it captured?

Each kernel against its counterpart in ``kernels.triton_reference`` on random inputs, and whole steps of cut-down models
against the torch walk, in graphs and without. Every row alone has the bits that it has in a batch, launches repeated
have theirs again, and counters are zero afterwards.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_models import GROUP, LLAMA_8B, SHAPES, SMOLLM, Matrix, Shape, Steps, cut, random_matrix, random_model
from gpu_models import random_packed as random_linear
from gpu_run import DEVICE, DRY, Part, Results, capture, ints, normal, release
from torch import Tensor

from riverinfer.decode import walk as torch_walk
from riverinfer.gates import FixedDepth
from riverinfer.kernels import triton_reference as reference
from riverinfer.kernels.linear_launch import Workspace
from riverinfer.kernels.packed_weights import PackedWeights
from riverinfer.kernels.triton_attention import decode_attention, workspace_size
from riverinfer.kernels.triton_dual_linear import dual_linear
from riverinfer.kernels.triton_gate import DeviceGate
from riverinfer.kernels.triton_linear import linear
from riverinfer.kernels.triton_rope import rope_and_store
from riverinfer.kernels.triton_sampling import SamplingState, SamplingWorkspace, sample
from riverinfer.sampling import SamplingParams

Kind = tuple[int, int]  # bits and group; 16, 0: bfloat16
Check = Callable[[], str]
NAN = float("nan")
FAR = 0.04  # for states of a few layers: two ways to round to bfloat16 differ by 0.01 and more
FLAGS = ([0], [1], [2], [0, 1, 2, 1, 0], [1] * 8, [0] * 8 + [1] * 3 + [2, 1, 1, 0, 2])
FILTERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 2.5, "top_k": 60, "top_p": 0.97, "min_p": 0.01},
    {"temperature": 0.05, "top_k": 300, "top_p": 0.7},
)


def checks(part: Part) -> None:
    """A job after the other, each in one of several processes: compiling is what takes the time."""
    jobs = list(_jobs())
    while (number := part.claim()) < len(jobs):
        name, check = jobs[number]
        began = time.perf_counter()

        made = part.attempt(name, partial(_patient, check), needs=2)
        if made is not None:
            print(f"ok   {name}  {made['remark']}  ({time.perf_counter() - began:.1f} s)", flush=True)
        release()


def _patient(check: Check, tries: int = 3) -> Results:
    """Memory that is not there may be there soon: processes beside this one hold it."""
    try:
        return {"remark": check()}
    except torch.OutOfMemoryError as error:
        if not tries:
            raise
        traceback.clear_frames(error.__traceback__)
    release()
    time.sleep(4)
    return _patient(check, tries - 1)


def _jobs() -> Iterator[tuple[str, Check]]:
    """The longest first: whoever begins last should not be waited for."""
    for shape in SHAPES:
        yield f"{shape.name} steps", partial(check_steps, cut(shape, 2))
        yield f"{shape.name} gated steps", partial(check_gated, cut(shape, 4))
    for shape in SHAPES:
        for name, matrix in shape.matrices.items():
            if DRY and name in ("o", "qkv"):
                continue
            yield f"{shape.name} {name} dual", partial(check_dual, matrix, gated=name == "down")
            for kind in _kinds(shape, name, matrix):
                label = f"{shape.name} {name} {matrix[0]}x{matrix[1]} {kind_name(kind)}"
                yield label, partial(check_linear, matrix, kind)
    for shape in SHAPES:
        yield f"{shape.name} sampling", partial(check_sampling, shape)
        yield f"{shape.name} attention", partial(check_attention, shape, 64 if DRY else 4096)
        yield f"{shape.name} rope", partial(check_rope, shape)
    if not DRY:
        yield f"{LLAMA_8B.name} attention, 64K", partial(check_attention, LLAMA_8B, 65536)
    yield "flags in a graph", check_graph


def _kinds(shape: Shape, name: str, matrix: Matrix) -> list[Kind]:
    """What the river is, and where sums are longest or shapes odd, all that it could be."""
    kinds = [(16, 0), (4, GROUP)]
    small = shape.name == SMOLLM.name
    odd = small or (shape.name == LLAMA_8B.name and name == "down")
    if DRY or (odd and name in ("down", "gate_up")):
        kinds += [(8, 32)] if DRY else product((4, 8), (32, 64, 128))
    if small:
        kinds.append((8, GROUP))
    fits = [kind for kind in dict.fromkeys(kinds) if not kind[1] or matrix[1] % kind[1] == 0]
    if DRY:
        return {"down": fits, "gate_up": fits[:2]}.get(name, [])
    return fits


def kind_name(kind: Kind) -> str:
    return "bf16" if kind[0] == 16 else f"{kind[0]}-bit g{kind[1]}"


# --- what results have to be ---


def require(condition: Any, what: str) -> None:
    if not bool(condition):
        raise AssertionError(what)


def same(got: Tensor, want: Tensor, what: str) -> None:
    """To the bit; NaN equals NaN."""
    kind = {2: torch.int16, 4: torch.int32}.get(got.element_size(), torch.int64)
    require(got.dtype == want.dtype and torch.equal(got.contiguous().view(kind), want.contiguous().view(kind)), what)


def error_of(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def near(got: Tensor, want: Tensor) -> str:
    """Equal but for the order of sums; bfloat16 results but for the few that this rounds to the other neighbour."""
    if got.dtype == torch.float32:
        error = error_of(got, want)
        require(error < 2e-4, f"relative error {error:.1e}")
        return f"error {error:.1e}"
    apart = (_ordered(got) - _ordered(want.bfloat16())).abs()
    # Next to zero a small absolute error is many steps.
    small = (got.float() - want.float()).abs() <= 1e-5 * want.float().abs().max()
    apart = apart.masked_fill(small, 0)
    share = float((apart != 0).float().mean())
    require(apart.max() <= 1, f"{int(apart.max())} steps of bfloat16 apart")
    require(share < 0.02, f"{share:.1%} are rounded to another neighbour")
    return f"{share:.2%} rounded otherwise"


def _ordered(x: Tensor) -> Tensor:
    """int32 that grow by one from each bfloat16 to the next."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)


# --- matrices ---


def _around(tokens: int, matrix: Matrix) -> Results:
    """Arguments of ``linear`` beside the weights."""
    n, k, norm, silu, residual = matrix
    return {
        "x": normal(tokens, k) if norm else normal(tokens, k).bfloat16(),
        "norm": 1 + 0.1 * normal(k) if norm else None,
        "eps": 1e-5,
        "silu": silu,
        "residual": normal(tokens, n // 2 if silu else n) if residual else None,
    }


def out_of(matrix: Matrix, tokens: int) -> Tensor:
    """Where results go, of the dtype that a step has there. What is not written shows."""
    n, _, norm, silu, residual = matrix
    whole = residual or (norm and n > 40000)
    dtype = torch.float32 if whole else torch.bfloat16
    return torch.full((tokens, n // 2 if silu else n), NAN, device=DEVICE, dtype=dtype)


def _rows_of(arguments: Results, rows: Any) -> Results:
    parts = {name: arguments[name] for name in ("x", "residual") if arguments[name] is not None}
    return {**arguments, **{name: x[rows].contiguous() for name, x in parts.items()}}


def check_linear(matrix: Matrix, kind: Kind) -> str:
    """Against the reference for 16 tokens; bits of 1 .. 15 of them, of other places, and of launches repeated."""
    n, k, *_ = matrix
    weight: Tensor | PackedWeights = random_matrix(n, k) if kind[0] == 16 else random_linear(n, k, *kind).packed
    arguments, workspace = _around(16, matrix), Workspace(DEVICE)

    def call(rows: Any) -> Tensor:
        given = _rows_of(arguments, rows)
        return linear(**given, weight=weight, out=out_of(matrix, len(given["x"])), workspace=workspace)

    whole = call(slice(0, 16))
    plain = weight if isinstance(weight, Tensor) else weight.dequantize()
    remark = near(whole, reference.linear(weight=plain, **arguments))
    del plain
    for tokens in range(1, 17) if not DRY else (1, 9):
        same(call(slice(0, tokens)), whole[:tokens], f"{tokens} tokens have other bits than 16")
        row = tokens - 1
        same(call(slice(row, row + 1)), whole[row : row + 1], f"row {row} alone has other bits")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    same(call(order), whole[order], "another place in the batch gives other bits")
    for _ in range(0 if DRY else 20):
        same(call(slice(0, 16)), whole, "a repeated launch gives other bits")
    require(not workspace.counters.any(), "counters are not back at zero")
    return remark


def check_dual(matrix: Matrix, gated: bool) -> str:
    """Bits of each path alone for flags of all kinds; finished rows stay. ``gated``: a gate decides by the output."""
    n, k, *_ = matrix
    dense, river, workspace = random_matrix(n, k), random_linear(n, k).packed, Workspace(DEVICE)
    remark = ""
    for flags in FLAGS[3:5] if DRY else FLAGS:
        path, rows = ints(flags), len(flags)
        arguments = _around(rows, matrix)
        arguments["x"][path == 2] = NAN
        out = torch.nan_to_num(out_of(matrix, rows), 3.0)
        alone = {
            0: linear(weight=dense, out=torch.empty_like(out), **arguments),
            1: linear(weight=river, out=torch.empty_like(out), **arguments),
            2: out.clone(),
        }
        given: Results = dict(arguments, out=out, workspace=workspace)
        dual_linear(path=path, weight=dense, river=river, **given)
        for row, flag in enumerate(flags):
            same(out[row], alone[flag][row], f"row {row} of {flags} has other bits")
        if gated:
            remark = _check_gate(matrix, flags, dense, river, given, alone)
    if gated:  # and where the backbone's form is not loaded
        path, arguments = ints([1, 2]), _around(2, matrix)
        want = linear(weight=river, out=out_of(matrix, 2), **arguments)
        got = dual_linear(
            path=path, weight=None, river=river, out=torch.full_like(want, 3), workspace=workspace, **arguments
        )
        same(got[0], want[0], "without the other form, a row has other bits")
        require((got[1] == 3).all(), "a finished row was written")
    require(not workspace.counters.any(), "counters are not back at zero")
    return remark


def _check_gate(
    matrix: Matrix,
    flags: Sequence[int],
    dense: Tensor,
    river: PackedWeights,
    given: Results,
    alone: dict[int, Tensor],
) -> str:
    """A gate changes no bit of the output, and opens where the reference's does; each row as it does alone."""
    rows, after = len(flags), torch.stack([alone[flag][row] for row, flag in enumerate(flags)])
    before = after + normal(*after.shape) * torch.linspace(0.2, 2.0, rows, device=DEVICE)[:, None]
    tau, limits = torch.full((4,), 0.7, device=DEVICE), ints([1, 4])

    def decide(picked: slice) -> tuple[Tensor, ...]:
        path, count = ints(list(flags)[picked]), len(flags[picked])
        depth, undefined = ints([2] * count), ints([0] * count)
        similarities = torch.zeros(4, count, device=DEVICE)
        gate = DeviceGate(
            before=before[picked].contiguous(), layer=2, tau=tau, limits=limits, depth=depth, undefined=undefined,
            similarities=similarities,
        )  # fmt: skip
        part = {**_rows_of(given, picked), "out": alone[2][picked].clone()}
        out = dual_linear(path=path, weight=dense, river=river, gate=gate, **part)
        for row in range(count):
            same(out[row], after[picked][row], "the gate changes the output")
        return path, depth, undefined, similarities[2]

    got = decide(slice(0, rows))
    want = reference.gate(
        before, after, ints(list(flags)), layer=2, tau=tau, limits=limits, depth=ints([2] * rows),
        undefined=ints([0] * rows),
    )  # fmt: skip
    live = ints(list(flags)) != 2
    apart = float((got[3] - want[3])[live].abs().max()) if live.any() else 0.0
    require(apart < 1e-5, f"similarities are {apart:.1e} apart")
    close = (want[3] - 0.7).abs() < 1e-5
    for name, x, y in zip(("path", "depth", "undefined"), got, want, strict=False):
        require(((x == y) | close | ~live).all(), f"{name} of {flags} is {x.tolist()}, not {y.tolist()}")
    names = ("path", "depth", "undefined", "similarity")
    for row in range(0, rows, 3):
        for name, x, y in zip(names, decide(slice(row, row + 1)), got, strict=True):
            same(x, y[row : row + 1], f"{name} of row {row} alone has other bits")
    return f"similarities {apart:.1e} apart"


def check_graph() -> str:
    """A captured launch follows flags and input that change on the device."""
    n, k = (64, 96) if DRY else (4096, 4096)
    dense, river = random_matrix(n, k), random_linear(n, k).packed
    x, out, path = normal(3, k).bfloat16(), normal(3, n), ints([0, 0, 0])
    workspace = Workspace(DEVICE)
    replay = capture(lambda: dual_linear(x, path, dense, river, out=out, workspace=workspace))
    for flags in ([0, 0, 0], [1, 1, 1], [0, 1, 2]):
        path.copy_(ints(flags))
        x.copy_(normal(3, k))
        want = dual_linear(x, path, dense, river, out=out.clone())
        replay()
        same(out, want, f"{flags} replayed has other bits")
    return ""


# --- attention, rotation, choice ---


def check_attention(shape: Shape, length: int) -> str:
    """Sequences of several lengths against the reference, with NaN behind their ends; rows alone; launches repeated."""
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    worst = 0.0
    for n, ends in ((1, [0, length // 3, length - 1]), (4, [5, length - 1]), (16, [length // 2])):
        rows = n * len(ends)
        kv = torch.full((len(ends) + 1, 2, kv_heads, length, dim), NAN, device=DEVICE, dtype=torch.bfloat16)
        for number, end in enumerate(ends):
            kv[number + 1, :, :, : end + 1] = normal(2, kv_heads, end + 1, dim).bfloat16()
        q = normal(rows, heads, dim).bfloat16()
        position = ints([end - n + 1 + i for end in ends for i in range(n)])
        slot, path = ints([number + 1 for number in range(len(ends)) for _ in range(n)]), ints([0] * rows)
        sizes = [
            workspace_size(r, m, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, length=length)
            for r, m in ((rows, n), (1, 1))
        ]
        workspace = Workspace(DEVICE, *(max(each) for each in zip(*sizes, strict=True)))

        def call(picked: slice, together: int) -> Tensor:
            given = [x[picked].clone() for x in (position, slot, path)]  # noqa: B023
            out = torch.full((len(given[0]), heads * dim), NAN, device=DEVICE, dtype=torch.bfloat16)
            options: Results = {"rows_per_sequence": together, "out": out, "workspace": workspace}  # noqa: B023
            return decode_attention(q[picked].contiguous(), kv, *given, **options)  # noqa: B023

        whole = call(slice(0, rows), n)
        want = reference.decode_attention(q, kv, position, slot, path)
        error = float(((whole.float() - want).norm(dim=1) / want.norm(dim=1)).max())
        require(error < 4e-3, f"relative error {error:.1e} for {n} rows at {ends}")
        worst = max(worst, error)
        for row in range(rows) if n < 16 else (0, 1, 7, 8, 15):
            same(call(slice(row, row + 1), 1), whole[row : row + 1], f"row {row} of {n} at {ends} alone has other bits")
        for _ in range(0 if DRY else 20):
            same(call(slice(0, rows), n), whole, "a repeated launch gives other bits")
        path[-1] = 2
        kept = call(slice(0, rows), n)
        same(kept[:-1], whole[:-1], "a finished neighbour changes a row")
        require(kept[-1].isnan().all(), "a finished row was written")
        require(not workspace.counters.any(), "counters are not back at zero")
    return f"error {worst:.1e}"


def check_rope(shape: Shape) -> str:
    """Queries, and K and V where they belong and nowhere else; rows alone."""
    heads, kv_heads, dim, length, rows = shape.heads, shape.kv_heads, shape.head_dim, 40, 16
    angles = torch.outer(torch.arange(length, device=DEVICE).float(), 0.9 ** torch.arange(dim // 2, device=DEVICE))
    cos, sin = torch.cat((angles.cos(),) * 2, 1), torch.cat((-angles.sin(), angles.sin()), 1)
    arguments: Results = {"cos": cos, "sin": sin, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    qkv = normal(rows, (heads + 2 * kv_heads) * dim).bfloat16()
    where = [ints([20 + i for i in range(rows)]), ints([1] * rows), ints([0] * (rows - 1) + [2])]
    block = normal(3, 2, kv_heads, length, dim).bfloat16()
    got_kv, want_kv = block.clone(), block.clone()
    out = torch.full((rows, heads, dim), 7, device=DEVICE, dtype=torch.bfloat16)
    got = rope_and_store(qkv, *where, kv=got_kv, out=out.clone(), **arguments)
    want = reference.rope_and_store(qkv, *where, kv=want_kv, out=out.clone(), **arguments)
    remark = near(got, want)
    near(got_kv, want_kv)
    changed = (got_kv != block).any(-1).any(2).any(1).nonzero().tolist()
    require(changed == [[1, 20 + i] for i in range(rows - 1)], f"written were {changed}")
    same(got[-1], out[-1], "a finished row was written")
    for row in (0, 7, 14):
        kv = block.clone()
        part = [x[row : row + 1].clone() for x in where]
        alone = rope_and_store(qkv[row : row + 1], *part, kv=kv, **arguments)
        same(alone, got[row : row + 1], "a row alone has other bits")
        same(kv[1, :, :, 20 + row], got_kv[1, :, :, 20 + row], "K or V of a row alone have other bits")
    return remark


def check_sampling(shape: Shape) -> str:
    """Tokens of all kinds of filters are the reference's; rows alone; launches repeated; buffers zero afterwards."""
    vocab, padded = shape.vocab - 8, shape.vocab
    params = [SamplingParams(seed=3 + number, **filters) for number, filters in enumerate(FILTERS)]
    rows = len(params)
    state, workspace = SamplingState(rows, DEVICE), SamplingWorkspace(DEVICE, vocab, rows)
    for row, each in enumerate(params):
        state.set(each, row)
    logits = normal(rows, padded, scale=2.5)
    logits[:, 31::4001] += 8
    logits[:, vocab:] = 1e3  # padding would win
    position = ints(list(range(100, 100 + rows)))

    def call(sampled: bool = True) -> tuple[Tensor, ...]:
        return sample(logits, state, position, vocab_size=vocab, workspace=workspace, sampled=sampled)

    got, want = call(), reference.sample(logits, state, position, vocab_size=vocab)
    require(torch.equal(got[0], want[0]), f"tokens are {got[0].tolist()}, not {want[0].tolist()}")
    apart = max(float((x - y).abs().max()) for x, y in zip(got[1:], want[1:], strict=True))
    require(apart < 1e-4, f"log-probabilities or confidences are {apart:.1e} apart")
    for _ in range(1 if DRY else 20):
        for x, y in zip(call(), got, strict=True):
            same(x, y, "a repeated launch gives other bits")
    greedy = call(sampled=False)
    require(torch.equal(greedy[0], logits[:, :vocab].argmax(1)), "greedy tokens are others")
    for row in (0, 3):
        one = SamplingState(1, DEVICE)
        one.set(params[row])
        alone = sample(logits[row : row + 1].clone(), one, position[row : row + 1].clone(), vocab_size=vocab)
        for x, y in zip(alone, got, strict=True):
            same(x, y[row : row + 1], f"row {row} alone has other bits")
    for name in ("counters", "counts", "coarse", "fine"):
        require(not getattr(workspace, name).any(), f"{name} are not back at zero")
    return f"log-probabilities {apart:.1e} apart"


# --- whole steps ---


def _steps(shape: Shape) -> tuple[Steps, int]:
    """Of a model whose river is a copy of its backbone; the position of the first step."""
    return Steps(random_model(shape, copy=True), 64 if DRY else 4096), 20 if DRY else 1000


def check_steps(shape: Shape) -> str:
    """Exact steps, in graphs and without, against the torch walk; verifications and rounds have their bits."""
    steps, at = _steps(shape)
    model, slot, walk = steps.model, steps.arena.slot(0), steps.walk
    count = 2 if DRY else 16
    ids = torch.randint(0, shape.vocab, (count,), device=DEVICE)
    cache = steps.arena.block.clone()

    def singles() -> tuple[Tensor, Tensor]:
        """States and cache of a token a step."""
        steps.arena.block.copy_(cache)
        states = [steps.walk(ids[i : i + 1], at + i, slot) for i in range(count)]
        return torch.cat(states), steps.arena.block[..., at : at + count, :].clone()

    states, written = singles()
    steps.arena.block.copy_(cache)
    want = torch.cat([torch_walk(model, ids[i : i + 1], at + i, slot) for i in range(count)])
    error = error_of(states, want)
    require(error < FAR, f"states are {error:.1e} from the torch walk's")
    for rows in (2,) if DRY else (2, 4, 8, 16):
        steps.arena.block.copy_(cache)
        got = torch.cat([walk(ids[i : i + rows], at + i, slot) for i in range(0, count, rows)])
        same(got, states, f"{rows} rows at once have other states")
        same(steps.arena.block[..., at : at + count, :], written, f"{rows} rows at once leave another cache")
    same(walk.logits(states)[1:2], walk.logits(states[1:2]), "a row of the head alone has other bits")

    token, long = int(ids[0]), 3 if DRY else 40
    said = steps.say(at, token, long)
    require(all(logprob == logprob and logprob <= 0 for _, logprob in said), "a log-probability is none")
    again, rounds = steps.say_in_rounds(at, token, long, drafts=1 if DRY else 8)
    require(again == said, f"rounds say {_difference(again, said)}")
    drafted = long / rounds
    steps.launch(graphs=False)
    require(steps.say(at, token, long) == said, "graphs say other tokens than their launches")
    got, left = singles()
    same(got, states, "graphs have other states than their launches")
    same(left, written, "graphs leave another cache than their launches")
    return f"error {error:.1e}, {drafted:.1f} tokens a round"


def _difference(got: list[Any], want: list[Any]) -> str:
    place = next((i for i, (x, y) in enumerate(zip(got, want, strict=True)) if x != y), -1)
    return f"{got[place]} at {place}, not {want[place]}"


def check_gated(shape: Shape) -> str:
    """Steps that leave the backbone at any depth, against the torch walk; all the way, they have the river's bits."""
    steps, at = _steps(shape)
    model, slot = steps.model, steps.arena.slot(0)
    ids = torch.randint(0, shape.vocab, (1,), device=DEVICE)
    cache = steps.arena.block.clone()
    worst = 0.0
    for depth in (1,) if DRY else range(shape.layers + 1):
        steps.arena.block.copy_(cache)
        got = steps.walk(ids, at, slot, gate=FixedDepth(depth))
        steps.arena.block.copy_(cache)
        want = torch_walk(model, ids, at, slot, gate=FixedDepth(depth))
        worst = max(worst, error_of(got, want))
        require(worst < FAR, f"depth {depth}: states are {worst:.1e} from the torch walk's")
    for depth in (1,) if DRY else (0, 1, shape.layers - 1):
        path = steps.path(depth)
        said = steps.say(at, int(ids[0]), 2 if DRY else 20, path)
        again = steps.say(at, int(ids[0]), 2 if DRY else 20, path)
        require(said == again, f"depth {depth}: repeated steps say {_difference(again, said)}")
    return f"error {worst:.1e}"
