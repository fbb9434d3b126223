"""A real model's text on the GPU: every mode side by side, and whether lossless is exact.

Prompts are those of ``prompts.py``, under the chat template if there is one. Each goes to every contender in turn, up
to ``NEW_TOKENS`` past any end of text; rates are those of the tokens after the first. "equal" asks for the same tokens
and the same log-probabilities, to the bit.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from gpu_run import DEVICE, DRY, Part, Results, Setting, release, synchronize
from prompts import KINDS, PROMPTS, Prompt

from riverinfer import Engine, Output, SamplingParams
from riverinfer.cache_dir import cache_dir
from riverinfer.config import load_config
from riverinfer.errors import ChatTemplateError
from riverinfer.kernels import triton_tuning
from riverinfer.kernels.linear_launch import config_for
from riverinfer.river import RiverOptions
from riverinfer.weights_convert import convert
from riverinfer.weights_convert.river_artifact import linear_shapes

NEW_TOKENS = 3 if DRY else 128
CTX_SIZE = 128 if DRY else 2048
SEED = 1
Contender = tuple[Engine, str, RiverOptions | None]


def join(parts: list[Path], target: Path) -> Path:
    """A file that was cut into ``parts`` to travel."""
    with target.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    return target


def text(part: Part, setting: Setting) -> None:
    folder = setting.model
    assert folder is not None
    _spare_tuning(folder)
    contenders = _contenders(part, folder)
    exact = contenders.get("exact")
    if exact is None:
        return
    prompts = KINDS[:1] if DRY else [*KINDS, *(Prompt("chat", words[:20], words) for words in PROMPTS)]
    print(f"{folder.name}: tokens/s\n| kind | prompt | {' | '.join(contenders)} | lossless is exact |")
    print("|---" * (len(contenders) + 3) + "|", flush=True)
    warm: set[bool] = set()
    for prompt in prompts:
        if prompt.sampled not in warm and not DRY:
            warm.add(prompt.sampled)
            for name, each in contenders.items():
                part.make(f"warm-up, {name}", partial(_say, each, prompt))
        found = part.attempt(f"{prompt.kind} {prompt.name}", partial(_side_by_side, contenders, prompt), needs=4)
        if found:
            rates = [f"{found['tokens_per_s'][name]:.0f}" for name in contenders]
            equal = " ".join("yes" if each else "NO" for each in found["equal"].values())
            print(f"| {prompt.kind} | {prompt.name} | {' | '.join(rates)} | {equal} |", flush=True)
    _summary(part, list(contenders))
    for engine in {id(each[0]): each[0] for each in contenders.values()}.values():
        engine.close()
    release()


def _spare_tuning(folder: Path) -> None:
    """Let the engine find blocks for this model's matrices instead of measuring them for a minute."""
    if DRY:
        return
    config = load_config(folder)
    shapes = [*linear_shapes(config).values(), (config.vocab_size, config.hidden_size)]
    path = cache_dir() / "kernels" / triton_tuning.file_name(torch.cuda.get_device_name())
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({f"{n}x{k}": asdict(config_for(n, k)) for n, k in shapes}))


def _contenders(part: Part, folder: Path) -> dict[str, Contender]:
    common: Results = {"device": DEVICE.type, "dtype": "bfloat16", "ctx_size": CTX_SIZE, "max_sequences": 1}
    four: Results = {"river_bits": 4, "river_group": 32 if DRY else 64}
    quick = {"river_method": "rtn"} if DRY else {}
    default = four | quick if DRY else {}
    wanted: dict[str, Results] = {
        "default": {"mode": "lossless", **default},
        "4-bit": {"mode": "river", **four, **quick},
        "layer by layer": {"mode": "exact", "graph": False},
    }
    engines: dict[str, Engine] = {}
    for name, options in wanted.items():
        began = time.perf_counter()
        engine = part.make(f"load, {name}", lambda: Engine.load(folder, **common, **options))  # noqa: B023
        if engine is None:
            continue
        synchronize()
        engines[name] = engine
        seconds = time.perf_counter() - began
        river = None if engine.river_settings is None else str(engine.river_settings)
        loaded = {"seconds": seconds, "river": river, "memory": engine.memory().as_dict()}
        part.results[f"load, {name}"] = loaded
        part.save()
        print(f"loaded in {seconds:.1f} s: {name}, river {river}: {engine.memory()}", flush=True)
    found: dict[str, Contender] = {}
    if "layer by layer" in engines:
        found["exact, no graphs"] = (engines["layer by layer"], "exact", None)
    if "default" in engines:
        found["exact"] = (engines["default"], "exact", None)
        found["lossless"] = (engines["default"], "lossless", None)
    if "4-bit" in engines:
        found["river, tau 0.5"] = (engines["4-bit"], "river", RiverOptions(tau=0.5))
        found["river, always"] = (engines["4-bit"], "river", RiverOptions(gate="always"))
        found["lossless, 4-bit"] = (engines["4-bit"], "lossless", None)
    if DRY:
        return dict(list(found.items())[:4])
    return found


def _ids(engine: Engine, prompt: Prompt) -> list[int]:
    try:
        session = engine.session()
    except ChatTemplateError:
        session = engine.session(use_template=False)
    words = session.prompt_text([{"role": "user", "content": prompt.text}])
    ids = engine.tokenizer.encode(words, add_special_tokens=session.template is None)
    return ids[-(CTX_SIZE - NEW_TOKENS) :]


def _say(contender: Contender, prompt: Prompt) -> Output:
    engine, mode, river = contender
    common: Results = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "seed": SEED}
    params = SamplingParams(temperature=1.0 if prompt.sampled else 0.0, **common)
    return engine.generate(_ids(engine, prompt), params, mode=mode, river=river)


def _side_by_side(contenders: dict[str, Contender], prompt: Prompt) -> Results:
    said = {name: _say(contender, prompt) for name, contender in contenders.items()}
    exact = said["exact"]
    found: Results = {"kind": prompt.kind, "tokens_per_s": {}, "equal": {}, "first_difference": {}, "drafts": {}}
    for name, output in said.items():
        found["tokens_per_s"][name] = output.stats.decode_tokens_per_s
        if name.startswith("lossless"):
            found["equal"][name] = output.token_ids == exact.token_ids and output.logprobs == exact.logprobs
        pairs = zip(output.token_ids, exact.token_ids, strict=False)
        found["first_difference"][name] = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if output.stats.drafts is not None:
            drafts = output.stats.drafts.as_dict()
            found["drafts"][name] = {key: drafts[key] for key in ("rounds", "drafted", "accepted", "agreement")}
        if output.stats.mean_exit_depth is not None:
            found.setdefault("mean_exit_depth", {})[name] = output.stats.mean_exit_depth
    found["ttft_s"] = {name: output.stats.ttft_s for name, output in said.items()}
    return found


def _summary(part: Part, names: list[str]) -> None:
    """Medians over the prompts of a kind."""
    prompts = [each for each in part.results.values() if isinstance(each, dict) and "tokens_per_s" in each]
    if not prompts:
        return
    print(f"\nx exact, median over prompts\n| kind | prompts | {' | '.join(names)} |")
    print("|---" * (len(names) + 2) + "|")
    table: Results = {}
    kinds = [*dict.fromkeys(each["kind"] for each in prompts), "all"]
    for kind in kinds:
        of_kind = [each["tokens_per_s"] for each in prompts if kind in (each["kind"], "all")]
        ratios = {name: statistics.median(each[name] / max(each["exact"], 1e-9) for each in of_kind) for name in names}
        rates = {name: statistics.median(each[name] for each in of_kind) for name in names}
        table[kind] = {"prompts": len(of_kind), "x exact": ratios, "tokens_per_s": rates}
        print(f"| {kind} | {len(of_kind)} | {' | '.join(f'{ratio:.2f}' for ratio in ratios.values())} |", flush=True)
    equal = [value for each in prompts for value in each["equal"].values()]
    print(f"\nlossless equals exact, tokens and log-probabilities: {sum(equal)} of {len(equal)} texts", flush=True)
    part.results["summary"] = {"kinds": table, "equal": sum(equal), "texts": len(equal)}
    part.save()


def convert_parts(parts: list[Path], work: Path, part: Part, _: Setting) -> None:
    """A model folder from a GGUF that came in ``parts``."""
    folder = work / "model"

    def prepare() -> str:
        convert(join(parts, work / "model.gguf"), folder)
        return str(folder)

    print(f"converted: {part.attempt('folder', prepare)}", flush=True)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
