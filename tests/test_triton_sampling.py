"""The sampling kernels without a GPU: interpreted against the host's Sampler, and compiled for two architectures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_process import LARGEST, collect, compile_kernel, needs_triton

from riverinfer import SamplingParams
from riverinfer.sampling import Sampler, _exponential, _mix, _signed

FINISHED = 2
INF, NAN = float("inf"), float("nan")


@needs_triton
def test_kernels_choose_as_the_host_does_when_interpreted(tmp_path: Path) -> None:
    collect(__file__, "interpreted_", tmp_path, TRITON_INTERPRET="1", PYTHONWARNINGS="error::RuntimeWarning")


@needs_triton
def test_kernels_compile_for_hopper_and_ampere(tmp_path: Path) -> None:
    collect(__file__, "compiled_", tmp_path)


# --- interpreted ---

FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1e-6, "top_p": 0.5},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 1.3, "top_k": 2},
    {"temperature": 0.9, "top_k": 40},
    {"temperature": 4.0, "top_k": 100_000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.3},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "min_p": 1.0},
    {"temperature": 3.0, "top_k": 50, "top_p": 0.8},
    {"temperature": 9.0, "top_k": 300, "top_p": 0.95},
    {"temperature": 2.0, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 20, "min_p": 0.05},
    {"temperature": 2.5, "top_k": 60, "top_p": 0.97, "min_p": 0.01},
    {"temperature": 0.05, "top_k": 300},  # most scores are beyond the limit
    {"temperature": 0.05, "top_k": 300, "top_p": 0.7},
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(params: Sequence[SamplingParams]) -> Any:
    from riverinfer.kernels.triton_sampling import SamplingState

    made = SamplingState(len(params), "cpu")
    for row, chosen in enumerate(params):
        made.set(chosen, row)
    return made


def sample(logits: Tensor, params: Sequence[SamplingParams], position: Tensor, **options: Any) -> Any:
    """(token, logprob, confidence), after a look at the buffers that later launches find."""
    from riverinfer.kernels.triton_sampling import SamplingWorkspace, sample

    options = {"vocab_size": logits.shape[1], **options}
    options.setdefault("workspace", SamplingWorkspace("cpu", options["vocab_size"], len(logits)))
    made = sample(logits, state(params), position, **options)
    assert_ready(options["workspace"])
    return made


def assert_ready(workspace: Any) -> None:
    for name in ("counters", "counts", "coarse", "fine"):
        assert not getattr(workspace, name).any()


def assert_as_host(
    logits: Tensor, params: Sequence[SamplingParams], position: Tensor, vocab_size: int, got: Sequence[Tensor]
) -> None:
    """Token, log-probability and confidence of each row are the Sampler's."""
    for row, (chosen, at) in enumerate(zip(params, position.tolist(), strict=True)):
        token, logprob, confidence = (x[row].item() for x in got)
        host = Sampler(chosen, vocab_size)
        want = host(logits[row], range(at))
        guessed, sure = host.guess(logits[row], range(at))
        assert token == want.token_id == guessed, chosen
        assert logprob == pytest.approx(want.logprob, abs=1e-5)
        assert confidence == pytest.approx(sure, abs=1e-5), chosen


BITS = """
import triton
import triton.language as tl
from riverinfer.kernels.triton_sampling import exponentials, mix, stream

@triton.jit
def bits(seed, position, start, mixed, variates, FIRST: tl.constexpr, N: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, N)
    began = stream(tl.load(seed + row), tl.load(position + row).to(tl.int64))
    tl.store(start + row, began.to(tl.int64, bitcast=True))
    tl.store(mixed + row, mix(tl.load(seed + row).to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True))
    tl.store(variates + row * N + i, exponentials(began, i + FIRST))
"""


def interpreted_bits(tmp_path: Path) -> None:
    """SplitMix64 wraps as the host's does, bit by bit, and so do the variates but for the last bit of a logarithm."""
    source = tmp_path / "bits.py"
    source.write_text(BITS)
    spec = importlib.util.spec_from_file_location("bits", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    seeds = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, *(_mix(n) for n in range(20))]
    positions = [0, 1, 5, 2**31 - 1, 77, *range(1000, 1020)]
    first, n = 2**18 - 512, 512
    shape = (len(seeds),)
    start, mixed = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
    variates = torch.empty(len(seeds), n, dtype=torch.float64)
    given = torch.tensor([_signed(seed) for seed in seeds])
    module.bits[shape](given, torch.tensor(positions, dtype=torch.int32), start, mixed, variates, FIRST=first, N=n)
    assert mixed.tolist() == [_signed(_mix(seed)) for seed in seeds]
    assert start.tolist() == [_signed(_mix(seed ^ _mix(at))) for seed, at in zip(seeds, positions, strict=True)]
    ids = torch.arange(first, first + n)
    want = torch.stack([_exponential(seed, at, ids) for seed, at in zip(seeds, positions, strict=True)])
    torch.testing.assert_close(variates, want, rtol=4e-16, atol=0)


@pytest.mark.parametrize(
    ("width", "vocab_size", "scale"), [(700, 690, 3.0), (1025, 1025, 1.0), (1500, 1400, 8.0), (9, 4, 2.0)]
)
def interpreted_choice(width: int, vocab_size: int, scale: float) -> None:
    """With every combination of filters, seeds and positions, the token is the host's."""
    for trial in range(2):
        logits = random(len(FILTERS), width, seed=trial) * scale
        logits[:, vocab_size:] = 1e3  # padding would win
        seeds = [2**70 + 3, 0, *(7919 * trial + i for i in range(len(FILTERS) - 2))]
        params = [SamplingParams(seed=seed, **chosen) for seed, chosen in zip(seeds, FILTERS, strict=True)]
        position = torch.randint(0, 2**20, (len(params),), dtype=(torch.int32, torch.int64)[trial % 2])
        for rows in (slice(0, 10), slice(10, None)):
            chunk, at = logits[rows].clone(), position[rows].clone()
            got = sample(chunk, params[rows], at, vocab_size=vocab_size)
            assert_as_host(chunk, params[rows], at, vocab_size, got)


def interpreted_large_vocabulary() -> None:
    """Of 49153 tokens, one more than blocks hold: logits of a model's kind, a few far above a bulk of many."""
    logits = random(2, 49153) * 2.5
    logits[:, 31::4001] += 8
    params = [
        SamplingParams(temperature=1.2, top_k=200, top_p=0.9, seed=5),
        SamplingParams(temperature=2.0, top_p=0.8, seed=5),
    ]
    position = torch.tensor([3, 4])
    assert_as_host(logits, params, position, 49153, sample(logits, params, position))


def interpreted_steps() -> None:
    """Scores a few steps of the selection apart are told from each other, in either of its two histograms."""
    steps = [0, 3, 9, 30, 31, 32, 33, 100, 8190, 8197, 270000, 270004]
    logits = (1.0 - torch.tensor(steps, dtype=torch.float64) * 40 / 2**26).float().repeat(10, 1)
    counts = range(2, 12)
    by_count = [SamplingParams(temperature=1.0, seed=n, top_k=n) for n in counts]
    by_probability = [SamplingParams(temperature=1.0, seed=n, top_p=(n - 0.5) / 12) for n in counts]
    for params in (by_count, by_probability):
        got = sample(logits, params, torch.arange(10))
        assert_as_host(logits, params, torch.arange(10), 12, got)
        assert (1 / got[2]).round().tolist() == list(counts)


def interpreted_ties() -> None:
    """Equals stay together; the lowest id is the greedy choice, the sign of zero is none, and -inf never wins."""
    from riverinfer.kernels import triton_reference

    logits = (random(len(FILTERS), 1300) * 2).round()
    logits[3] = 0.0
    logits[4:6] = -7.25
    logits[6, 1::2] = -INF
    logits[7], logits[7, 1100] = -INF, 2.0
    logits[0], logits[0, 600:602] = -1.0, torch.tensor([-0.0, 0.0])
    params = [SamplingParams(seed=11, **chosen) for chosen in FILTERS]
    for rows in (slice(0, 10), slice(10, None)):
        chunk, position = logits[rows].clone(), torch.arange(100, 100 + len(logits))[rows].clone()
        got = sample(chunk, params[rows], position)
        want = triton_reference.sample(chunk, state(params[rows]), position, vocab_size=1300)
        assert torch.equal(got[0], want[0])
        for x, y in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
        if rows.start == 0:
            assert got[0][[0, 4, 7]].tolist() == [600, 0, 1100]


def interpreted_not_numbers() -> None:
    """Without a finite largest logit the token is torch.argmax's, with no log-probability and no confidence."""
    clean = random(6, 1300)
    logits = clean.clone()
    logits[0, 1200], logits[0, 40] = NAN, INF
    logits[1, [1050, 1290]] = NAN
    logits[2, [70, 1060]] = INF
    logits[3] = -INF
    logits[4] = NAN
    logits[5, :] = INF
    for chosen in (FILTERS[0], FILTERS[18]):
        got = sample(logits, [SamplingParams(seed=1, **chosen)] * 6, torch.arange(6))
        assert got[0].tolist() == logits.argmax(1).tolist() == [1200, 1050, 70, 0, 0, 0]
        assert got[1].isnan().all()
        assert not got[2].any()
        # One row of them is of no effect on the others.
        mixed = clean.clone()
        mixed[1] = NAN
        params = [SamplingParams(seed=1, **chosen)] * 6
        others = [0, 2, 3, 4, 5]
        for x, y in zip(sample(mixed, params, torch.arange(6)), sample(clean, params, torch.arange(6)), strict=True):
            assert torch.equal(x[others], y[others])
    limits = torch.tensor([[1.5e38, -1.5e38, 0.0], [-INF, 1.5e38, 1e38]])
    for chosen in FILTERS[::3]:
        params = [SamplingParams(seed=2, **chosen)] * 2
        assert_as_host(limits, params, torch.arange(2), 3, sample(limits, params, torch.arange(2)))


def interpreted_parameters_out_of_range() -> None:
    """Whatever the tensors hold, the token is one of the vocabulary's and nothing out of range is touched."""
    from riverinfer.kernels.triton_sampling import SamplingWorkspace, sample

    logits = random(1, 40)
    for name, value in product(("temperature", "top_p", "min_p", "top_k"), (NAN, INF, -INF, -1.0, 0.0, 5.0, 1e-300)):
        if name == "top_k" and value not in (-1.0, 0.0, 5.0):
            continue
        made = state([SamplingParams(seed=3, **FILTERS[18])])
        getattr(made, name)[0] = value
        workspace = SamplingWorkspace("cpu", 40, 1)
        token, _, _ = sample(logits, made, torch.tensor([9]), vocab_size=40, workspace=workspace)
        assert 0 <= token < 40
        assert_ready(workspace)


CRITICAL = 18.47  # chi-square with 4 degrees of freedom exceeds this once in 1000


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """Of the first token and four groups of those that follow it."""
    groups = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.arange(len(p) - 1) % 4))
    expected = torch.zeros(5, dtype=torch.float64).index_add(0, groups, p) * len(tokens)
    counts = groups[tokens].bincount(minlength=5)
    return float(((counts - expected).square() / expected).sum())


def interpreted_frequencies() -> None:
    """Frequencies are the probabilities; wrong rules, of another temperature and of another race, are found out."""
    rows, calls, size = 16, 20, 25
    logits = torch.linspace(0, 1, size)
    logits[0] = 3.3
    params = [SamplingParams(temperature=0.8, seed=4)] * rows
    tokens = torch.cat(
        [
            sample(logits.expand(rows, -1).clone(), params, torch.arange(call * rows, (call + 1) * rows))[0]
            for call in range(calls)
        ]
    )
    p = (logits.double() / 0.8).softmax(0)
    assert 0.5 < p[0] < 0.6
    assert chi_square(tokens, p) < CRITICAL
    assert chi_square(tokens, (logits.double() / 1.2).softmax(0)) > CRITICAL
    uniform = torch.rand(len(tokens), size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert chi_square((-uniform.log() / p).argmin(1), p) < CRITICAL
    assert chi_square((uniform / p).argmin(1), p) > CRITICAL


@pytest.mark.parametrize(("width", "sizes"), [(700, range(1, 17)), (1100, (1, 5))])
def interpreted_rows(width: int, sizes: Sequence[int]) -> None:
    """A row has the same bits alone, in a batch of any size, and in another place of it."""
    logits = random(16, width) * 3
    kinds = [FILTERS[18], FILTERS[1], FILTERS[0], FILTERS[12], FILTERS[8], FILTERS[2], FILTERS[0], FILTERS[13]]
    params = [SamplingParams(seed=i, **kinds[i % 8]) for i in range(16)]
    position = torch.arange(50, 66)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()

    def call(rows: Sequence[int]) -> Any:
        return sample(logits[rows].clone(), [params[row] for row in rows], position[rows].clone())

    whole = call(range(16))
    for size in sizes:
        rows = order[-size:]
        assert all(torch.equal(x, y[rows]) for x, y in zip(call(rows), whole, strict=True))


def interpreted_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five launches whatever the rows choose by, one if told that all are greedy; the number of rows is in the grid."""
    from riverinfer.kernels import triton_sampling

    launches: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **options: launches.append((self.name, grid, options))

    for name in ("statistics_kernel", "filter_kernel", "race_kernel"):
        monkeypatch.setattr(triton_sampling, name, Recorder(name))
    seen = []
    for rows in range(1, 17):
        for chosen in (FILTERS[0], FILTERS[18]):
            launches.clear()
            made = state([SamplingParams(seed=1, **chosen)] * rows)
            triton_sampling.sample(random(rows, 3000), made, torch.arange(rows), vocab_size=2999)
            seen.append([(name, options) for name, _, options in launches])
            assert all(grid == (3, rows) for _, grid, _ in launches)
    assert len(seen[0]) == 5
    assert all(launched == seen[0] for launched in seen)
    launches.clear()
    triton_sampling.sample(random(1, 30), made, torch.arange(1), vocab_size=30, sampled=False)
    assert [name for name, _, _ in launches] == ["statistics_kernel"]


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


def interpreted_mixed(loads: list[tuple[int, int]]) -> None:
    """Finished rows keep their results and are not read; greedy ones are read once, others as often as they need."""
    from riverinfer.kernels.triton_sampling import SamplingWorkspace

    kinds = [FILTERS[0], FILTERS[1], FILTERS[14], FILTERS[0], FILTERS[18], FILTERS[8], FILTERS[6], FILTERS[4]]
    reads = [1, 2, 5, 0, 0, 4, 4, 1]
    path = torch.tensor([0, 1, 0, FINISHED, FINISHED, 1, 0, 0], dtype=torch.int32)
    params = [SamplingParams(seed=i, **chosen) for i, chosen in enumerate(kinds)]
    workspace = SamplingWorkspace("cpu", 2000, 16)
    position = torch.arange(8)
    for trial in range(2):  # the same buffers again
        logits = random(8, 1040, seed=trial) * 2
        logits[3:5] = NAN
        results = (torch.full((8,), -5), random(8, seed=7), random(8, seed=8))
        before = [x.clone() for x in results]
        loads.clear()
        got = sample(
            logits, params, position, vocab_size=1030, path=path, workspace=workspace,
            **dict(zip(("token", "logprob", "confidence"), results, strict=True)),
        )  # fmt: skip
        assert all(x is y for x, y in zip(got, results, strict=True))
        rows = [row for row in range(8) if path[row] != FINISHED]
        assert all(torch.equal(x[3:5], y[3:5]) for x, y in zip(got, before, strict=True))
        begin, line = logits.data_ptr(), logits.stride(0) * 4
        for row in range(8):
            low, high = begin + row * line, begin + row * line + 1024 * 4
            assert sum(low == a and a < b < high for a, b in loads) == reads[row]
            assert not any(low + 1030 * 4 <= b < low + line for _, b in loads)
        alone = sample(logits[rows].contiguous(), [params[row] for row in rows], position[rows], vocab_size=1030)
        assert all(torch.equal(x[rows], y) for x, y in zip(got, alone, strict=True))
        chosen = [params[row] for row in rows]
        assert_as_host(logits[rows], chosen, position[rows], 1030, [x[rows] for x in got])
    greedy = sample(logits, params, position, vocab_size=1030, path=path, sampled=False)
    assert greedy[0][rows].tolist() == logits[rows, :1030].argmax(1).tolist()


def interpreted_reset() -> None:
    """A launch that did not finish leaves buffers that ``reset`` makes ready."""
    from riverinfer.kernels.triton_sampling import SamplingWorkspace

    workspace = SamplingWorkspace("cpu", 60, 1)
    params = [SamplingParams(seed=1, **FILTERS[18])]
    want = sample(random(1, 60), params, torch.arange(1), workspace=workspace)
    for name in ("counters", "counts", "coarse", "fine"):
        getattr(workspace, name).fill_(3)
    workspace.reset()
    got = sample(random(1, 60), params, torch.arange(1), workspace=workspace)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def interpreted_errors() -> None:
    from riverinfer.errors import InvalidRequestError
    from riverinfer.kernels.triton_sampling import SamplingState, SamplingWorkspace
    from riverinfer.kernels.triton_sampling import sample as launch

    logits, position, made = random(2, 40), torch.arange(2), SamplingState(2, "cpu")
    wrong = SamplingState(2, "cpu")
    wrong.top_p = wrong.top_p.float()

    def call(rows: Tensor = logits, chosen: Any = made, at: Tensor = position, **options: Any) -> Callable[[], Any]:
        return lambda: launch(rows, chosen, at, **{"vocab_size": 40, **options})

    params = SamplingParams(temperature=1.0)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("logits", call(random(17, 40))),
        ("logits", call(random(0, 40))),
        ("logits", call(logits[0])),
        ("logits", call(logits.double())),
        ("logits", call(random(40, 2).t())),
        ("logits", call(random(81)[1:].view(2, 40))),
        ("logits", call(logits.to("meta"), SamplingState(2, "meta"), position.to("meta"))),
        ("vocab_size", call(vocab_size=41)),
        ("vocab_size", call(vocab_size=0)),
        ("vocab_size", call(torch.zeros(1, 2**18 + 1), at=position[:1], vocab_size=2**18 + 1)),
        ("state", call(chosen=SamplingState(1, "cpu"))),
        ("state", call(chosen=wrong)),
        ("position", call(at=position[:1])),
        ("position", call(at=position.double())),
        ("path", call(path=position)),
        ("token", call(token=position.int())),
        ("logprob", call(logprob=torch.empty(3))),
        ("confidence", call(confidence=torch.empty(2).double())),
        ("workspace", call(workspace=SamplingWorkspace("cpu", 40, 1))),
        ("workspace", call(workspace=SamplingWorkspace("cpu", 39, 2))),
        ("workspace", call(workspace=SamplingWorkspace("meta", 40, 2))),
        ("seed", lambda: made.set(params)),
        ("repetition_penalty", lambda: made.set(replace(params, seed=1, repetition_penalty=1.1))),
    ]
    for field, case in cases:
        with pytest.raises(InvalidRequestError, match=f"^{field}: "):
            case()


def interpreted_state() -> None:
    """``set`` fills one row, some, or all; what it holds is what the host computes with."""
    from riverinfer.kernels.triton_sampling import SamplingState

    made = SamplingState(4, "cpu")
    params = SamplingParams(temperature=0.7, top_k=2**40, top_p=0.9, min_p=0.1, seed=2**64 + 1)
    made.set(params, 2)
    assert made.temperature.tolist() == [0, 0, 0.7, 0]
    assert made.top_p.tolist() == [1, 1, 0.9, 1]
    assert made.min_p.tolist() == [0, 0, 0.1, 0]
    assert made.top_k.tolist() == [0, 0, 2**18, 0]
    assert made.seed.tolist() == [0, 0, _signed(Sampler(params, 5)._seed), 0]
    made.set(SamplingParams(temperature=0.5, seed=1), slice(0, 2))
    assert made.temperature.tolist() == [0.5, 0.5, 0.7, 0]
    made.set(SamplingParams())
    assert not made.temperature.any()


# --- compiled ---

TYPES = {
    "logits": "*fp32", "path": "*i32", "temperature": "*fp64", "top_k": "*i32", "top_p": "*fp64", "min_p": "*fp64",
    "seed": "*i64", "position": "*i32", "token": "*i64", "logprob": "*fp32", "confidence": "*fp32", "counters": "*i32",
    "plan": "*i64", "statistics": "*fp32", "packed": "*i64", "sums": "*fp32", "races": "*fp64", "winners": "*i32",
    "masses": "*fp64", "kept": "*i32", "counts": "*i32", "coarse": "*i64", "fine": "*i64",
}  # fmt: skip


@pytest.mark.parametrize(("capability", "vocab_size"), [(80, 49152), (90, 128256)])
def compiled_sampling(capability: int, vocab_size: int) -> None:
    """No spills, 16-byte loads, room on every GPU; no atomic adds real numbers, whose order would count."""
    from riverinfer.kernels import triton_sampling as made

    shape = {"V": vocab_size, "VOCAB": vocab_size, "BLOCK": made.BLOCK, "PARTS": made._parts(vocab_size)}
    kernels: list[tuple[Any, int, dict[str, Any]]] = [
        (made.statistics_kernel, made._WARPS, {"SAMPLED": True}),
        *((made.filter_kernel, made._FILTER_WARPS, {"PASS": which}) for which in range(3)),
        (made.race_kernel, made._WARPS, {}),
    ]
    for kernel, warps, constants in kernels:
        compiled = compile_kernel(kernel, TYPES, {**shape, **constants}, warps=warps, capability=capability)
        assert not compiled.spills
        assert not compiled.local
        assert compiled.shared <= LARGEST
        assert compiled.registers <= 128
        assert "ld.global.v4.b32" in compiled.ptx
        atomics = [line for line in compiled.ptx.splitlines() if "atom." in line or "red.global" in line]
        assert atomics
        assert not any(".f32" in line or ".f64" in line for line in atomics)
