"""Memory against context length, measured beside a formula; and the paper's figures beside the same formula.

    python bench/memory.py [MODEL_DIR] [--contexts 4096,8192,16384,32768,65536] [--layers 5] [--group 64] [--save]

For each context and setting a process of its own loads the model in bfloat16 for one sequence and writes the whole KV
cache. To read so many tokens would take too long on a CPU, so the cache holds zeros; then three tokens are decoded at
the last positions and the last chunk of a prompt that fills the context is read, which attend to all of it. Memory
does not depend on the values. A model with a smaller limit is measured as a scratch copy: links to its files, and a
config with larger max_position_embeddings (its text there would be nonsense). Rivers are made before, by another
process. Median of --runs. ``--save`` writes memory-cpu.json, .svg and .png to bench/results, or to a folder that
follows it. Linux only.

All in MiB, and over what the process took before it loaded, Python and torch:

- formula: parameters x 2 bytes, 4 bits + 4 bytes a group, 2 x layers x kv heads x head_dim x context x 2, norms and
  rotary tables in float32 (``memory_formula``). report: ``Engine.memory().total``. The embedding is in neither: it
  stays in its mapped file.
- held: anonymous memory (RssAnon) once loaded, with a full cache. over: held less tokenizer and formula.
- peaks (VmHWM), mapped pages of libraries and files included: of loading (the cache not yet written), of a step, and of
  the prompt's last chunk.

The paper's figures leave no room for workspace or scales. "read as" is our reading: the plainest sum that gives them to
two decimals, where one was found. Ours is as on a GPU, workspace left out as there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from harness import RESULTS, color, figure, interleave, print_table, save
from memory_formula import GIB, PAPER, Shapes, engine_parts, ours_as_paper, ours_over_paper, paper_sums

from riverinfer.checkpoint import Checkpoint
from riverinfer.demo import demo_model
from riverinfer.kernels.quantized_linear import packed_group
from riverinfer.weights_convert.river_artifact import RiverSettings, build_river, linear_shapes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
CONTEXTS = "4096,8192,16384,32768,65536"
GROUPS = (64, 128)  # of the paper's model as we would hold it
WORKER = Path(__file__).with_name("memory_worker.py")
Key = tuple[str, int]  # setting, context


def settings(layers: int, held: int, group: int) -> dict[str, dict[str, Any]]:
    """Options of ``Engine.load`` by name. ``layers``: of the model; ``held``: of its backbone, in one of them."""
    river = {"mode": "river", "river_bits": 4, "river_group": group}
    return {
        "exact": {"mode": "exact"},
        f"river, all {layers} backbone layers": river,
        f"river, {held} backbone layers": {**river, "backbone_layers": held},
        "river alone, gate always": {**river, "backbone_layers": 0, "gate": "always"},
    }


def formula(shapes: Shapes, context: int, options: Mapping[str, Any]) -> dict[str, int]:
    held = options.get("backbone_layers", shapes.layers)
    return engine_parts(shapes, context, backbone=held, group=options.get("river_group"), mapped=True)


@contextmanager
def long_enough(folder: Path, positions: int) -> Iterator[Path]:
    """The folder, or where its model is made for fewer positions, a copy of links that claims more of them.

    The copy's rivers are its own: they have a cache folder that goes with it.
    """
    config = Checkpoint.open(folder).config
    if config.context_limit >= positions:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="riverinfer-memory-") as name, _environment(RIVERINFER_CACHE=name):
        copy = Path(name) / folder.name
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).symlink_to(path.resolve())
        fields = json.loads((folder / "config.json").read_text())
        (fields["text_config"] if config.nested else fields)["max_position_embeddings"] = positions
        (copy / "config.json").unlink()
        (copy / "config.json").write_text(json.dumps(fields))
        yield copy


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_packed(folder: Path, group: int) -> bool:
    """Whether this machine keeps the river's matrices in 4 bits; the formula knows nothing else."""
    shapes = linear_shapes(Checkpoint.open(folder).config).values()
    place = torch.device("cpu")
    return all(packed_group(rows, columns, 4, group, torch.bfloat16, place) == group for rows, columns in shapes)


def measure(folder: Path, context: int, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """What ``memory_worker.measure`` gives, in bytes. Raises RuntimeError if it fails."""
    request = {"folder": str(folder), "context": context, "threads": threads, "options": options}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1"},  # as the command line does
    )
    if done.returncode:
        raise RuntimeError(f"{options} with {context} positions was not measured\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(measured: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Medians over runs, in bytes over what was taken before."""

    def middle(values: Sequence[int]) -> int:
        return int(statistics.median(values))

    return {
        "report": middle([run["report"]["total"] for run in measured]),
        "held": middle([run["held"]["RssAnon"] - run["before"]["RssAnon"] for run in measured]),
        "tokenizer": middle([run["tokenizer"] for run in measured]),
        **{
            f"peak of {part}": middle([run["peaks"][name] - run["before"]["VmRSS"] for run in measured])
            for name, part in (("load", "loading"), ("step", "a step"), ("prompt", "a prompt's end"))
        },
    }


def memory_row(key: Key, found: Mapping[str, int], total: int) -> list[str]:
    over = found["held"] - found["tokenizer"] - total
    figures = [total, found["report"], found["held"], found["tokenizer"], over]
    figures += [value for name, value in found.items() if name.startswith("peak")]
    return [key[0], str(key[1]), *(f"{value / MIB:.1f}" for value in figures)]


def paper_rows() -> list[list[str]]:
    """The paper's figures, the sums that give them, and what riverinfer holds in the same place; GiB."""
    sums, ours = paper_sums(), {group: ours_as_paper(group) for group in GROUPS}
    rows = []
    for name, published in PAPER.items():
        words, total = sums.get(name, ("no plain sum is known", None))
        cells = [name, f"{published:.2f}", words, "–" if total is None else f"{total:.2f}"]
        for group in GROUPS:
            parts = ours[group].get(name)
            held = None if parts is None else sum(parts.values()) / GIB
            cells += ["–", "–"] if held is None else [f"{held:.2f}", f"{held - published:+.2f}"]
        rows.append(cells)
    return rows


def draw(axes: Axes, shapes: Shapes, options: Mapping[str, Mapping[str, Any]], found: Mapping[Key, Mapping]) -> None:
    """Lines by the formula; filled marks are what was held, hollow ones the peak at the end of a prompt."""
    contexts = sorted({context for _, context in found})
    for (name, chosen), mark in zip(options.items(), "osvD", strict=True):
        shade, dashed = color(name), "backbone_layers" in chosen
        totals = [sum(formula(shapes, context, chosen).values()) / GIB for context in contexts]
        held, peak = (
            [found[name, context][part] / GIB for context in contexts] for part in ("held", "peak of a prompt's end")
        )
        axes.plot(contexts, totals, color=shade, linestyle="--" if dashed else "-", linewidth=1.2)
        axes.plot(contexts, held, mark, color=shade, label=name, zorder=3)
        axes.plot(contexts, peak, mark, color=shade, markerfacecolor="none")
    axes.plot([], [], "-", color="0.3", linewidth=1.2, label="formula")
    axes.plot([], [], "o", color="0.3", label="measured, cache full")
    axes.plot([], [], "o", color="0.3", markerfacecolor="none", label="measured peak, end of a prompt")
    axes.set_xticks(contexts, [f"{context // 1024}K" if context >= 1024 else str(context) for context in contexts])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("GiB over an empty process")
    axes.set_ylim(bottom=0)
    axes.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--contexts", default=CONTEXTS, help="positions, with commas between (%(default)s)")
    parser.add_argument("--layers", type=int, default=5, help="of the backbone, where not all are held (%(default)s)")
    parser.add_argument("--group", type=int, default=64, help="of the 4-bit river (%(default)s)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--save", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help="JSON and figures (bench/results)"
    )
    args = parser.parse_args(arguments)
    if not Path("/proc/self/clear_refs").exists():
        parser.error("memory is read from Linux's /proc")
    contexts = sorted({int(context) for context in args.contexts.split(",")})
    torch.set_num_threads(args.threads)
    model = args.model_dir or demo_model()
    if not is_packed(model, args.group):
        parser.error(f"no kernel of this machine reads a 4-bit river of group {args.group}")

    checkpoint = Checkpoint.open(model)
    shapes = Shapes.of(checkpoint.config, tied=checkpoint.head_name != "lm_head.weight")
    options = settings(shapes.layers, min(args.layers, shapes.layers), args.group)
    keys = [(name, context) for context in contexts for name in options]
    with long_enough(model, contexts[-1]) as folder:
        build_river(Checkpoint.open(folder), RiverSettings(4, args.group))
        turns = {
            f"{name}, {context}": partial(measure, folder, context, args.threads, options[name])
            for name, context in keys
        }
        by_name = interleave(turns, runs=args.runs, warmup=0, progress="memory")
    measured = {key: by_name["{}, {}".format(*key)] for key in keys}
    found = {key: summary(runs) for key, runs in measured.items()}
    parts = {(name, context): formula(shapes, context, options[name]) for name, context in keys}

    names = [name for name in found[keys[0]] if name.startswith("peak")]
    header = [model.name, "context", "formula", "report", "held", "of it tokenizer", "over", *names]
    table = [memory_row(key, found[key], sum(parts[key].values())) for key in keys]
    spread = max(
        max(values) - min(values)
        for runs in measured.values()
        for values in [[run["held"]["RssAnon"] - run["before"]["RssAnon"] for run in runs]]
    )
    print("\nMiB over the empty process; see the head of this file\n")
    print_table(header, table)
    print(f"Runs of one setting differ by {spread / MIB:.1f} MiB at most in what is held.\n")
    paper_header = ["Llama-3.1-8B at 64K, GiB", "paper", "read as", "that sum"]
    paper_header += [words for group in GROUPS for words in (f"ours, group {group}", "over the paper")]
    print_table(paper_header, paper_rows())
    for name in ours_as_paper(GROUPS[0]):
        over = ours_over_paper(name, GROUPS[0])
        said = " + ".join(f"{value / GIB:.2f} {part}" for part, value in over.items())
        print(f"{name}, group {GROUPS[0]}: {sum(over.values()) / GIB:.2f} GiB over that sum: {said}")

    if args.save:
        rows = [
            {"setting": name, "context": context, "formula": parts[name, context], **found[name, context]}
            for name, context in keys
        ]
        raw = [{"setting": name, "context": context, "runs": runs} for (name, context), runs in measured.items()]
        described = {"model": model.name, "runs": args.runs, "group": args.group, "options": options}
        described["scratch copy"] = folder != model
        paper = {"header": paper_header, "table": paper_rows()}
        result = {"settings": described, "bytes": rows, "table": table, "header": header, "paper": paper, "raw": raw}
        args.save.mkdir(parents=True, exist_ok=True)
        save("memory-cpu.json", result, args.save)
        title = f"{model.name}, one sequence, bfloat16, river w4g{args.group}"
        figure("memory-cpu", lambda axes: draw(axes, shapes, options, found), title=title, folder=args.save)


if __name__ == "__main__":
    main()
