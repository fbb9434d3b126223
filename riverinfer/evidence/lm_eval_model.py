"""riverinfer as a model of lm-evaluation-harness: ``--model riverinfer --model_args pretrained=DIR,mode=river``.

lm-eval after 0.4.13 finds it by the entry point group "lm_eval.models"; with older ones import this module before
``simple_evaluate``, or run ``python -m riverinfer.evidence.lm_eval_run`` in place of ``lm_eval``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  (lm-eval fills its list of models only while that is empty: before ours is in it)
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from riverinfer.chat_template import choose_template, load_templates
from riverinfer.engine import Engine
from riverinfer.engine_loading import DEFAULT_CTX_SIZE
from riverinfer.errors import InvalidRequestError
from riverinfer.evidence.scoring import Scorer
from riverinfer.modes import check_mode
from riverinfer.river import UNREAD, RiverOptions
from riverinfer.river_loading import RiverRequest
from riverinfer.sampling import SamplingParams

SCORINGS = ("prefill", "decode")
DEFAULT_MAX_GEN_TOKS = 256  # as lm-eval's own back ends
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@register_model("riverinfer")
class RiverinferLM(TemplateLM):
    """A model folder behind lm-eval's interface, one request at a time.

    pretrained or model_dir: the folder. mode: "lossless", "exact" or "river", of ``generate_until`` and of scoring.
    tau, gate, min_depth, max_depth, repair: river mode, see ``RiverOptions``; tau "auto" as for ``Engine.load``. depth:
    every token leaves after so many backbone layers, in place of all of them but repair, which is of answers and not of
    scoring. river_head: not in exact mode. river_bits, river_group, river_method, dtype, device, ctx_size, threads: as
    for ``Engine.load``.
    scoring: "prefill" takes log-likelihoods from batched backbone passes, whatever the mode; "decode" from decode
    steps, which in river mode go through the gate and in the others through the backbone, as what lossless mode says
    is what exact mode says. Default: "decode" in river mode, else "prefill". A context is exact but for its last token.
    device "cuda:0", which lm-eval's command gives unless told otherwise, is the CPU on a machine without CUDA.
    batch_size, max_batch_size: lm-eval's, without effect.

    Raises InvalidRequestError for arguments that do not go together, and what ``Engine.load`` raises.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        model_dir: str | Path | None = None,
        mode: str = "lossless",
        scoring: str | None = None,
        tau: float | str | None = None,
        gate: str | None = None,
        depth: int | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        repair: int | None = None,
        river_bits: int | None = None,
        river_group: int | None = None,
        river_method: str = "hqq",
        river_head: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        ctx_size: int = DEFAULT_CTX_SIZE,
        threads: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (model_dir is None):
            raise InvalidRequestError("name one model folder", field="pretrained", remedy="give pretrained=DIR")
        scoring = scoring or ("decode" if mode == "river" else "prefill")
        if scoring not in SCORINGS:
            raise InvalidRequestError(f"is {scoring!r}", field="scoring", remedy=f"use {', '.join(SCORINGS)}")
        check_mode(mode)
        options = _river_options(mode, tau, gate, depth, min_depth, max_depth, repair)
        if river_head is not None and mode == "exact":
            raise InvalidRequestError("has no effect in exact mode", field="river_head", remedy="add mode=river")
        self.engine = Engine.load(
            str(pretrained or model_dir),
            mode=mode,
            dtype=dtype,
            device=_device(device),
            ctx_size=ctx_size,
            max_sequences=1,
            threads=threads,
            river_bits=river_bits,
            river_group=river_group,
            river_method=river_method,
            river_head=RiverRequest.head if river_head is None else river_head,
            **options,
        )
        # Exact mode where tau is "auto" and none is certified.
        river = self.engine.choose_mode(None, None)[1] if self.engine.mode == "river" else None
        self.scorer = Scorer(
            self.engine, decode=scoring == "decode", make_gate=lambda: None if river is None else river.make_gate()
        )
        self.scoring = scoring

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.engine.tokenizer.eos_token_id
        return self.engine.generation_config.eos_token_ids[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: BOS, without one EOS."""
        bos = self.engine.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Positions of context, question and answer together."""
        return self.engine.ctx_size

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where a task says nothing."""
        return DEFAULT_MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and template in lm-eval's caches."""
        return str(self.engine.model_dir.resolve()).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores beside its results."""
        steps = self.scorer.depths
        return {
            "model_dtype": str(self.engine.model.dtype).removeprefix("torch."),
            "river": None if self.engine.river_settings is None else str(self.engine.river_settings),
            "mode": self.engine.mode,
            "scoring": self.scoring,
            "mean_depth_scored": sum(d * n for d, n in steps.items()) / steps.total() if steps else None,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; by default with BOS where the tokenizer puts one, unless the text brings its own."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.engine.tokenizer.token_text(self.prefix_token_id))
        return self.engine.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's template, or of the one named; None for False."""
        if chat_template is False or chat_template is None:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        return choose_template(load_templates(self.engine.model_dir), name=name)[1]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it; without a generation prompt its end is left open."""
        template = self.engine.session().template
        assert template is not None
        return template.render(
            chat_history, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        # In the order of their tokens neighbours share the longest beginnings.
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        found: dict[int, tuple[float, bool]] = {}
        scores = self.scorer.scores((requests[i][1], requests[i][2]) for i in order)
        bar = tqdm(scores, total=len(order), desc="loglikelihood", disable=disable_tqdm)
        for i, score in zip(order, bar, strict=True):
            found[i] = (score.logprob, score.greedy)
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts after the prefix token, each token once, with as much context as fits."""
        totals = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, the model's end of text, or the task's number of tokens."""
        texts = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, kwargs = request.args
            params = sampling_params(kwargs)
            assert params.max_tokens is not None
            room = self.max_length - params.max_tokens
            if room < 1:
                raise InvalidRequestError(
                    f"{params.max_tokens} new tokens leave no room in a context of {self.max_length}",
                    field="max_gen_toks",
                    remedy="lower it or give a larger ctx_size",
                )
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            texts.append(self.engine.generate(ids, params).text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def sampling_params(kwargs: Mapping[str, Any]) -> SamplingParams:
    """A task's ``generation_kwargs`` as riverinfer has them; greedy without ``do_sample`` and temperature.

    Raises InvalidRequestError for a value out of range or an argument riverinfer has not.
    """
    given = dict(kwargs)
    until = given.pop("until", None) or []
    lengths = [value for name in _LENGTHS if (value := given.pop(name, None)) is not None]
    do_sample = given.pop("do_sample", None)
    values = {name: value for name in _SAMPLING if (value := given.pop(name, None)) is not None}
    if given:
        raise InvalidRequestError(
            f"riverinfer has no {', '.join(sorted(given))}", field="generation_kwargs", remedy="leave them out"
        )
    if do_sample is False:
        values["temperature"] = 0.0
    elif do_sample and "temperature" not in values:
        values["temperature"] = 1.0
    stops = [until] if isinstance(until, str) else until
    return SamplingParams(
        **values,
        stop=tuple(stop for stop in stops if stop),
        max_tokens=int(lengths[0]) if lengths else DEFAULT_MAX_GEN_TOKS,
    )


def _device(given: str | None) -> str:
    return "auto" if given is None or (given == "cuda:0" and not torch.cuda.is_available()) else given


def _river_options(
    mode: str,
    tau: float | str | None,
    gate: str | None,
    depth: int | None,
    min_depth: int | None,
    max_depth: int | None,
    repair: int | None,
) -> dict[str, Any]:
    """What ``Engine.load`` is given. Raises InvalidRequestError for what would have no effect."""
    of_gate = {"tau": tau, "gate": gate, "min_depth": min_depth, "max_depth": max_depth}
    given = {name: value for name, value in {**of_gate, "depth": depth, "repair": repair}.items() if value is not None}
    for name in given:
        if mode != "river":
            raise InvalidRequestError(f"has no effect in {mode} mode", field=name, remedy="add mode=river")
        if depth is not None and name in of_gate:
            raise InvalidRequestError("does not go with depth", field=name, remedy="give one of them")
    for name in UNREAD.get(gate or RiverOptions.gate, ()):
        if name in given:
            raise InvalidRequestError(f'has no effect with gate "{gate}"', field=name, remedy="give one of them")
    if given.pop("depth", None) is not None:
        given |= {"gate": "fixed", "min_depth": depth} if depth else {"gate": "always"}
    return given
