"""What a token must cost at least, counted again from the shapes in the checkpoint's files; and the machine's probe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_models import CPU, ROOT
from safetensors import safe_open

from riverinfer import Engine
from riverinfer.config import load_config
from riverinfer.errors import EngineClosedError, InvalidRequestError
from riverinfer.kernels.quantized_linear import quantized_bytes
from riverinfer.profiling import probe as probing
from riverinfer.profiling.limits import token_limit
from riverinfer.profiling.probe import probe
from riverinfer.profiling.result import Limit, Machine, Run
from riverinfer.river_head import K_SHORTLIST, river_head_bytes

MACHINE = Machine(bytes_per_s=1e9, operations_per_s=1e9)
GROUP = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Files:
    """Sizes by the shapes and dtypes that a golden folder's files hold, for a model that computes in ``dtype``."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.config, self.dtype = load_config(ROOT / name), dtype
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in (ROOT / name).glob("model*.safetensors"):
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    self.shapes[key] = tuple(opened.get_slice(key).get_shape())
                    if key == "model.embed_tokens.weight":
                        self.embedding_row = opened.get_tensor(key)[0].nbytes

    @property
    def vectors(self) -> int:
        """Norms, in float32, and biases, in the model's dtype."""
        flat = {key: math.prod(shape) for key, shape in self.shapes.items() if len(shape) == 1}
        return sum(size * (4 if "norm" in key else self.dtype.itemsize) for key, size in flat.items())

    @property
    def layer(self) -> int:
        """Elements of one layer's matrices."""
        return sum(math.prod(shape) for key, shape in self.shapes.items() if ".layers.0." in key and len(shape) == 2)

    @property
    def head(self) -> int:
        """Elements of the exact head: the embedding's, if it is tied."""
        return math.prod(self.shapes.get("lm_head.weight", self.shapes["model.embed_tokens.weight"]))

    @property
    def kv(self) -> int:
        """Bytes of K and V of one position in one layer."""
        return 2 * self.config.num_kv_heads * self.config.head_dim * self.dtype.itemsize

    @property
    def row(self) -> int:
        """Bytes of a token's embedding and of the K and V that it writes."""
        return self.embedding_row + self.config.num_layers * self.kv

    def backbone(self, layers: int) -> int:
        """Bytes of the matrices of so many layers."""
        return layers * self.layer * self.dtype.itemsize

    def river(self, layers: int) -> int:
        fused = {"qkv": 0, "o": 0, "gate_up": 0, "down": 0}
        names = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
        columns: dict[str, int] = {}
        for key, shape in self.shapes.items():
            if ".layers.0." in key and len(shape) == 2:
                name = names[key.split(".")[-2].removesuffix("_proj")]
                fused[name] += shape[0]
                columns[name] = shape[1]
        return layers * sum(quantized_bytes(n, columns[name], 4, GROUP, self.dtype, CPU) for name, n in fused.items())

    @property
    def heads(self) -> tuple[int, int, int]:
        """Bytes of the exact head; of the river's and of the exact rows that rescore it, 0 where it has none."""
        vocab, hidden = self.config.vocab_size, self.config.hidden_size
        river = river_head_bytes(vocab, hidden, GROUP, dtype=self.dtype, device=CPU)
        return self.head * self.dtype.itemsize, river, K_SHORTLIST * hidden * self.dtype.itemsize if river else 0

    def operations(self, positions: float) -> float:
        """Of a row through all layers and a head, where no window is smaller than ``positions``."""
        config = self.config
        attention = 4 * positions * config.num_heads * config.head_dim
        return config.num_layers * (2 * self.layer + attention) + 2 * self.head


def run(tokens: int, *, batch: int = 1, seconds: float = 0.01, **more: Any) -> Run:
    """Of ``tokens`` tokens a sequence, ``seconds`` apart."""
    return Run(
        ttft_s=1.0,
        prefill_s=0.9,
        total_s=1.0 + seconds * (tokens - 1),
        intervals_s=(seconds,) * (tokens - 1),
        prompt_tokens=batch,
        new_tokens=tokens * batch,
        **more,
    )


@pytest.fixture(scope="module", params=DTYPES)
def river(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Files]]:
    with Engine.load(
        ROOT / "llama",
        device="cpu",
        dtype=request.param,
        ctx_size=64,
        mode="river",
        river_group=GROUP,
        river_method="rtn",
    ) as engine:
        yield engine, Files("llama", DTYPES[request.param])


def limit(engine: Engine, mode: str, *runs: Run, positions: float = 40, batch: int = 1) -> Limit:
    return token_limit(engine, mode, runs, MACHINE, positions=positions, batch=batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen2", "qwen3", "phi3"])
def test_an_exact_token_reads_the_files_once_and_what_is_cached(name: str, dtype: str) -> None:
    files = Files(name, DTYPES[dtype])
    layers = files.config.num_layers
    windows = [window or math.inf for window in files.config.windows]
    positions = min(7.5, *windows)
    with Engine.load(ROOT / name, device="cpu", dtype=dtype, ctx_size=64, mode="exact") as engine:
        got = limit(engine, "exact", run(5), positions=positions)
        assert engine.model.weight_bytes == files.backbone(layers) + files.heads[0]
    read = files.backbone(layers) + files.heads[0] + files.vectors + layers * files.kv * positions
    assert got.bytes == pytest.approx(read + files.row, rel=1e-12)
    assert got.operations == pytest.approx(files.operations(positions), rel=1e-12)


def test_a_sliding_window_caps_what_is_read() -> None:
    files = Files("mistral", torch.float32)
    (window,) = set(files.config.windows)
    assert window is not None
    with Engine.load(ROOT / "mistral", device="cpu", dtype="float32", ctx_size=64, mode="exact") as engine:
        inside, at, beyond = (limit(engine, "exact", run(3), positions=each) for each in (window - 2, window, 60))
    assert beyond == at
    assert at.bytes - inside.bytes == 2 * files.kv * files.config.num_layers
    assert at.operations == files.operations(window)


def test_a_batch_shares_weights_and_nothing_else(llama: Engine) -> None:
    files = Files("llama", torch.float32)
    layers = files.config.num_layers
    weights = files.backbone(layers) + files.heads[0] + files.vectors
    own = files.row + 40 * layers * files.kv
    for mode in ("exact", "lossless"):  # lossless mode decodes a batch as exact mode does
        got = limit(llama, mode, run(4, batch=3), run(6, batch=3), batch=3)
        assert got.bytes == pytest.approx(weights / 3 + own, rel=1e-12)
        assert got.operations == files.operations(40)
        assert got.achieved == pytest.approx(3 * got.seconds / 0.01)


def test_a_river_token_reads_the_backbone_up_to_its_exit(river: tuple[Engine, Files]) -> None:
    engine, files = river
    layers = files.config.num_layers
    exact, copy, rows = files.heads
    assert (copy > 0) == (engine.model.river_head is not None)
    own = files.vectors + files.row + 40 * layers * files.kv
    early = (copy + rows) if copy else exact
    # The first tokens are their prompts'.
    got = limit(
        engine, "river", run(3, exit_depths=(layers, 0, 2)), run(3, exit_depths=(1, layers, layers)), positions=40
    )
    depths = [files.river(layers) + early, files.backbone(2) + files.river(layers - 2) + early]
    depths += 2 * [files.backbone(layers) + exact]
    assert got.bytes == pytest.approx(sum(depths) / 4 + own, rel=1e-12)
    rescored = 2 * K_SHORTLIST * files.config.hidden_size if copy else 0
    assert got.operations == pytest.approx(files.operations(40) + rescored / 2, rel=1e-12)


def test_rows_of_a_batch_that_part_read_both_copies(river: tuple[Engine, Files]) -> None:
    engine, files = river
    layers = files.config.num_layers
    exact, copy, rows = files.heads
    own = files.row + 40 * layers * files.kv
    got = limit(engine, "river", run(3, batch=2, exit_depths=(layers, 1, layers, layers, 3, 2)), positions=40, batch=2)
    apart = files.backbone(3) + files.river(layers - 1) + ((copy + rows) if copy else exact)
    whole = files.backbone(layers) + files.river(layers - 2) + exact + copy  # the exact head has the 64 rows too
    assert got.bytes == pytest.approx((apart + whole + 2 * files.vectors) / 4 + own, rel=1e-12)


def test_a_lossless_token_is_its_share_of_drafts_and_verification(river: tuple[Engine, Files]) -> None:
    engine, files = river
    layers = files.config.num_layers
    exact, copy, rows = files.heads
    cached = 40 * layers * files.kv + files.vectors
    # 4 rounds: 9 tokens by the river and 5 looked up, of all of which 11 stay.
    got = limit(
        engine,
        "lossless",
        run(9, rounds=2, drafted=9, river_drafted=6, accepted=6),
        run(8, rounds=2, drafted=5, river_drafted=3, accepted=5),
    )
    verify = 4 * (files.backbone(layers) + exact + cached)
    draft = 9 * (files.river(layers) + ((copy + rows) if copy else exact) + cached)
    passed = (4 + 14 + 9) * files.row
    assert got.bytes == pytest.approx((verify + draft + passed) / (8 + 7), rel=1e-12)
    rescored = 9 * 2 * K_SHORTLIST * files.config.hidden_size if copy else 0
    assert got.operations == pytest.approx(((4 + 14 + 9) * files.operations(40) + rescored) / 15, rel=1e-12)


def test_the_slower_of_reading_and_computing_is_the_limit(llama: Engine) -> None:
    got = limit(llama, "exact", run(3, seconds=0.01), run(5, seconds=0.04))
    ratio = got.operations / got.bytes
    measured = (2 * 0.01 + 4 * 0.04) / 6

    def on(machine: Machine) -> Limit:
        return token_limit(llama, "exact", [run(3, seconds=0.01), run(5, seconds=0.04)], machine, positions=40, batch=1)

    reading = on(Machine(2e8, 2.1e8 * ratio))
    assert (reading.bound, reading.seconds) == ("bandwidth", pytest.approx(got.bytes / 2e8))
    computing = on(Machine(2e8, 1.9e8 * ratio))
    assert (computing.bound, computing.seconds) == ("compute", pytest.approx(got.bytes / 1.9e8))
    for each in (reading, computing):
        assert each.achieved == pytest.approx(each.seconds / measured)


def test_runs_without_a_limit_are_refused(llama: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="no token after the first"):
        limit(llama, "exact", run(1))
    with pytest.raises(InvalidRequestError, match="tokens: are 8 in 4 steps of 3; let all run equally long"):
        limit(llama, "exact", run(4, batch=2), batch=3)
    with pytest.raises(InvalidRequestError, match="equally long"):
        limit(llama, "river", run(4, exit_depths=(5, 1, 1)))
    with Engine.load(ROOT / "llama", device="cpu", ctx_size=32, mode="exact") as engine:
        pass
    with pytest.raises(EngineClosedError):
        limit(engine, "exact", run(3))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """A probe in little memory and time: bytes of its buffer."""
    size = 2**22
    monkeypatch.setattr(probing, "_LEAST", size)
    monkeypatch.setattr(probing, "_MOST", size)
    monkeypatch.setattr(probing, "_BUDGET_S", 0.0)
    return size


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_probe_finds_rates(small: int, dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    machine = probe(CPU, dtype)
    for rate in (machine.bytes_per_s, machine.operations_per_s):
        assert math.isfinite(rate)
        assert rate > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_are_work_over_time(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(0, 0.5)
    monkeypatch.setattr(probing, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    machine = probe(CPU, torch.float32)
    assert machine.bytes_per_s == small / 0.5
    assert machine.operations_per_s == 2 * probing._TILE**3 / 0.5


def test_the_best_of_all_passes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    waits = iter([9.0, 2.0, 5.0, 5.0, 9.0, 9.0, 4.0, 5.0, *[7.0] * 9])

    def work() -> None:
        nonlocal now
        now += next(waits)

    monkeypatch.setattr(probing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(probing, "_BUDGET_S", 0.0)
    assert probing._best_rate(CPU, [(60.0, work), (100.0, work)]) == 30.0
    assert list(waits) == [7.0] * 9  # two rounds of two calls each, whatever the budget
    now, waits = 0.0, iter([3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(probing, "_BUDGET_S", 13.0)
    assert probing._best_rate(CPU, [(6.0, work)]) == 6.0  # a third round, as the budget lasts


def test_products_grow_while_they_are_short(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_MOST", 2**26)
    monkeypatch.setattr(probing, "_LEAST", 2**26)
    monkeypatch.setattr(probing, "_seconds", lambda *_: 0.0)
    sizes = [probing._TILE, 2 * probing._TILE, 4 * probing._TILE]  # the next would not fit: three matrices of 64 MiB
    assert [amount for amount, _ in probing._products(CPU, torch.float32)] == [2 * size**3 for size in sizes]
    monkeypatch.setattr(probing, "_seconds", lambda *_: probing._LONGEST_S)
    assert len(probing._products(CPU, torch.float32)) == 1
    monkeypatch.setattr(probing, "available_memory", lambda _: 0)
    assert len(probing._products(CPU, torch.float32)) == 1


def test_reads_cover_the_buffer(small: int) -> None:
    (_, largest), (_, dot), (_, rows), _ = works = probing._reads()
    assert {amount for amount, _ in works} == {small}
    elements = small // 4
    found: list[Any] = [largest(), dot(), rows()]
    assert [float(each.sum()) for each in found] == [1.0, elements / 2, elements]


def test_the_buffer_is_larger_than_caches_and_leaves_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, free = 2**27, 2**40
    monkeypatch.setattr(probing, "_cache_bytes", lambda: cache)
    monkeypatch.setattr(probing, "available_memory", lambda _: free)
    assert probing._buffer_bytes(CPU) == 4 * cache
    cache = 0
    assert probing._buffer_bytes(CPU) == probing._LEAST
    cache = 2**40
    assert probing._buffer_bytes(CPU) == probing._MOST == 2**30
    free = 2**31
    assert probing._buffer_bytes(CPU) == free // 8
    free = None  # type: ignore[assignment]
    assert probing._buffer_bytes(CPU) == probing._MOST


def test_last_level_caches_add_up_once_each(tmp_path: Path) -> None:
    assert probing._cache_bytes(tmp_path) == 0
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, cpus, size) in enumerate(((1, cpu, 48), (2, cpu, 2048), (3, shared, 32768))):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("shared_cpu_list", cpus), ("size", f"{size}K")):
                (folder / name).write_text(f"{value}\n")
    assert probing._cache_bytes(tmp_path) == 2 * 32768 * 1024
    (tmp_path / "cpu0" / "cache" / "index2" / "size").write_text("?\n")
    assert probing._cache_bytes(tmp_path) == 0
