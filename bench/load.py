"""From an empty process to the first token, with the model's files in the page cache and without, beside the peers.

    python bench/load.py [MODEL_DIR] [--runs 7] [--first-starts 2] [--threads 2] [--gguf FILE] [--save]

Every start is a process of its own, timed from its creation: Python and the imports, the load (tokenizer, weights, and
what is made of them), the first token of a short prompt, greedy. All contenders, cold and warm, have a turn in each
run, in an order that rotates, after one run that warms up; tables have medians over runs and their 95 % bootstrap
intervals. ``--save`` writes load-cpu.json, .svg and .png to bench/results, or to a folder that follows it.

- cold: what the contender reads (the model folder and its rivers, the GGUF) was dropped from the page cache before.
  "still cached" is the share of it that stayed all the same, as another process's mapping makes it. Python, torch and
  the other libraries stay cached, as on a machine in use; so may the disk of a virtual machine in its host.
- warm: the files were read just before.
- lossless, river: the river was made by an earlier start, and lossless mode's choice measured.
- first start: lossless mode in an empty cache folder, model files dropped: rivers are quantized, measured and chosen.
  Once a model, not once a process: it is timed --first-starts times, after the others; of two, the interval is the
  range.
- Comparable: transformers bfloat16 with exact. llama.cpp reads a 4-bit GGUF, a third of the bytes, and repacks it;
  where it dies with the buffers that it was built for, it goes without. Its process imports no torch. Each engine
  encodes the bare prompt with its own tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from contenders import demo_gguf
from harness import RESULTS, color, figure, interleave, median_interval, print_table, ratios, save
from load_page_cache import CAN_DROP, drop, read, resident_share

from riverinfer.cache_dir import cache_dir
from riverinfer.checkpoint import Checkpoint
from riverinfer.demo import NAME, demo_model
from riverinfer.errors import DemoModelError
from riverinfer.weights_convert.river_artifact import list_rivers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = ("imports", "load", "first token")
SHADES = (0.3, 1.0, 0.6)  # of a contender's colour, by stage
STATES = ("cold", "warm") if CAN_DROP else ("warm",)
MODES = ("exact", "lossless", "river")
TRANSFORMERS, LLAMA_CPP = "transformers bfloat16", "llama.cpp, 4 bits"
PACKAGES = (("transformers", "transformers"), ("llama_cpp", "llama_cpp_python"))  # module, distribution
PEERS = (TRANSFORMERS, LLAMA_CPP)
FIRST = "lossless, first start"
CTX_SIZE = 4096
PROMPT = "The capital of France is"
WORKER = Path(__file__).with_name("load_worker.py")


@dataclass(frozen=True)
class Start:
    """``seconds`` of each stage. ``cached``: the share of the files' pages that were in memory when it began."""

    seconds: tuple[float, ...]
    cached: float

    @property
    def total(self) -> float:
        return sum(self.seconds)


@dataclass(frozen=True)
class Contender:
    """What ``load_worker.py`` starts, and the files that it will read, asked for anew before each start."""

    kind: str
    options: Mapping[str, Any]
    files: Callable[[], Sequence[Path]]

    def start(self, state: str, cache: Path | None = None) -> Start:
        """One process, with the files brought into ``state`` before. ``cache``: another cache folder than ours.

        Raises RuntimeError if it fails.
        """
        files = self.files()
        (drop if state == "cold" else read)(files)
        cached = resident_share(files)
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # as the command line does
        if cache is not None:
            environment["RIVERINFER_CACHE"] = str(cache)
        command = [sys.executable, str(WORKER), self.kind, json.dumps(self.options)]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{self.kind} ended with status {done.returncode}\n{done.stderr}")
        ends = json.loads(done.stdout.splitlines()[-1])
        seconds = (end - before for before, end in zip([began, *ends], ends, strict=False))
        return Start(tuple(seconds), cached)


def make_contenders(folder: Path, threads: int, gguf: Path | None) -> dict[str, Contender]:
    """The modes, and the peers that are installed. Without ``gguf`` there is no llama.cpp."""
    checkpoint = Checkpoint.open(folder)
    model = [path for path in sorted(folder.iterdir()) if path.is_file()]
    common = {"threads": threads, "prompt": PROMPT}

    def ours() -> list[Path]:
        return [*model, *(info.path for info in list_rivers(checkpoint))]

    at = {"folder": str(folder.resolve())}
    found = {
        mode: Contender("riverinfer", {**at, **common, "mode": mode, "ctx_size": CTX_SIZE}, ours) for mode in MODES
    }
    if find_spec("transformers") is not None:
        found[TRANSFORMERS] = Contender("transformers", {**at, **common}, lambda: model)
    if gguf is not None:
        options = {"gguf": str(gguf), "ctx_size": CTX_SIZE, **common}
        for extra_buffers in (True, False):
            peer = Contender("llama_cpp", {**options, "extra_buffers": extra_buffers}, lambda: [gguf])
            if works(peer):
                found[LLAMA_CPP] = peer
                break
            what = "as built" if extra_buffers else "without extra buffers"
            print(f"llama.cpp {what} does not start here; see peers/llama_cpp_peer.py\n", file=sys.stderr)
    return found


def works(contender: Contender) -> bool:
    """Whether it starts at all."""
    try:
        contender.start("warm")
    except RuntimeError:
        return False
    return True


def first_start(lossless: Contender) -> Start:
    """Cold, with an empty cache folder on the same disk as ours."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="first-start-") as name:
        return lossless.start(STATES[0], Path(name))


def rows(found: Mapping[tuple[str, str], Sequence[Start]], reference: str) -> list[list[str]]:
    """A row for each contender and state. Ratios are to ``reference`` in the same state and run."""
    table = []
    for (name, state), starts in found.items():
        totals = [start.total for start in starts]
        stages = [statistics.median(values) for values in zip(*(start.seconds for start in starts), strict=True)]
        middle, low, high = median_interval(totals)
        cells = [name, state, *(f"{value:.2f}" for value in stages), f"{middle:.2f} ({low:.2f}..{high:.2f})"]
        if name == FIRST:  # not in those runs
            cells.append("–")
        else:
            others = [start.total for start in found[reference, state]]
            cells.append("{:.2f} ({:.2f}..{:.2f})".format(*ratios(totals, others)))
        table.append([*cells, f"{max(start.cached for start in starts) * 100:.0f}"])
    return table


def draw(axes: Axes, found: Mapping[tuple[str, str], Sequence[Start]]) -> None:
    """Stacked bars of the stages' medians, the median of the whole and its interval over them.

    A first start would dwarf the others: it is left to words.
    """
    shown = {key: starts for key, starts in found.items() if key[0] != FIRST}
    names = list(dict.fromkeys(name for name, _ in shown))
    states = list(dict.fromkeys(state for _, state in shown))
    places, labels = [], []
    widest = max(median_interval([start.total for start in starts])[2] for starts in shown.values())
    for (name, state), starts in shown.items():
        place = names.index(name) * (len(states) + 0.6) + states.index(state)
        places.append(place)
        labels.append(f"{name}, {state}")
        left = 0.0
        for number, alpha in enumerate(SHADES):
            width = statistics.median(start.seconds[number] for start in starts)
            axes.barh(place, width, left=left, color=color(name), alpha=alpha, height=0.85)
            left += width
        middle, low, high = median_interval([start.total for start in starts])
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        axes.plot(middle, place, "|", color="black")
        axes.text(max(high, left) + 0.015 * widest, place, f"{middle:.2f}", va="center", fontsize=9)
    for stage, alpha in zip(STAGES, SHADES, strict=True):
        axes.barh(0, 0, color="0.25", alpha=alpha, label=stage)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, widest * 1.15)
    first = [start.total for (name, _), starts in found.items() if name == FIRST for start in starts]
    note = f"; {FIRST}: {statistics.median(first):.0f} s" if first else ""
    axes.set_xlabel(f"seconds, median of {max(map(len, shown.values()))} starts{note}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=len(STAGES))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1, help="runs that are not counted (%(default)s)")
    parser.add_argument("--first-starts", type=int, default=2, help="in an empty cache folder (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*MODES, *PEERS], default=[*MODES, *PEERS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp; the demo's own is known")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help="JSON and figures (bench/results)"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    folder = args.model_dir or demo_model()
    gguf = args.gguf
    if LLAMA_CPP not in args.only or find_spec("llama_cpp") is None:
        gguf = None
    elif gguf is None and folder.name == NAME:
        try:
            gguf = demo_gguf()
        except (DemoModelError, OSError) as exc:
            print(f"llama.cpp is left out: {exc}\n", file=sys.stderr)
    known = make_contenders(folder, args.threads, gguf)
    contenders = {name: contender for name, contender in known.items() if name in args.only}
    if not CAN_DROP:
        print("this system cannot drop files from its page cache: there are no cold starts\n", file=sys.stderr)

    turns = {
        (name, state): lambda contender=contender, state=state: contender.start(state)
        for name, contender in contenders.items()
        for state in STATES
    }
    by_name = interleave(
        {f"{name}, {state}": turn for (name, state), turn in turns.items()},
        runs=args.runs,
        warmup=args.warmup,
        progress="starts",
    )
    found = {key: by_name[", ".join(key)] for key in turns}
    if args.first_starts:
        found[FIRST, STATES[0]] = [first_start(known["lossless"]) for _ in range(args.first_starts)]

    reference = next(iter(contenders))
    title = f"{folder.name}, {args.threads} threads"
    table = rows(found, reference)
    print(f"\nseconds: medians of {args.runs} starts (95 % interval)\n")
    print_table([title, "files", *STAGES, "in all", f"x {reference}", "% still cached"], table)
    stuck = {key[0] for key, starts in found.items() if key[1] == "cold" and max(s.cached for s in starts) > 0.01}
    if stuck:
        print(f"Not cold, for files of theirs stayed in the page cache: {', '.join(sorted(stuck))}\n")
    if args.save:
        starts = [
            {
                "contender": name,
                "files": state,
                "seconds": [s.seconds for s in each],
                "cached": [s.cached for s in each],
            }
            for (name, state), each in found.items()
        ]
        settings = {"model": folder.name, "gguf": gguf and gguf.name, "prompt": PROMPT}
        settings["packages"] = {name: version(name) for module, name in PACKAGES if find_spec(module) is not None}
        settings["extra buffers"] = LLAMA_CPP in contenders and contenders[LLAMA_CPP].options["extra_buffers"]
        settings |= {"runs": args.runs, "first starts": args.first_starts, "ctx_size": CTX_SIZE}
        result = {"settings": settings, "stages": STAGES, "starts": starts, "table": table}
        args.save.mkdir(parents=True, exist_ok=True)
        save("load-cpu.json", result, args.save)
        figure(
            "load-cpu",
            lambda axes: draw(axes, found),
            title=f"Start to first token: {title}",
            folder=args.save,
        )


if __name__ == "__main__":
    main()
