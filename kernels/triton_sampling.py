"""The choice of tokens in Triton, on the device: what ``sampling.Sampler`` chooses, without a host in between.

A draw is the minimum over the tokens of E / p, E exponential and a function of seed, position and token id alone
(SplitMix64: Steele, Lea and Flood, OOPSLA 2014). As it needs no state, host and device choose alike: the race is run
in float64 as on the host, with s = (logit - largest logit) / temperature in place of log p.

Top-k and top-p need the score of the last token that is kept. It is found without sorting, by radix selection on
integers that grow as s falls, q = floor(-s * 2**26 / 40): a histogram over their upper 13 bits, and one over the lower
13 bits of the bin where the count, or the probability, is reached. Top-p is asked for of what top-k leaves, which takes
a third pass. Counts are int32, probabilities 44-bit fixed point in int64, so that sums are exact and their order, that
of atomics, is of no effect. Scores below -40 share the last q and are left out of the race: a token there has
E / p > 2**-52 e**40 > 37.5, more than the likeliest one can have (E <= 54 log 2), but for E = 0, once in 2**53.

Of a row, the last program to arrive finishes a pass: it combines what the others left, in the order of their blocks,
and leaves counters and histograms zero. Rows that are greedy are finished by the first of the five passes.

Neither order nor size of a sum knows how many rows there are. ``triton_reference`` holds the plain torch counterpart;
Triton's interpreter (TRITON_INTERPRET=1) runs everything on CPU tensors.
"""
# Kernels have no annotations but constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.kernels.linear_launch import INTERPRETED
from riverinfer.kernels.require import require
from riverinfer.kernels.triton_dual_linear import FINISHED
from riverinfer.sampling import SamplingParams, _mix, _signed

MAX_ROWS = 16
MAX_VOCAB = 2**18  # with which sums of probabilities fit an int64
BLOCK = 1024  # tokens of a program
_WARPS, _FILTER_WARPS = 4, 8

BINS = 2**13
_FINISHED: tl.constexpr = tl.constexpr(FINISHED)
_BINS: tl.constexpr = tl.constexpr(BINS)
_LOW: tl.constexpr = tl.constexpr(13)  # bits of BINS
_LAST: tl.constexpr = tl.constexpr(2**26 - 1)  # the q of everything from the limit on
_PER_UNIT: tl.constexpr = tl.constexpr(2.0**26 / 40)
_UNIT: tl.constexpr = tl.constexpr(2.0**44)  # the probability of the likeliest token
_HUGE: tl.constexpr = tl.constexpr(2**31 - 1)  # more than any token id
_INFINITY: tl.constexpr = tl.constexpr(float("inf"))
_LOWEST: tl.constexpr = tl.constexpr(-(0x7F800001 << 32))  # a packed -inf
_GAMMA: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_M1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_M2: tl.constexpr = tl.constexpr(0x94D049BB133111EB)

# What a row's passes tell the next ones, in int64.
PLAN = 8
_PLAN: tl.constexpr = tl.constexpr(PLAN)
_MODE: tl.constexpr = tl.constexpr(0)  # a sum of the flags below; 0 is done
_BIN: tl.constexpr = tl.constexpr(1)  # where the second pass looks
_NEED: tl.constexpr = tl.constexpr(2)  # what it has to find there
_BEFORE: tl.constexpr = tl.constexpr(3)  # the probability before that bin
_P_BIN: tl.constexpr = tl.constexpr(4)  # the same of the third pass
_P_NEED: tl.constexpr = tl.constexpr(5)
_THRESHOLD: tl.constexpr = tl.constexpr(6)  # the largest q that is kept
_RACE: tl.constexpr = tl.constexpr(1)
_TOP_K: tl.constexpr = tl.constexpr(2)
_TOP_P: tl.constexpr = tl.constexpr(4)


@triton.jit
def mix(v):
    """The output function of SplitMix64 on uint64."""
    z = v + _GAMMA
    z = (z ^ (z >> 30)) * _M1
    z = (z ^ (z >> 27)) * _M2
    return z ^ (z >> 31)


@triton.jit
def stream(seed, position):
    """Where the stream of int64 ``position`` starts, as uint64. seed: int64, mixed already."""
    return mix(seed.to(tl.uint64, bitcast=True) ^ mix(position.to(tl.uint64, bitcast=True)))


@triton.jit
def exponentials(start, ids):
    """Exponential variates float64 of a stream for int32 token ids."""
    z = mix(start + ids.to(tl.uint64) * _GAMMA)
    uniform = ((z >> 11).to(tl.int64).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2**-53
    return -tl.log(uniform)


@triton.jit
def ordered(x, ids):
    """int64 that order float32 as torch.argmax does: zeros alike, NaN above all, the lowest id first among equals."""
    bits = tl.where(x == 0, 0, x.to(tl.int32, bitcast=True))
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(x == x, key, 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) | (ids ^ _HUGE).to(tl.int64)


@triton.jit
def value(packed):
    """The float32 of ``ordered``."""
    key = (packed >> 32).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def scores(x, peak, temperature):
    """s in float64: 0 for the largest logit, whatever the temperature."""
    return (x.to(tl.float64) - peak.to(tl.float64)) / temperature


@triton.jit
def quantized(s):
    """q: int32, 0 .. _LAST."""
    q = tl.minimum(-s * _PER_UNIT, 67108864.0).to(tl.int32)  # 2**26: the constant becomes a float32
    return tl.minimum(q, _LAST)


@triton.jit
def find(histogram, wanted):
    """The first bin at which the running sum reaches ``wanted``, int64, and the sum before it; _BINS if none does."""
    RUN: tl.constexpr = 32
    i = tl.arange(0, _BINS // RUN)
    j = tl.arange(0, RUN)
    filled = tl.load(histogram + i[:, None] * RUN + j[None, :], cache_modifier=".cg").to(tl.int64)
    sums = tl.sum(filled, 1)
    short = tl.cumsum(sums, 0) < wanted
    first = tl.sum(short.to(tl.int32), 0) * RUN
    before = tl.sum(tl.where(short, sums, 0), 0)
    filled = tl.load(histogram + first + j, mask=first + j < _BINS, other=0, cache_modifier=".cg").to(tl.int64)
    short = (before + tl.cumsum(filled, 0) < wanted) & (first + j < _BINS)
    return first + tl.sum(short.to(tl.int32), 0), before + tl.sum(tl.where(short, filled, 0), 0)


@triton.jit
def total(histogram, bins):
    """The sum of the first ``bins`` bins, int64."""
    i = tl.arange(0, _BINS)
    return tl.sum(tl.load(histogram + i, mask=i < bins, other=0, cache_modifier=".cg").to(tl.int64), 0)


@triton.jit
def clear(histogram):
    i = tl.arange(0, _BINS)
    tl.store(histogram + i, tl.zeros((_BINS,), histogram.dtype.element_ty))


@triton.jit
def nucleus(mass, top_p):
    """The least integer probability that top-p has to reach, of ``mass``."""
    exact = mass.to(tl.float64) * tl.maximum(top_p, 0.0)
    down = exact.to(tl.int64)
    return tl.where(down.to(tl.float64) < exact, down + 1, down)


@triton.jit
def arrived(counter, COUNT: tl.constexpr):
    """Whether this program is the last of COUNT. What the others stored is then visible to ``.cg`` loads."""
    tl.debug_barrier()  # every thread's stores come before the count
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == COUNT - 1
    if last:
        tl.atomic_xchg(counter, 0)  # for the next pass
    return last


@triton.jit
def statistics_kernel(
    logits, path, temperature, top_k, top_p, token, logprob, confidence, counters, plan, statistics, packed, sums,
    V: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Largest logit and the sum of exp(logit - largest), and all of a greedy row. Grid: (blocks, rows), as below."""
    block, row = tl.program_id(0), tl.program_id(1)
    COUNT: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    if path is not None:  # noqa: SIM102, decided when compiling
        if tl.load(path + row) == _FINISHED:
            if block == 0:
                tl.store(plan + row * _PLAN + _MODE, 0)
            return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + ids, mask=ids < VOCAB, other=-_INFINITY)
    best = tl.max(ordered(x, ids), 0)
    peak = value(best)
    base = tl.where(tl.abs(peak) < _INFINITY, peak, 0.0)
    tl.store(packed + row * PARTS + block, best)
    tl.store(sums + row * PARTS + block, tl.sum(tl.exp(x - base), 0))
    if arrived(counters + row, COUNT):
        i = tl.arange(0, PARTS)
        parts = tl.load(packed + row * PARTS + i, mask=i < COUNT, other=_LOWEST, cache_modifier=".cg")
        part_sums = tl.load(sums + row * PARTS + i, mask=i < COUNT, other=0.0, cache_modifier=".cg")
        best = tl.max(parts, 0)
        peak = value(best)
        base = tl.where(tl.abs(peak) < _INFINITY, peak, 0.0)
        finite = tl.abs(peak) < _INFINITY  # and a number
        sum_exp = tl.where(finite, tl.sum(part_sums * tl.exp(value(parts) - base), 0), 1.0)
        mode = 0
        if SAMPLED:
            t, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
            draws = finite & (t > 0) & (t < _INFINITY) & (k != 1)
            mode = tl.where((k > 0) & (k < VOCAB), _TOP_K, 0) + tl.where(p < 1, _TOP_P, 0) + _RACE
            mode = tl.where(draws, mode, 0)
            tl.store(plan + row * _PLAN + _MODE, mode.to(tl.int64))
            tl.store(plan + row * _PLAN + _THRESHOLD, _LAST)
            tl.store(statistics + row * 2, peak)
            tl.store(statistics + row * 2 + 1, sum_exp)
        if mode == 0:
            tl.store(token + row, (best & _HUGE) ^ _HUGE)
            tl.store(logprob + row, tl.where(finite, -tl.log(sum_exp), float("nan")))
            tl.store(confidence + row, tl.where(finite, 1.0 / sum_exp, 0.0))


@triton.jit
def filter_kernel(
    logits, temperature, top_k, top_p, counters, plan, statistics, counts, coarse, fine,
    PASS: tl.constexpr, V: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A pass of the selection: 0 over the upper bits of q, 1 and 2 over the lower ones, for top-k and for top-p.

    Of a row, ``counts``, ``coarse`` and ``fine`` are histograms: of tokens, and of probability by the upper and by the
    lower bits. Of probability nothing is added up without top-p.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    COUNT: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    plan += row * _PLAN
    mode = tl.load(plan + _MODE)
    if PASS == 0:
        idle = mode <= _RACE
    elif PASS == 1:
        idle = (mode & _TOP_K) == 0
    else:
        idle = (mode & _TOP_P) == 0
    if idle:
        return
    by_count, by_mass = (mode & _TOP_K) != 0, (mode & _TOP_P) != 0
    counts += row * _BINS
    coarse += row * _BINS
    fine += row * _BINS

    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + ids, mask=ids < VOCAB, other=-_INFINITY)
    s = scores(x, tl.load(statistics + row * 2), tl.load(temperature + row))
    q = quantized(s)
    high, low = q >> _LOW, q & (_BINS - 1)
    if PASS == 0:
        inside, place = q < _LAST, high
    else:
        inside, place = high == tl.load(plan + (_BIN if PASS == 1 else _P_BIN)).to(tl.int32), low
    if PASS != 2:
        tl.atomic_add(counts + place, 1, mask=inside & by_count, sem="relaxed")
    if by_mass:
        mass = (tl.exp(s) * _UNIT + 0.5).to(tl.int64)
        tl.atomic_add((coarse if PASS == 0 else fine) + place, mass, mask=inside & (mass > 0), sem="relaxed")

    if arrived(counters + row, COUNT):
        if PASS == 0:
            searched = mode
            if by_count:
                k = tl.load(top_k + row)
                found, before = find(counts, k)
                if found < _BINS:
                    tl.store(plan + _BIN, found)
                    tl.store(plan + _NEED, k - before)
                    if by_mass:
                        tl.store(plan + _BEFORE, total(coarse, found))
                else:  # fewer than k are above the limit: all are kept
                    searched = mode & ~_TOP_K
                    tl.store(plan + _MODE, searched)
                tl.debug_barrier()  # every thread has read what is cleared now
                clear(counts)
            if (searched & _TOP_K) == 0:
                need = nucleus(total(coarse, _BINS), tl.load(top_p + row))
                found, before = find(coarse, need)
                tl.store(plan + _P_BIN, found)
                tl.store(plan + _P_NEED, need - before)
        elif PASS == 1:
            found, before = find(counts, tl.load(plan + _NEED))
            tl.store(plan + _THRESHOLD, tl.load(plan + _BIN) * _BINS + found)
            if by_mass:
                kept = tl.load(plan + _BEFORE) + total(fine, found + 1)
                need = nucleus(kept, tl.load(top_p + row))
                found, before = find(coarse, need)
                tl.store(plan + _P_BIN, found)
                tl.store(plan + _P_NEED, need - before)
            tl.debug_barrier()
            clear(counts)
            if by_mass:
                clear(fine)
        else:
            found, before = find(fine, tl.load(plan + _P_NEED))
            tl.store(plan + _THRESHOLD, tl.load(plan + _P_BIN) * _BINS + found)
            tl.debug_barrier()
            clear(coarse)
            clear(fine)


@triton.jit
def race_kernel(
    logits, temperature, min_p, seed, position, token, logprob, confidence, counters, plan, statistics,
    races, winners, masses, kept,
    V: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The draw among what the passes before have left."""
    block, row = tl.program_id(0), tl.program_id(1)
    COUNT: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    plan += row * _PLAN
    if tl.load(plan + _MODE) == 0:
        return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + ids, mask=ids < VOCAB, other=-_INFINITY)
    peak = tl.load(statistics + row * 2)
    s = scores(x, peak, tl.load(temperature + row))
    q = quantized(s)
    least = tl.load(min_p + row)
    cutoff = tl.where(least > 0, tl.log(tl.where(least > 0, least, 1.0)), -_INFINITY)
    stays = (ids < VOCAB) & (q <= tl.load(plan + _THRESHOLD)) & (s >= tl.minimum(cutoff, 0.0))
    count = tl.sum(stays.to(tl.int32), 0)
    mine = row * PARTS + block
    tl.store(kept + mine, count)
    if count > 0:
        p = tl.where(stays, tl.exp(s), 0.0)
        start = stream(tl.load(seed + row), tl.load(position + row).to(tl.int64))
        runs = stays & (q < _LAST)
        race = tl.where(runs, exponentials(start, ids) / tl.where(runs, p, 1.0), _INFINITY)
        best = tl.min(race, 0)
        tl.store(races + mine, best)
        tl.store(winners + mine, tl.min(tl.where(race == best, ids, _HUGE), 0))
        tl.store(masses + mine, tl.sum(p, 0))
    if arrived(counters + row, COUNT):
        i = tl.arange(0, PARTS)
        at = row * PARTS + i
        counted = tl.load(kept + at, mask=i < COUNT, other=0, cache_modifier=".cg")
        some = counted > 0
        raced = tl.load(races + at, mask=some, other=_INFINITY, cache_modifier=".cg")
        winner = tl.load(winners + at, mask=some, other=_HUGE, cache_modifier=".cg")
        mass = tl.sum(tl.load(masses + at, mask=some, other=0.0, cache_modifier=".cg"), 0)
        first = tl.min(raced, 0)
        chosen = tl.min(tl.where(raced == first, winner, _HUGE), 0)
        sum_exp = tl.load(statistics + row * 2 + 1)
        tl.store(token + row, chosen.to(tl.int64))
        tl.store(logprob + row, tl.load(logits + row * V + chosen) - peak - tl.log(sum_exp))
        # Of one token left, the host says how probable it is among all.
        alone = tl.sum(counted, 0) == 1
        tl.store(confidence + row, tl.where(alone, 1.0 / sum_exp, (1.0 / mass).to(tl.float32)))


class SamplingState:
    """How rows choose, in tensors on their device that the kernels read anew with every launch.

    temperature, top_p, min_p: float64 [rows], as the host computes. top_k: int32 [rows]. seed: int64 [rows], mixed.
    0, 0, 1, 0, 0 in the order of ``SamplingParams``, which are those of greedy rows, to begin with.
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.temperature = torch.zeros(rows, dtype=torch.float64, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self.top_p = torch.ones(rows, dtype=torch.float64, device=device)
        self.min_p = torch.zeros(rows, dtype=torch.float64, device=device)
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)

    def set(self, params: SamplingParams, rows: int | slice = slice(None)) -> None:
        """Let ``rows`` choose by ``params``. Does not wait for the device.

        Raises InvalidRequestError for a repetition penalty, which only the host applies, and for draws without a seed.
        """
        require(params.repetition_penalty == 1.0, "repetition_penalty", "is not applied on the device")
        require(not params.temperature or params.seed is not None, "seed", "is missing")
        self.temperature[rows] = params.temperature
        self.top_k[rows] = min(params.top_k, MAX_VOCAB)
        self.top_p[rows] = params.top_p
        self.min_p[rows] = params.min_p
        self.seed[rows] = _signed(_mix(params.seed or 0))


class SamplingWorkspace:
    """What the passes of ``sample`` leave for each other. One serves all launches of a stream, one after the other.

    Counters and histograms are zero between launches; ``reset`` makes them so after a launch that did not finish.
    """

    def __init__(self, device: torch.device | str, vocab_size: int, rows: int = MAX_ROWS) -> None:
        """For up to ``rows`` rows of up to ``vocab_size`` tokens: about 0.16 MB a row."""

        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        self.rows, self.vocab_size = rows, vocab_size
        parts = _parts(vocab_size)
        self.plan, self.statistics = empty(PLAN, torch.int64), empty(2, torch.float32)
        self.packed, self.sums = empty(parts, torch.int64), empty(parts, torch.float32)
        self.races, self.winners = empty(parts, torch.float64), empty(parts, torch.int32)
        self.masses, self.kept = empty(parts, torch.float64), empty(parts, torch.int32)
        self.counters = torch.zeros(rows, dtype=torch.int32, device=device)
        self.counts = torch.zeros(rows, BINS, dtype=torch.int32, device=device)
        self.coarse = torch.zeros(rows, BINS, dtype=torch.int64, device=device)
        self.fine = torch.zeros(rows, BINS, dtype=torch.int64, device=device)

    def reset(self) -> None:
        for tensor in (self.counters, self.counts, self.coarse, self.fine):
            tensor.zero_()


def _parts(vocab_size: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK)))


def sample(
    logits: Tensor,
    state: SamplingState,
    position: Tensor,
    *,
    vocab_size: int,
    path: Tensor | None = None,
    token: Tensor | None = None,
    logprob: Tensor | None = None,
    confidence: Tensor | None = None,
    workspace: SamplingWorkspace | None = None,
    sampled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a token for each of R = 1 .. 16 rows. Returns (token, logprob, confidence).

    logits: float32 [R, V]; ids from ``vocab_size`` (1 .. 2**18) on are never chosen.
    state: at least R rows; the first R are used. position: int32 or int64 [R], the index in its text of the token that
    is chosen: prompt and answer so far are so many.
    path: int32 [R]; of rows with FINISHED the results are left as they are, and nothing else is read.
    token: int64 [R]. logprob: float32 [R], of the token before temperature and filters. confidence: float32 [R], as
    ``Sampler.guess`` has it: the largest probability that temperature and filters leave, before them if they leave
    one token. All three are written in place, new if None.
    workspace: for at least R rows and ``vocab_size`` tokens; if None, new for this call.
    sampled: if False, all rows are greedy whatever ``state`` says, and there is one launch instead of five.

    The token is the one ``Sampler`` chooses with the same seed and position. Top-k and top-p keep all tokens whose
    scores s = (logit - largest) / temperature are in the same step of 40 / 2**26 as the last one they keep, so equals
    stay together where the host cuts between them; sums of probability are exact to V 2**-45 of the likeliest one. Rows
    whose largest logit is no finite number (one NaN is enough) give the token that torch.argmax gives, NaN as logprob,
    and confidence 0.

    All contiguous, on one device, and starting at multiples of 16 bytes. No host synchronization; can be captured in a
    CUDA graph once it ran. Raises InvalidRequestError for other arguments.
    """
    rows = logits.shape[0] if logits.dim() == 2 else 0
    require(1 <= rows <= MAX_ROWS, "logits", f"has shape {list(logits.shape)}, not 1 .. {MAX_ROWS} rows")
    width = logits.shape[1]
    require(1 <= vocab_size <= min(width, MAX_VOCAB), "vocab_size", f"is {vocab_size}, and rows have {width} logits")
    device = logits.device
    token = torch.empty(rows, dtype=torch.int64, device=device) if token is None else token
    logprob = torch.empty(rows, dtype=torch.float32, device=device) if logprob is None else logprob
    confidence = torch.empty(rows, dtype=torch.float32, device=device) if confidence is None else confidence
    parameters = [state.temperature, state.top_k, state.top_p, state.min_p, state.seed]
    held = min(len(tensor) for tensor in parameters)
    require(held >= rows, "state", f"has {held} rows, logits {rows}")
    _check(
        device,
        ("logits", logits, (rows, width), (torch.float32,)),
        ("position", position, (rows,), (torch.int64, torch.int32)),
        ("path", path, (rows,), (torch.int32,)),
        ("token", token, (rows,), (torch.int64,)),
        ("logprob", logprob, (rows,), (torch.float32,)),
        ("confidence", confidence, (rows,), (torch.float32,)),
        ("state", state.temperature, (len(state.temperature),), (torch.float64,)),
        ("state", state.top_k, (len(state.top_k),), (torch.int32,)),
        ("state", state.top_p, (len(state.top_p),), (torch.float64,)),
        ("state", state.min_p, (len(state.min_p),), (torch.float64,)),
        ("state", state.seed, (len(state.seed),), (torch.int64,)),
    )
    room = workspace or SamplingWorkspace(device, vocab_size, rows)
    fits = room.rows >= rows and room.vocab_size >= vocab_size
    require(fits, "workspace", f"is for {room.rows} rows of {room.vocab_size} tokens: {rows}, {vocab_size} are needed")
    require(room.counters.device == device, "workspace", f"is on {room.counters.device}, not {device}")

    grid = (triton.cdiv(vocab_size, BLOCK), rows)
    parts = _parts(vocab_size)
    statistics_kernel[grid](
        logits, path, state.temperature, state.top_k, state.top_p, token, logprob, confidence,
        room.counters, room.plan, room.statistics, room.packed, room.sums,
        V=width, VOCAB=vocab_size, BLOCK=BLOCK, PARTS=parts, SAMPLED=sampled,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if not sampled:
        return token, logprob, confidence
    for which in range(3):
        filter_kernel[grid](
            logits, state.temperature, state.top_k, state.top_p,
            room.counters, room.plan, room.statistics, room.counts, room.coarse, room.fine,
            PASS=which, V=width, VOCAB=vocab_size, BLOCK=BLOCK,
            num_warps=_FILTER_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    race_kernel[grid](
        logits, state.temperature, state.min_p, state.seed, position, token, logprob, confidence,
        room.counters, room.plan, room.statistics, room.races, room.winners, room.masses, room.kept,
        V=width, VOCAB=vocab_size, BLOCK=BLOCK, PARTS=parts,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return token, logprob, confidence


_Expected = tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]


def _check(device: torch.device, *expected: _Expected) -> None:
    """Raises InvalidRequestError unless each (name, tensor, shape, dtypes) is so, on a device that can be used."""
    for name, tensor, shape, dtypes in expected:
        if tensor is None:
            continue
        fits = tuple(tensor.shape) == shape and tensor.dtype in dtypes
        require(fits, name, f"is {tensor.dtype} {list(tensor.shape)}, not {dtypes[0]} {list(shape)}")
        require(tensor.is_contiguous(), name, "is not contiguous")
        require(tensor.device == device, name, f"is on {tensor.device}, not {device}")
        # Triton compiles another kernel for pointers that are not.
        require(tensor.data_ptr() % 16 == 0, name, "does not start at a multiple of 16 bytes")
    usable = device.type == "cuda" or (INTERPRETED.value and device.type == "cpu")
    require(usable, expected[0][0], f"is on {device}, and Triton's kernels need an NVIDIA GPU")
