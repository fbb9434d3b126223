"""Registers, shared memory and spills of the Triton kernels at the shapes of models. Compiles; needs no GPU.

    python bench/kernel_table.py [--only "down sm_90"] [--jobs 2] [--save]

A few minutes the first time, seconds from Triton's cache. ``--save`` writes kernel_table.json and kernel_table.md to
bench/results. Needs the checkout with its tests, and pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness import RESULTS, print_table, save

sys.path.append(str(Path(__file__).parent.parent / "tests"))


@dataclass(frozen=True)
class Entry:
    """A kernel to compile: ``function`` of ``riverinfer.kernels.module``; the rest as ``compile_kernel`` takes it.

    kernel, shape, weights: what the table calls it. models: whose shape it is.
    """

    kernel: str
    shape: str
    weights: str
    models: tuple[str, ...]
    module: str
    function: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    capability: int = 90
    multiples: tuple[str, ...] = ()

    def has(self, words: str) -> bool:
        """Whether all of these words are in what the table calls it."""
        label = " ".join((self.kernel, *self.models, self.shape, self.weights, f"sm_{self.capability}"))
        return all(word in label for word in words.split())


@dataclass(frozen=True)
class Sizes:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def matrix(self, name: str) -> tuple[int, int]:
        """[N, K]."""
        heads = self.heads * self.head_dim
        return {
            "qkv": (heads + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, heads),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
        }[name]


MODELS = {
    "Llama-3.1-8B": Sizes(4096, 14336, 32, 8, 128, 128256),
    "Llama-3.2-1B": Sizes(2048, 8192, 32, 8, 64, 128256),
    "Phi-4-mini-3.8B": Sizes(3072, 8192, 24, 8, 128, 200064),
    "Ministral-3-8B": Sizes(4096, 14336, 32, 8, 128, 131072),
    "SmolLM2-135M": Sizes(576, 1536, 9, 3, 64, 49152),
    "SmolLM2-1.7B": Sizes(2048, 8192, 32, 32, 64, 49152),
}
BFLOAT16, W4, W8 = (16, 0), (4, 64), (8, 64)  # bits and group
TYPES = {
    "path": "*i32", "norm": "*fp32", "river_norm": "*fp32", "pairs": "*i32", "residual": "*fp32",
    "workspace": "*fp32", "counters": "*i32", "T": "i32", "eps": "fp32",
}  # fmt: skip
GATE = {
    "before": "*fp32", "tau": "*fp32", "limits": "*i32", "depth": "*i32", "undefined": "*i32", "similarities": "*fp32",
    "layer": "i32",
}  # fmt: skip


def matrix(model: str, name: str, kind: tuple[int, int], *, form: str, capability: int = 90) -> Entry:
    """A matrix of a model. form: "single", "dual", or "river", which is dual without the backbone's matrix.

    The last matrix of a dual layer, "down", has no gate; "down, gate" has one.
    """
    from riverinfer.kernels.linear_launch import COLUMNS, config_for

    plain, _, gated = name.partition(", ")
    (n, k), (bits, group) = MODELS[model].matrix(plain), kind
    config, dual = config_for(n, k), form != "single"
    normed, residual = plain in ("qkv", "gate_up", "head"), plain in ("o", "down")
    stored = {16: "*bf16", 4: "*i16", 8: "*u8"}[bits]
    types = {
        **TYPES, **(GATE if gated else {}), "x": "*fp32" if normed else "*bf16", "q": stored,
        "w": "*bf16" if dual else stored, "out": "*fp32" if residual or plain == "head" else "*bf16",
    }  # fmt: skip
    packed = bits != 16
    absent = ["bias", *["norm", "river_norm"] * (not normed), *["residual"] * (not residual)]
    absent += ["workspace", "counters"] * (config.split == 1 and not gated)
    absent += ["pairs"] * (not packed) + ["w"] * (form == "river")
    constants = {
        "SILU": plain == "gate_up", "N": n, "K": k, "BITS": bits, "GROUP": group, "BN": config.block_n, "BM": COLUMNS,
        "BK": config.block_k, "STAGES": config.packed_stages if packed and not dual else config.stages,
        "PACKED_STAGES": config.packed_stages, "UNROLL": config.unroll(group) if packed else 1,
        "SPLIT": config.split, **dict.fromkeys(absent),
    }  # fmt: skip
    module, function = ("triton_dual_linear", "dual_linear_kernel") if dual else ("triton_linear", "linear_kernel")
    return Entry(
        f"{form} {name}", f"{n}x{k}", f"{bits}-bit g{group}" if packed else "bf16", (model,),
        module, function, types, constants, config.warps, capability,
    )  # fmt: skip


def matrices() -> Iterator[Entry]:
    layer = ("qkv", "o", "gate_up", "down, gate", "head")
    for model in MODELS:
        for name in layer:
            yield matrix(model, name, W4, form="dual")
    for name in layer:
        yield matrix("Llama-3.1-8B", name, W4, form="dual", capability=80)
    for model in ("Llama-3.2-1B", "Phi-4-mini-3.8B", "SmolLM2-135M"):
        yield matrix(model, "down, gate", W4, form="dual", capability=80)
    for capability in (80, 90):
        for model in ("Llama-3.1-8B", "Llama-3.2-1B"):
            yield matrix(model, "down", W4, form="dual", capability=capability)
        yield matrix("Llama-3.1-8B", "down, gate", W4, form="river", capability=capability)
        for kind in (BFLOAT16, W4):
            yield matrix("Llama-3.1-8B", "gate_up", kind, form="single", capability=capability)
    for kind in (BFLOAT16, W4):
        yield matrix("Llama-3.1-8B", "down", kind, form="single")
    yield matrix("Llama-3.1-8B", "head", BFLOAT16, form="single")
    for kind in ((4, 32), (4, 128), W8, (8, 128)):
        yield matrix("Llama-3.1-8B", "gate_up", kind, form="dual")


ROWS = dict.fromkeys(("position", "slot", "path"), "*i32")


def attention() -> Iterator[Entry]:
    from riverinfer.kernels.triton_attention import blocks_for

    for (model, sizes), capability in product(MODELS.items(), (80, 90)):
        heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.head_dim
        shape, blocks = f"{heads}/{kv_heads} heads of {dim}", blocks_for(dim)
        types = {**ROWS, "counters": "*i32", **dict.fromkeys(("q", "kv", "out"), "*bf16"), "workspace": "*fp32"}
        types |= dict.fromkeys(("n", "length", "slot_stride", "window"), "i32")
        constants: dict[str, Any] = {
            "G": heads // kv_heads, "D": dim, "DP": dim, "COLUMNS": blocks.columns, "KEYS": blocks.keys, "SPLIT": 256,
            "STAGES": blocks.stages, "PAIRS": blocks.pairs, "PARTS": blocks.parts,
        }  # fmt: skip
        yield Entry(
            "attention", shape, "bf16 cache", (model,), "triton_attention", "attention_kernel",
            types, constants, blocks.warps, capability, ("slot_stride",),
        )  # fmt: skip
        types = {**ROWS, **dict.fromkeys(("qkv", "kv", "out"), "*bf16"), "length": "i32", "slot_stride": "i32"}
        types |= {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
        constants = {"HQ": heads, "HKV": kv_heads, "D": dim, "DP": dim, "ROTARY": dim}
        constants |= dict.fromkeys(("query_scale", "q_norm", "k_norm"))
        yield Entry(
            "rotation", shape, "bf16 cache", (model,), "triton_rope", "rope_kernel",
            types, constants, 1, capability, ("slot_stride",),
        )  # fmt: skip


def sampling() -> Iterator[Entry]:
    from riverinfer.kernels import triton_sampling as made

    types = {
        "logits": "*fp32", "path": "*i32", "temperature": "*fp64", "top_k": "*i32", "top_p": "*fp64", "min_p": "*fp64",
        "seed": "*i64", "position": "*i32", "token": "*i64", "logprob": "*fp32", "confidence": "*fp32",
        "counters": "*i32", "plan": "*i64", "statistics": "*fp32", "packed": "*i64", "sums": "*fp32", "races": "*fp64",
        "winners": "*i32", "masses": "*fp64", "kept": "*i32", "counts": "*i32", "coarse": "*i64", "fine": "*i64",
    }  # fmt: skip
    for vocab, capability in product((49152, 128256), (80, 90)):
        shape = {"V": vocab, "VOCAB": vocab, "BLOCK": made.BLOCK, "PARTS": made._parts(vocab)}
        passes: list[tuple[str, str, int, dict[str, Any]]] = [
            ("statistics", "statistics_kernel", made._WARPS, {"SAMPLED": True}),
            ("filter", "filter_kernel", made._FILTER_WARPS, {"PASS": 1}),
            ("race", "race_kernel", made._WARPS, {}),
        ]
        for name, function, warps, constants in passes:
            yield Entry(
                f"choice, {name}", f"{vocab} tokens", "", tuple(m for m, s in MODELS.items() if s.vocab == vocab),
                "triton_sampling", function, types, {**shape, **constants}, warps, capability,
            )  # fmt: skip


def entries() -> list[Entry]:
    """Everything in the table."""
    return merged(chain(matrices(), attention(), sampling()))


def merged(found: Iterable[Entry]) -> list[Entry]:
    """Each kernel once, with all the models that have it."""
    models: dict[str, list[str]] = {}
    first: dict[str, Entry] = {}
    for entry in found:
        key = repr(replace(entry, models=()))
        first.setdefault(key, entry)
        models.setdefault(key, []).extend(entry.models)
    return [replace(entry, models=tuple(dict.fromkeys(models[key]))) for key, entry in first.items()]


def compiled(entry: Entry) -> Any:
    """``triton_process.Compiled``."""
    from triton_process import compile_kernel

    function = getattr(import_module(f"riverinfer.kernels.{entry.module}"), entry.function)
    return compile_kernel(
        function, entry.types, entry.constants,
        warps=entry.warps, capability=entry.capability, multiples=entry.multiples,
    )  # fmt: skip


def row(entry: Entry) -> dict[str, Any]:
    made = compiled(entry)
    instructions = set(re.findall(r"\b((?:wg)?mma)\.\S*?(m\d+n\d+k\d+)", made.ptx))
    return {
        "kernel": entry.kernel,
        "models": entry.models,
        "shape": entry.shape,
        "weights": entry.weights,
        "capability": entry.capability,
        "warps": entry.warps,
        "registers": made.registers,
        "shared_bytes": made.shared,
        "spills_in_loops": made.spills,
        "local_bytes": made.local,
        "matrix_instructions": sorted(" ".join(found) for found in instructions),
    }


HEADER = (
    "kernel", "models", "shape", "weights", "GPU", "warps", "registers", "shared bytes", "spills in loops",
    "local bytes", "matrix instruction",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows with all of these words")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    chosen = [entry for entry in entries() if entry.has(options.only)]
    with get_context("spawn").Pool(options.jobs) as pool:
        rows = pool.map(row, chosen, chunksize=1)
    cells = [
        (
            found["kernel"], ", ".join(found["models"]), found["shape"], found["weights"], f"sm_{found['capability']}",
            *(str(found[name]) for name in ("warps", "registers", "shared_bytes", "spills_in_loops", "local_bytes")),
            ", ".join(found["matrix_instructions"]),
        )
        for found in rows
    ]  # fmt: skip
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_table(HEADER, cells)
    print(text.getvalue(), end="")
    if options.save:
        import triton

        save("kernel_table.json", {"triton": triton.__version__, "kernels": rows})
        (RESULTS / "kernel_table.md").write_text(text.getvalue())


if __name__ == "__main__":
    main()
