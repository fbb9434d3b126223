"""What the profiler's hooks cost a decode that nobody profiles, on a CPU.

    python bench/profile_cost.py [MODEL_DIR] [--new-tokens 96] [--runs 15] [--threads 2] [--save]

Exact mode, greedy, in three forms that take turns: layers compiled from a source out of which the marks were cut;
as they are; and as they are after clocks were attached to the engine and taken off again. With clocks comes last.
Milliseconds a token, median of all runs with its 95 % interval, and ratios to the first within runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from harness import interleave, median_interval, print_table, ratios, save
from prompts import KINDS

from riverinfer import Engine, SamplingParams
from riverinfer.demo import demo_model
from riverinfer.kernels import scripted
from riverinfer.profiling.instrument import Instruments

_MARK = re.compile(r"^ +if self\.timed:\n +_mark\(.*\)\n", re.MULTILINE)


def without_marks(layers: list) -> scripted.ScriptedLayers:
    """The layers' script, compiled from the same source but for its marks."""
    source, count = _MARK.subn("", inspect.getsource(scripted))
    assert count == len(scripted.MARKS)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "scripted_without_marks.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        script = module.script_layers(layers)
    assert script is not None
    return script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model_dir or demo_model()
    engine = Engine.load(folder, device="cpu", mode="exact", ctx_size=1024, max_sequences=1)
    model, params = engine.model, SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    ids = engine.encode_prompt(KINDS[0].text)
    instruments, forms = Instruments(engine), {"cut": without_marks(model.layers), "as it is": model.backbone_script}
    if model.backbone_script is None:
        sys.exit("no scripted layers here: nothing is compiled that could have marks")

    def decode(script: scripted.ScriptedLayers) -> float:
        model.backbone_script = script
        return engine.generate(ids, params).stats.decode_s * 1000 / (args.new_tokens - 1)

    def profiled() -> float:
        with instruments.attached():
            return engine.generate(ids, params).stats.decode_s * 1000 / (args.new_tokens - 1)

    def afterwards() -> float:
        with instruments.attached():
            pass
        return decode(forms["as it is"])

    contenders: dict[str, Callable[[], float]] = {
        "without hooks (marks cut out of the source)": lambda: decode(forms["cut"]),
        "as shipped": lambda: decode(forms["as it is"]),
        "as shipped, after a profile": afterwards,
        "with clocks": profiled,
    }
    found = interleave(contenders, runs=args.runs, warmup=2, progress="profile cost")
    first = next(iter(found))
    rows = []
    for name, values in found.items():
        middle, ratio = median_interval(values), ratios(values, found[first])
        rows.append([name, "{:.2f} ({:.2f}..{:.2f})".format(*middle), "{:.3f} ({:.3f}..{:.3f})".format(*ratio)])
    print_table([f"{folder.name}, {args.new_tokens} tokens, {args.runs} runs", "ms a token", "x without hooks"], rows)
    if args.save:
        settings = {"model": folder.name, "new tokens": args.new_tokens, "runs": args.runs}
        save("profile-cost-cpu.json", {"settings": settings, "ms": found})


if __name__ == "__main__":
    main()
