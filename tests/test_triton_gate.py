"""The gate on the device: interpreted against its reference and the host's gates, and compiled for NVIDIA's GPUs."""

from __future__ import annotations

import inspect
import random as python_random
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_process import LARGEST, collect, needs_triton

BACKBONE, RIVER, FINISHED = 0, 1, 2
BENCH = Path(__file__).parent.parent / "bench"
NEVER = 2**31 - 1  # max_depth


@needs_triton
def test_gate_agrees_with_its_references_when_interpreted(tmp_path: Path) -> None:
    collect(__file__, "interpreted_", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_gate_compiles_for_hopper_and_ampere(tmp_path: Path) -> None:
    collect(__file__, "compiled_", tmp_path)


# --- interpreted ---


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Layer:
    """The last matrix of a layer [N, K] in both forms, and launches of it with a gate."""

    def __init__(self, n: int = 40, k: int = 64, *, split: int = 2, block_n: int = 32, norm: bool = False) -> None:
        from riverinfer.kernels.linear_launch import Config, Workspace
        from riverinfer.kernels.packed_weights import packed_weights
        from riverinfer.weights_convert.packing import pack

        self.n, self.k = n, k
        self.dense = (random(n, k, seed=1) / k**0.5).bfloat16()
        q = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
        scale, offset = random(n, k // 32, seed=3).abs() / 16 / k**0.5, random(n, k // 32, seed=4) / 9 / k**0.5
        self.river = packed_weights(pack(q, 4, 32), scale.bfloat16(), offset.bfloat16(), bits=4, group=32)
        self.norm = {"norm": random(k, seed=5), "river_norm": random(k, seed=6), "eps": 1e-5} if norm else {}
        self.config = Config(block_n=block_n, split=split)
        self.workspace = Workspace("cpu", 2**15, 64)

    def inputs(self, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, residual, and a state before that is like what comes after in most rows."""
        x, residual = random(rows, self.k, seed=seed), random(rows, self.n, seed=seed + 1)
        before = residual + random(rows, self.n, seed=seed + 2) * torch.linspace(0.1, 2.0, rows)[:, None]
        return x if self.norm else x.bfloat16(), residual, before

    def run(self, x: Tensor, residual: Tensor, path: Tensor, gate: Any = None, **options: Any) -> Tensor:
        from riverinfer.kernels.triton_dual_linear import dual_linear

        out = torch.full((len(x), self.n), 7.0)
        given = {"weight": self.dense, "config": self.config, "workspace": self.workspace, **self.norm, **options}
        dual_linear(x, path, river=self.river, residual=residual, out=out, gate=gate, **given)
        assert not self.workspace.counters.any()
        return out


def device_gate(before: Tensor, layer: int = 0, **options: Any) -> Any:
    """tau 0.5 in each of 3 layers, at least one of them; similarities are kept."""
    from riverinfer.kernels.triton_gate import DeviceGate

    rows = len(before)
    given = {
        "tau": torch.full((3,), 0.5),
        "limits": ints(1, NEVER),
        "depth": torch.zeros(rows, dtype=torch.int32),
        "undefined": torch.zeros(rows, dtype=torch.int32),
        "similarities": torch.full((3, rows), 7.0),
    }
    return DeviceGate(before=before, layer=layer, **{**given, **options})


MIXTURES = [
    [0],
    [1],
    [2],
    [0, 1, 2, 1, 0],
    [0] * 8 + [1, 2, 1],
    [2] * 8 + [0, 1],
    [1, 0] * 7,
    [0] * 16,
    [2] * 9,
]


@pytest.mark.parametrize(
    ("mixtures", "split", "norm", "shape"),
    [(MIXTURES[:6], 1, True, (40, 64)), (MIXTURES[3:8], 2, False, (40, 64)), (MIXTURES[3:5], 3, False, (70, 96))],
)
def interpreted_reference(mixtures: list[list[int]], split: int, norm: bool, shape: tuple[int, int]) -> None:
    """Flags, depths, counts and similarities are the reference's, for mixed rows, and the output is as without a gate.

    Nothing else changes: not the entries of finished rows or of other layers, not the workspace behind its end.
    """
    from riverinfer.kernels import triton_reference as reference
    from riverinfer.kernels.linear_launch import COLUMNS, Workspace, launch_shape

    layer = Layer(*shape, split=split, norm=norm)
    opened = stayed = 0
    for seed, flags in enumerate(mixtures):
        path, rows = ints(*flags), len(flags)
        x, residual, before = layer.inputs(rows, seed)
        x[path == FINISHED] = float("nan")
        want_out = layer.run(x, residual, path)
        assert torch.equal(path, ints(*flags))
        x[path == FINISHED], before[path == FINISHED] = float("inf"), float("nan")
        similar = F.cosine_similarity(before, want_out)[path != FINISHED].sort().values
        middle = len(similar) // 2
        tau = torch.tensor([-1.0, similar[max(0, middle - 1) : middle + 1].mean() - 1e-3 if middle else 0.5, 1.0])
        depth, undefined = torch.arange(rows).int() % 4, torch.arange(rows).int()
        gate = device_gate(before, 1, tau=tau, limits=ints(2, 4), depth=depth, undefined=undefined)
        want = reference.gate(
            before, want_out, path, layer=1, tau=tau, limits=gate.limits, depth=depth, undefined=undefined
        )
        grid, sums, counters = launch_shape(rows, layer.n, layer.config, False, 2, None, x.device, True)
        assert sums is not None
        assert counters is not None
        workspace = Workspace("cpu", len(sums) + COLUMNS, len(counters) + 1)
        workspace.sums.fill_(float("nan"))
        out = layer.run(x, residual, path, gate, workspace=workspace)
        assert torch.equal(out, want_out)
        assert workspace.sums[len(sums) :].isnan().all()
        assert not workspace.counters.any()
        for got, wanted in zip((path, gate.depth, gate.undefined), want, strict=False):
            assert torch.equal(got, wanted)
        assert (gate.similarities[[0, 2]] == 7).all()
        live = ints(*flags) != FINISHED
        assert torch.allclose(gate.similarities[1][live], want[3][live], rtol=0, atol=1e-6)
        assert (gate.similarities[1][~live] == 7).all()
        opened += int(((path == RIVER) & (ints(*flags) == BACKBONE)).sum())
        stayed += int((path == BACKBONE).sum())
        assert grid[2] == split
    assert opened > 1
    assert stayed > 1


def interpreted_many_tiles() -> None:
    """More tiles than are added side by side."""
    layer = Layer(530, 32, split=1, block_n=16)
    x, residual, before = layer.inputs(2)
    path, gate = ints(BACKBONE, BACKBONE), device_gate(before)
    out = layer.run(x, residual, path, gate)
    assert torch.allclose(gate.similarities[0], F.cosine_similarity(before, out), rtol=0, atol=1e-6)


GATES: list[tuple[Any, int, int | None]] = [  # tau, min_depth, max_depth
    (0.8, 1, None),
    ([0.9, 0.7, 0.8, 0.6, 0.7], 1, None),
    ([0.9, 0.8], 3, 4),
    (-1, 4, None),
    (1, 0, 3),
    (-1, 0, None),
    (0.8, 2, 2),
]


def interpreted_layers() -> None:
    """Rows go through five layers as each would under its own ``SimilarityGate``; one turns into NaN on the way."""
    from riverinfer.gates import SimilarityGate
    from riverinfer.kernels.triton_gate import thresholds

    layers = 5
    exits = set()
    for index, (tau, least, most) in enumerate(GATES):
        rows, layer = (3, 1, 9, 5)[index % 4], Layer(40, 64, split=1 + index % 2)
        hosts = [SimilarityGate(tau, min_depth=least, max_depth=most) for _ in range(rows)]
        exited = [host.start() for host in hosts]
        path, depths = ints(*exited), [0] * rows
        gate = device_gate(
            layer.inputs(rows)[2], tau=thresholds(tau, layers), limits=ints(least, NEVER if most is None else most),
            similarities=torch.full((layers, rows), 7.0) if index % 2 else None,
        )  # fmt: skip
        h = random(rows, 40, seed=index)
        for i in range(layers):
            x, other, _ = layer.inputs(rows, seed=7 * index + i)
            residual = h + other * torch.linspace(0.1, 1.5, rows)[:, None]
            if i == 2:
                residual[rows - 1, 3] = float("nan")
            after = layer.run(x, residual, path, replace(gate, before=h, layer=i))
            for row, host in enumerate(hosts):
                depths[row] += not exited[row]
                exited[row] = exited[row] or host(i, h[row : row + 1], after[row : row + 1])
            assert path.tolist() == [int(out) for out in exited]
            assert gate.depth.tolist() == depths
            h = after
        assert (gate.undefined > 0).tolist() == [host.not_a_number > 0 for host in hosts]
        exits |= set(depths)
    assert exits == {1, 2, 3, 4, 5}


def interpreted_boundaries() -> None:
    """A similarity that equals tau keeps a row; norms have a floor; every layer without a number counts."""
    layer = Layer(64, 32, split=1)
    layer.dense.zero_()
    x = torch.zeros(6, 32, dtype=torch.bfloat16)
    before, after = torch.zeros(6, 64), torch.zeros(6, 64)
    after[0] = before[1] = 1.0  # of nothing and something: 0
    before[2], after[2] = 0.5, 2.0  # 1, exactly
    before[3], after[3] = 1e-9, 2.0  # |before| = 8e-9
    before[4], after[4] = 1.0, -1.0  # -1
    before[5], after[5] = float("inf"), 1.0
    want = F.cosine_similarity(before, after)
    for tau, opened in ((0.0, [0, 0, 1, 1, 0, 0]), (1.0, [0] * 6), (-1.0, [1, 1, 1, 1, 0, 0])):
        path, gate = torch.zeros(6, dtype=torch.int32), device_gate(before, 2, tau=torch.tensor([-1.0, -1.0, tau]))
        layer.run(x, after, path, gate)
        assert torch.allclose(gate.similarities[2], want, rtol=1e-6, atol=0, equal_nan=True)
        assert gate.similarities[2, :3].tolist() == [0, 0, 1]
        assert path.tolist() == opened
    path, gate = torch.zeros(6, dtype=torch.int32), device_gate(before, tau=torch.ones(3), limits=ints(2, 4))
    passed = []
    for i in (0, 1, 2, 2):
        layer.run(x, after, path, replace(gate, layer=i))
        passed.append((gate.undefined.tolist(), path.tolist()))
    # Not counted before min_depth, nor where max_depth decides.
    assert passed == [
        ([0] * 6, [0] * 6),
        ([0, 0, 0, 0, 0, 1], [0] * 6),
        ([0, 0, 0, 0, 0, 2], [0] * 6),
        ([0, 0, 0, 0, 0, 2], [1] * 6),
    ]
    assert gate.depth.tolist() == [4] * 6


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("river", [0, 1])
def interpreted_rows(split: int, river: int) -> None:
    """A row's similarity has the same bits alone, in batches of any size and mixture, and in another place."""
    layer = Layer(split=split)
    x, residual, before = layer.inputs(16)

    def similarities(rows: Tensor, flags: Tensor) -> Tensor:
        gate = device_gate(before[rows])
        layer.run(x[rows], residual[rows], flags, gate)
        return gate.similarities[0]

    whole = similarities(torch.arange(16), torch.full((16,), river, dtype=torch.int32))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(9))
    assert torch.equal(similarities(order, torch.full((16,), river, dtype=torch.int32)), whole[order])
    for count in (7, 9):
        rows = torch.arange(count)
        flags = torch.where(rows % 3 == 1, 1 - river, river).int()
        assert torch.equal(similarities(rows, flags)[rows % 3 != 1], whole[:count][rows % 3 != 1])
        assert torch.equal(similarities(ints(count).long(), ints(river)), whole[count : count + 1])


def interpreted_repeated() -> None:
    """A launch repeated gives the same bits, whatever launches came between and were left in the workspace."""
    layer = Layer()
    x, residual, before = layer.inputs(11)
    seen = []
    for flags in (MIXTURES[4], [FINISHED] * 11, MIXTURES[4], [RIVER] * 11, MIXTURES[4]):
        path, gate = ints(*flags), device_gate(before, tau=torch.full((3,), 0.8))
        seen.append((layer.run(x, residual, path, gate), path, gate.depth, gate.undefined, gate.similarities))
        layer.workspace.sums.neg_()
    for got in (seen[2], seen[4]):
        assert all(torch.equal(a, b) for a, b in zip(seen[0], got, strict=True))
    assert len(set(seen[0][1].tolist())) == 3
    assert seen[1][1].tolist() == [FINISHED] * 11
    assert not seen[1][2].any()
    assert (seen[1][4] == 7).all()


def interpreted_backbone_not_loaded() -> None:
    """Without the backbone's matrix all rows are river rows; a flag that says otherwise stays, and its depth."""
    from riverinfer.kernels.triton_dual_linear import dual_linear

    layer = Layer()
    x, residual, before = layer.inputs(5)
    flags = [1, 1, 2, 0, 1]
    rivers = torch.where(ints(*flags) == FINISHED, FINISHED, RIVER).int()
    want = layer.run(x, residual, rivers)
    path, gate = ints(*flags), device_gate(before, tau=torch.full((3,), -1.0))
    out = layer.run(x, residual, path, gate, weight=None)
    assert torch.equal(out, want)
    assert path.tolist() == flags
    assert not gate.depth.any()
    live = path != FINISHED
    assert torch.allclose(gate.similarities[0][live], F.cosine_similarity(before, out)[live], rtol=0, atol=1e-6)
    half = torch.full((5, layer.n), 7.0, dtype=torch.bfloat16)
    dual_linear(x, rivers, None, layer.river, out=half, config=layer.config)
    zero = layer.run(x, torch.zeros_like(residual), rivers)
    assert torch.equal(half, zero.bfloat16())


class SideBySide:
    """A kernel whose programs run side by side: one at a time, and before each access to memory another may go on.

    Half of the programs that have counted themselves in somewhere stop there until no other can go on; who stopped
    first goes on last. Stands in for the function that the interpreter calls for each program in turn.
    """

    def __init__(self, function: Any, seed: int) -> None:
        self.function, self.draw = function, python_random.Random(seed)
        self.__globals__, self.__annotations__ = function.__globals__, function.__annotations__
        self.__signature__, self.__name__ = inspect.signature(function), function.__name__
        self.calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.going: list[threading.Semaphore] = []  # a program's turn
        self.waiting: list[threading.Semaphore] = []  # of those that stopped
        self.mine = threading.local()
        self.switches = 0

    def __call__(self, **arguments: Any) -> None:
        from triton.runtime.interpreter import interpreter_builder as builder

        self.calls.append((builder.grid_idx, arguments))
        if len(self.calls) < torch.Size(builder.grid_dim).numel():
            return
        self.going = [threading.Semaphore(0) for _ in self.calls]
        failures: list[BaseException] = []
        done = threading.Semaphore(0)

        def program(place: tuple[int, ...], arguments: dict[str, Any], turn: threading.Semaphore) -> None:
            self.mine.place, self.mine.turn = place, turn
            turn.acquire()
            builder.grid_idx = place
            try:
                self.function(**arguments)
            except BaseException as error:
                failures.append(error)
            (self.going if turn in self.going else self.waiting).remove(turn)
            (self.next() or done).release()

        for (place, given), turn in zip(self.calls, self.going, strict=True):
            threading.Thread(target=program, args=(place, given, turn), daemon=True).start()
        self.going[0].release()
        assert done.acquire(timeout=60)
        assert not failures, failures

    def next(self) -> threading.Semaphore | None:
        if not self.going and self.waiting:
            self.going.append(self.waiting.pop())
        return self.draw.choice(self.going) if self.going else None

    def access(self, name: str, access: Callable[[], Any]) -> Any:
        from triton.runtime.interpreter import interpreter_builder as builder

        turn = self.next()
        if turn is not None and turn is not self.mine.turn:
            self.switches += 1
            turn.release()
            self.mine.turn.acquire()
            builder.grid_idx = self.mine.place
        result = access()
        if name == "create_atomic_rmw" and self.draw.random() < 0.5:
            self.going.remove(self.mine.turn)
            self.waiting.append(self.mine.turn)
        return result


@pytest.mark.parametrize("split", [1, 2])
def interpreted_side_by_side(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the programs' loads, stores and counts, results are those of one program after the other.

    All rows that can leave do so, in launches where every row is in the backbone and where both forms are computed.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    kernels: list[SideBySide] = []
    begin = GridExecutor.__init__

    def prepare(self: Any, fn: Any, *rest: Any) -> None:
        begin(self, fn, *rest)
        kernels.append(SideBySide(fn, len(kernels)))
        self.fn = kernels[-1]

    def through(name: str) -> Callable[..., Any]:
        plain = getattr(InterpreterBuilder, name)
        return lambda *args: kernels[-1].access(name, lambda: plain(*args))

    layer = Layer(40, 64, split=split, block_n=16)
    for flags in ([0] * 3, [0, 1, 2, 0, 1, 2, 0, 0, 0, 0]):
        x, residual, before = layer.inputs(len(flags))
        results = []
        for order in range(3):
            with monkeypatch.context() as patch:
                if order:
                    patch.setattr(GridExecutor, "__init__", prepare)
                    for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw"):
                        patch.setattr(InterpreterBuilder, name, through(name))
                path, gate = ints(*flags), device_gate(before, tau=torch.full((3,), -1.0))
                out = layer.run(x, residual, path, gate)
            results.append((out, path, gate.depth, gate.similarities))
            assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
        assert BACKBONE not in path
    assert all(kernel.switches > 12 for kernel in kernels)
    assert len(kernels) == 4


def interpreted_errors() -> None:
    from riverinfer.errors import InvalidRequestError
    from riverinfer.kernels.linear_launch import Config, Workspace
    from riverinfer.kernels.triton_dual_linear import dual_linear

    layer = Layer(40, 64, split=1)
    x, residual, before = layer.inputs(2)
    path, gate = ints(0, 0), device_gate(before)

    def run(**options: Any) -> Callable[[], Any]:
        return lambda: layer.run(x, residual, path, replace(gate, **options))

    cases: list[tuple[str, Callable[[], Any]]] = [
        ("before", run(before=before[:1])),
        ("before", run(before=before.double())),
        ("before", run(before=random(40, 2).t())),
        ("before", run(before=random(81)[1:].view(2, 40))),
        ("tau", run(tau=torch.zeros(3, 2))),
        ("tau", run(tau=torch.zeros(3).double())),
        ("limits", run(limits=ints(1))),
        ("limits", run(limits=torch.tensor([1, 2]))),
        ("depth", run(depth=ints(0))),
        ("depth", run(depth=ints(0, 0).to("meta"))),
        ("undefined", run(undefined=ints(0, 0, 0))),
        ("similarities", run(similarities=torch.zeros(2, 2))),
        ("layer", run(layer=3)),
        ("layer", run(layer=-1)),
        ("gate", lambda: dual_linear(x, path, layer.dense, layer.river, out=before.bfloat16(), gate=gate)),
        (
            "gate",
            lambda: dual_linear(x, path, layer.dense, layer.river, out=random(2, 20), silu=True, gate=gate),
        ),
        (
            "workspace",
            lambda: layer.run(x, residual, path, gate, workspace=Workspace("cpu", 2 * 3 * 8 - 1, 1)),
        ),
        ("config", lambda: layer.run(x, residual, path, gate, config=Config(block_n=48))),
    ]
    for field, call in cases:
        with pytest.raises(InvalidRequestError, match=f"^{field}: "):
            call()
    layer.run(x, residual, path, gate, workspace=Workspace("cpu", 2 * 3 * 8, 1))


def interpreted_thresholds() -> None:
    """Of float32 numbers, the same ones exceed the threshold and what it was made of."""
    from riverinfer.kernels.triton_gate import thresholds

    for tau in (0.1, 0.3, 0.5, 0.7, 0.9, -0.1, -0.9, 0, 1, -1):
        made = thresholds(tau, 2)
        assert made.dtype == torch.float32
        assert made[0] == made[1]
        assert made[0].double() <= tau < made[0].nextafter(torch.tensor(2.0)).double()
    assert thresholds([0.5, 0.25], 4).tolist() == [0.5, 0.25, 0.25, 0.25]
    assert thresholds([0.5, 0.25, 1.0], 2).tolist() == [0.5, 0.25]


# --- compiled ---


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("model", "shape"), [("Llama-3.1-8B", "4096x14336"), ("Llama-3.2-1B", "2048x8192")])
def compiled_down(model: str, shape: str, capability: int) -> None:
    """No spills, registers for eight programs a multiprocessor, and one kind of matrix instruction."""
    sys.path.append(str(BENCH))
    import kernel_table

    entry = kernel_table.matrix(model, "down, gate", kernel_table.W4, form="dual", capability=capability)
    assert entry.shape == shape
    assert entry in [replace(each, models=(model,)) for each in kernel_table.entries()]
    found = kernel_table.row(entry)
    assert found["spills_in_loops"] == found["local_bytes"] == 0
    assert found["registers"] * 32 * found["warps"] * 8 <= 65536
    assert found["shared_bytes"] <= LARGEST
    assert found["matrix_instructions"] == ["mma m16n8k16"]


def compiled_for_any_layer() -> None:
    """A layer's number is no constant, and neither are what it decides by: one kernel for all."""
    from riverinfer.kernels.triton_dual_linear import dual_linear_kernel

    by_name = {parameter.name: parameter for parameter in dual_linear_kernel.params}
    assert by_name["layer"].do_not_specialize
    assert not any(by_name[name].is_constexpr for name in ("layer", "tau", "limits", "depth"))
