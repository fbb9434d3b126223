"""The cache: chunked prefill, truncation, interleaving, length-dependent rotary scalings. Mostly properties."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
import torch
from golden_models import CPU, ROOT, greedy, make_cache, open_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from riverinfer import decode
from riverinfer.decode import prefill
from riverinfer.errors import ContextLengthError, EngineMemoryError, NoFreeSlotError
from riverinfer.kv_arena import KVArena
from riverinfer.model import Model
from riverinfer.sequence import SlotPool, TokenSequence

# Between them: plain rope, a sliding window, longrope with a border at 64, NoPE layers.
FOLDERS = ["llama", "mistral", "phi3", "smollm3"]
TOKENS = st.integers(5, 300)
QUICK = settings(max_examples=25, deadline=None)


@cache
def model_of(name: str) -> Model:
    return open_model(ROOT / name)


def fresh(model: Model, slots: int = 1, ctx_size: int = 160) -> tuple[SlotPool, list[TokenSequence]]:
    arena = KVArena(model.config, slots=slots, ctx_size=ctx_size, dtype=model.dtype, device=CPU)
    arena.k.fill_(float("nan"))
    arena.v.fill_(float("nan"))
    pool = SlotPool(arena)
    sequences = [TokenSequence(model, ctx_size) for _ in range(slots)]
    for sequence in sequences:
        pool.acquire(sequence)
    return pool, sequences


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@pytest.mark.parametrize("name", FOLDERS)
@given(ids=st.lists(TOKENS, min_size=2, max_size=90), chunk=st.integers(1, 40))
@QUICK
def test_chunked_prefill_equals_one_prefill(name: str, ids: list[int], chunk: int) -> None:
    model = model_of(name)
    whole, parts = make_cache(model), make_cache(model)
    want = prefill(model, ids, 0, whole, all_logits=True)
    got = prefill(model, ids, 0, parts, chunk=chunk, all_logits=True)
    assert close(got, want)
    for (k1, v1), (k2, v2) in zip(whole, parts, strict=True):
        assert close(k2[:, : len(ids)], k1[:, : len(ids)])
        assert close(v2[:, : len(ids)], v1[:, : len(ids)])


@pytest.mark.parametrize("name", FOLDERS)
@given(
    ids=st.lists(TOKENS, min_size=2, max_size=90),
    more=st.lists(TOKENS, min_size=1, max_size=90),
    cut=st.integers(0, 90),
)
@QUICK
def test_truncate_and_continue_equals_fresh(name: str, ids: list[int], more: list[int], cut: int) -> None:
    model = model_of(name)
    _, (sequence,) = fresh(model, ctx_size=200)
    sequence.extend(ids)
    sequence.truncate(min(cut, len(ids)))
    wanted = ids[: min(cut, len(ids))] + more
    kept = sequence.keep_common(wanted)
    got = sequence.extend(wanted[kept:])
    assert sequence.tokens == wanted
    assert close(got, prefill(model, wanted, 0, make_cache(model)))


@pytest.mark.parametrize("name", FOLDERS)
@given(turns=st.lists(st.tuples(st.booleans(), st.lists(TOKENS, min_size=1, max_size=30)), min_size=2, max_size=8))
@QUICK
def test_two_interleaved_sequences_equal_each_alone(name: str, turns: list[tuple[bool, list[int]]]) -> None:
    model = model_of(name)
    _, pair = fresh(model, slots=2, ctx_size=260)
    _, (alone_a,) = fresh(model, ctx_size=260)
    _, (alone_b,) = fresh(model, ctx_size=260)
    alone = [alone_a, alone_b]
    for which, ids in turns:
        together = pair[which].extend(ids)
        assert torch.equal(together, alone[which].extend(ids))


def test_longrope_computes_the_cache_again_when_it_crosses_its_border() -> None:
    model = model_of("phi3")
    _, (sequence,) = fresh(model)
    ids = [7 + i % 50 for i in range(60)]
    sequence.extend(ids)
    for token in range(20, 30):  # one at a time over the border at 64
        got = sequence.extend([token])
        ids.append(token)
        assert close(got, prefill(model, ids, 0, make_cache(model)))
    sequence.truncate(50)
    kept = sequence.keep_common(ids[:50] + [9])
    assert kept == 0  # the long frequencies do not serve a short sequence
    assert close(sequence.extend(ids[:50] + [9]), prefill(model, ids[:50] + [9], 0, make_cache(model)))


def test_a_full_context_is_an_error_and_changes_nothing() -> None:
    model = model_of("llama")
    _, (sequence,) = fresh(model, ctx_size=16)
    sequence.extend(list(range(5, 15)))
    with pytest.raises(ContextLengthError, match="17 tokens do not fit into the context of 16"):
        sequence.extend(list(range(7)))
    assert sequence.tokens == list(range(5, 15))
    sequence.extend(list(range(6)))
    assert len(sequence.tokens) == 16


def test_an_interrupt_does_not_pass_long_frequencies_off_as_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """longrope: the first chunk of a long prompt is cached, then the user stops and sends something short."""
    model = model_of("phi3")
    _, (sequence,) = fresh(model, ctx_size=700)
    ids = [7 + i % 50 for i in range(600)]
    append = TokenSequence.note

    def interrupted(self: TokenSequence, *args: Any) -> None:
        append(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenSequence, "note", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sequence.extend(ids)
    monkeypatch.undo()
    assert len(sequence.tokens) == 512
    wanted = [*ids[:30], 9]
    assert sequence.keep_common(wanted) == 0
    assert close(sequence.extend(wanted), prefill(model, wanted, 0, make_cache(model)))


def test_an_interrupted_prefill_leaves_a_shorter_sequence_not_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    _, (sequence,) = fresh(model, ctx_size=1200)
    ids = [5 + i % 300 for i in range(1100)]

    walk, chunks = decode.walk, []

    def interrupted(*args: Any, **options: Any) -> Tensor:
        chunks.append(args)
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return walk(*args, **options)

    monkeypatch.setattr(decode, "walk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sequence.extend(ids)
    monkeypatch.undo()
    assert sequence.tokens == ids[: len(sequence.tokens)]
    assert len(sequence.tokens) == 1024
    kept = sequence.keep_common(ids)
    assert kept == 1024
    assert close(sequence.extend(ids[kept:]), prefill(model, ids, 0, make_cache(model, 1200)))


def test_idle_sequences_give_up_their_slot_longest_idle_first() -> None:
    model = model_of("llama")
    pool, (first, second) = fresh(model, slots=2)
    third = TokenSequence(model, 160)
    first.extend([5, 6])
    second.extend([7, 8])
    pool.release(second, keep=True)
    pool.release(first, keep=True)
    pool.acquire(third)
    assert (second.slot, second.tokens) == (None, [])
    assert first.tokens == [5, 6]
    pool.acquire(first)
    assert first.tokens == [5, 6]
    with pytest.raises(NoFreeSlotError, match="all 2 sequences are still generating"):
        pool.acquire(second)


def test_other_threads_wait_for_a_slot() -> None:
    model = model_of("llama")
    pool, (first,) = fresh(model)
    second = TokenSequence(model, 160)
    got = threading.Event()

    def wait() -> None:
        pool.acquire(second)
        got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.wait(0.2)
    pool.release(first, keep=False)
    assert got.wait(5)
    thread.join()
    assert second.slot is not None


def test_decoding_allocates_no_cache_memory() -> None:
    model = model_of("llama")
    pool, (sequence,) = fresh(model)
    arena = pool._arena
    before = (arena.k.data_ptr(), arena.v.data_ptr())
    sequence.extend([5, 6, 7])
    for token in range(5, 60):
        sequence.extend([token])
    views = arena.slot(0)
    assert (arena.k.data_ptr(), arena.v.data_ptr()) == before
    assert all(k.untyped_storage().data_ptr() == before[0] for k, _ in views)
    assert not torch.isnan(arena.k[:, 0, :, :58]).any()
    assert torch.isnan(arena.k[:, 0, :, 58:]).all()


def test_an_arena_that_does_not_fit_says_how_much_and_what_to_lower() -> None:
    config = model_of("llama").config
    message = r"KV cache of 2 x 10000000000 positions needs [\d.]+ GiB, which cpu refuses; lower --ctx-size"
    with pytest.raises(EngineMemoryError, match=message):
        KVArena(config, slots=2, ctx_size=10_000_000_000, dtype=torch.float32, device=CPU)


def test_greedy_helper_agrees_with_sequences() -> None:
    model = model_of("mistral")
    _, (sequence,) = fresh(model)
    logits = sequence.extend([9, 10, 11])
    out = []
    for _ in range(12):
        out.append(int(logits[0].argmax()))
        logits = sequence.extend([out[-1]])
    assert out == greedy(model, [9, 10, 11], 12, chunk=2)
