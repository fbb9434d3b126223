"""The GPU path on an NVIDIA card: is it right, how fast are its kernels, steps and texts, and how fast are others?

    python bench/gpu.py                                  # all but text, which needs a model
    python bench/gpu.py --model DIR                      # all
    python bench/gpu.py --gguf-parts A B                 # the same, with a GGUF that came in parts
    python bench/gpu.py --only checks                    # of machine, checks, steps, memory, kernels, text, peers, tune
    python bench/gpu.py --only tune                      # blocks by measurement: a table for --table, or to ship
    python bench/gpu.py --dry --model tests/golden/llama # every section, tiny, under Triton's interpreter, on a CPU

Writes gpu.json into --out, else $OUT, else here: after every measurement, so that a run that is cut short leaves what
it had. --resume takes such a file and measures what is missing in it. Exit status 1: a check failed, or lossless was
not exact. Needs torch, Triton and the checkout, no installation; gguf for --gguf-parts.

Each section has its seconds, and all together --minutes: what does not fit is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for a GPU does not take hold of it: we fork
sys.path.insert(0, str(ROOT))

if find_spec("platformdirs") is None:  # on a bare machine; RIVERINFER_CACHE says where the cache is
    stand_in: Any = ModuleType("platformdirs")
    stand_in.user_cache_path = stand_in.user_state_path = lambda *_, **__: Path(tempfile.gettempdir())
    sys.modules["platformdirs"] = stand_in

import gpu_checks  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_models  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_steps  # noqa: E402
import gpu_targets  # noqa: E402
import gpu_text  # noqa: E402
import gpu_tune  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from gpu_run import DRY, Part, Results, Setting, failure, in_processes, read_json, write_json  # noqa: E402


@dataclass(frozen=True)
class Section:
    """seconds: it gets at most. inference: its tensors are torch's inference tensors."""

    name: str
    run: Callable[[Part, Setting], None]
    seconds: float
    processes: int = 1
    inference: bool = True
    asked: bool = False  # only by name


def machine(part: Part, _: Setting) -> None:
    """The card, and how fast it copies."""
    found: Results = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "dry": DRY,
    }
    if find_spec("transformers") is not None:
        import transformers

        found["transformers"] = transformers.__version__
    if not DRY:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "l2_bytes": getattr(card, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
    part.results.update(found)
    part.save()
    copied = part.attempt("copy_bytes_per_s", gpu_kernels.bandwidth)
    for name, value in part.results.items():
        print(f"{name}: {value}")
    print(f"copy, read and written: {(copied or 0) / 1e12:.2f} TB/s", flush=True)


def _checks(part: Part, _: Setting) -> None:
    gpu_checks.checks(part)


SECTIONS = (
    Section("machine", machine, 60),
    Section("checks", _checks, 150, processes=1 if DRY else max(2, min(8, (os.cpu_count() or 2) // 2))),
    Section("steps", gpu_steps.steps, 120),
    Section("memory", gpu_steps.memory, 45),
    Section("kernels", gpu_kernels.kernels, 110),
    Section("text", gpu_text.text, 120),
    Section("peers", gpu_peers.peers, 170, inference=False),
    Section("tune", gpu_tune.tune, 300, asked=True),
)


def commit(given: str | None) -> str | None:
    """Of the checkout, read without git, which a bare machine lacks; None where there is no .git either."""
    if given:
        return given
    folder = ROOT / ".git"
    try:
        if folder.is_file():
            folder = ROOT / folder.read_text().removeprefix("gitdir:").strip()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        common = folder / "commondir"
        shared = folder / common.read_text().strip() if common.is_file() else folder
        for place in (folder, shared):
            if (place / name).is_file():
                return (place / name).read_text().strip()
        packed = (line.split() for line in (shared / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    except OSError:
        return None


def compiled() -> int:
    """Kernels that Triton keeps on this machine."""
    if DRY:
        return 0
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return len({path.parent.name for path in folder.glob("*/*.cubin")})


def chosen(only: list[str], skip: list[str], model: bool) -> list[Section]:
    found = []
    for section in SECTIONS:
        wanted = section.name in only if only else not section.asked
        if section.name == "machine":
            wanted = True
        if not wanted or section.name in skip:
            continue
        if section.name == "text" and not model:
            print("text is left out: no --model and no --gguf-parts")
            continue
        found.append(section)
    return found


def run_section(
    section: Section,
    setting: Setting,
    table: Path | None,
    seconds: float,
    work: Path,
    keep: Callable[[Results], None],
    known: Results,
) -> Results:
    def inside(part: Part) -> None:
        gpu_models.know_blocks(table)
        with torch.inference_mode(section.inference):
            section.run(part, setting)

    run = partial(in_processes, section.name, inside, work, seconds, keep)
    return run(processes=section.processes, known=known)


def as_list(checks: Results) -> list[Results]:
    """Each check: name, whether it passed, and what there is to say."""
    return [
        {"check": name, "passed": not failure(kept), "remark": failure(kept) or kept.get("remark", ""), **kept}
        for name, kept in checks.items()
    ]


def measured(results: Results) -> Results:
    """Without what failed or was left out, which is to be tried again."""
    return {name: kept for name, kept in results.items() if not failure(kept)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    sections = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU under Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for gpu.json")
    parser.add_argument("--only", type=sections, default=[], help=f"some of {','.join(names)}")
    parser.add_argument("--skip", type=sections, default=[])
    parser.add_argument("--model", type=Path, help="a model folder, for text and peers")
    parser.add_argument("--gguf-parts", type=Path, nargs="+", help="instead of --model: a GGUF's parts, in order")
    parser.add_argument("--table", type=Path, help="blocks of the matrices, as tune writes them")
    parser.add_argument("--resume", type=Path, help="an earlier gpu.json, of the same card and code")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections (%(default)s)")
    parser.add_argument("--commit", help="of this checkout, where it has no .git")
    options = parser.parse_args()
    unknown = {*options.only, *options.skip} - {*names}
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="riverinfer-gpu-") as work:
        os.environ.setdefault("RIVERINFER_CACHE", str(Path(work) / "cache"))
        sys.exit(run(options, Path(work)))


def run(options: argparse.Namespace, work: Path) -> int:
    """The exit status."""
    ends = time.monotonic() + options.minutes * 60
    results: Results = read_json(options.resume) if options.resume else {}
    card = results.get("machine", {}).get("gpu")
    results |= {"commit": commit(options.commit), "command": sys.argv[1:]}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.json"

    def keep(name: str, found: Results) -> None:
        results[name] = as_list(found) if name == "checks" else found
        write_json(path, results)

    setting, before = Setting(model=options.model), compiled()
    if options.gguf_parts:
        conversion = Section("convert", partial(gpu_text.convert_parts, options.gguf_parts, work), 90)
        made = run_section(conversion, setting, None, conversion.seconds, work, lambda _: None, {}).get("folder")
        setting = replace(setting, model=Path(made) if isinstance(made, str) else None)
    for section in chosen(options.only, options.skip, setting.model is not None):
        began, left = time.monotonic(), ends - time.monotonic()
        if left < 10:
            print(f"\n{section.name} is left out: no time left")
            continue
        print(f"\n== {section.name} ==", flush=True)
        earlier = {} if section.name == "machine" else results.get(section.name, {})
        if isinstance(earlier, list):
            earlier = {each["check"]: {"remark": each["remark"]} for each in earlier if each["passed"]}
        run_this = partial(run_section, section, setting, options.table, min(section.seconds, left), work)
        if section.name == "tune":
            first = replace(section, name="compile", run=gpu_tune.compile_candidates, processes=SECTIONS[1].processes)
            run_section(first, setting, options.table, min(200.0, left), work, lambda _: None, {})
        found = run_this(partial(keep, section.name), measured(earlier))
        if section.name == "machine":
            if card and card != found.get("gpu"):
                print(f"--resume is of another card, {card}: all is measured")
                results = {"commit": results["commit"], "command": results["command"], "machine": found}
            setting = replace(setting, bandwidth=found.get("copy_bytes_per_s") or 1.0)
            if failure(found.get("section")) or failure(found.get("copy_bytes_per_s")):
                print("there is no GPU to measure")
                return 1
        if section.name == "tune":
            table = gpu_tune.write_table({**results["machine"], **found}, options.out)
            print(f"saved {table}")
        now = compiled()
        results.setdefault("seconds", {})[section.name] = time.monotonic() - began
        results.setdefault("compiled", {})[section.name] = now - before
        print(f"({time.monotonic() - began:.0f} s, {now - before} kernels compiled)", flush=True)
        before = now
        write_json(path, results)
    return _report(results, path)


def _report(results: Results, path: Path) -> int:
    rows = gpu_targets.rows(results)
    results["targets"] = [dict(zip(("target", "bound", "measured", "verdict"), row, strict=True)) for row in rows]
    write_json(path, results)
    print("\n| target | bound | measured | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    failed = [each["check"] for each in results.get("checks", []) if not each["passed"]]
    wrong = [name for name, kept in results.items() if isinstance(kept, dict) for x in kept.values() if failure(x)]
    if wrong:
        print(f"\nfailed or left out in {', '.join(f'{name} ({wrong.count(name)})' for name in dict.fromkeys(wrong))}")
    checks = len(results.get("checks", []))
    print(f"\n{checks - len(failed)} checks passed, {len(failed)} failed {json.dumps(failed) if failed else ''}")
    print(f"saved {path}")
    summary = results.get("text", {}).get("summary", {})
    return int(bool(failed) or results.get("checks") == [] or summary.get("equal") != summary.get("texts"))


if __name__ == "__main__":
    main()
