"""The engine: a loaded model, its KV arena, and the calls that turn text into text."""

from __future__ import annotations

import operator
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from riverinfer.batch import check_batch, generate_batch
from riverinfer.checkpoint import Checkpoint
from riverinfer.draft_policy import Beliefs, Costs
from riverinfer.errors import ContextLengthError, EngineMemoryError, InvalidRequestError, RiverinferWarning
from riverinfer.evidence.certificate import certified_tau, check_auto, text_conditions
from riverinfer.gates import FixedDepth, Gate, undefined_steps
from riverinfer.generation import Generation, warn_of_undefined
from riverinfer.generation_config import GenerationConfig, load_generation_config
from riverinfer.kernels.linear import triton_runs
from riverinfer.kv_arena import KVArena
from riverinfer.loader import load_model, resolve_device, resolve_dtype
from riverinfer.lossless import LosslessRounds
from riverinfer.memory import explain_out_of_memory, gib, require_memory
from riverinfer.memory_report import MemoryReport, memory_report
from riverinfer.model import Model
from riverinfer.outputs import Output, Step
from riverinfer.progress import Progress
from riverinfer.river import RiverOptions
from riverinfer.river_choice import MEASURED_POSITIONS
from riverinfer.river_loading import RiverRequest, load_river, river_bytes
from riverinfer.sampling import SamplingParams, check_integer
from riverinfer.sequence import SlotPool, TokenSequence, closed_error, extend_batch
from riverinfer.tokenizer import Tokenizer
from riverinfer.trace import Trace
from riverinfer.weights_convert.river_artifact import RiverSettings, linear_shapes

if TYPE_CHECKING:
    from riverinfer.device_decode import DeviceDecoder
    from riverinfer.device_rounds import RoundLaunches
    from riverinfer.session import ChatSession

MODES = ("lossless", "exact", "river")
DEFAULT_CTX_SIZE = 4096
MAX_THREADS = 1024


class Engine:
    """One loaded model. Safe to use from several threads: model steps queue, each caller keeps its own state.

    ``Engine.load`` makes one; use it as a context manager or call ``close``.
    """

    def __init__(
        self,
        model_dir: Path,
        model: Model,
        tokenizer: Tokenizer,
        generation_config: GenerationConfig,
        arena: KVArena,
        mode: str,
        river_options: RiverOptions | None = None,
    ) -> None:
        self.model_dir = model_dir
        self.model = model
        self.config = model.config
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.mode = mode
        self.river_options = river_options or RiverOptions()
        self.river_settings: RiverSettings | None = None
        self.river_conditions: dict[str, Any] = {}  # of texts in river mode, see ``text_conditions``
        self.costs, self.beliefs = Costs(), Beliefs()  # of lossless mode's drafts, over all requests
        self.ctx_size, self.max_sequences = arena.ctx_size, arena.slots
        self.slots = SlotPool(arena)
        self._arena: KVArena | None = arena
        self._step_lock = threading.Lock()
        self.decoder: DeviceDecoder | None = None  # on a GPU
        self.rounds: RoundLaunches | None = None

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        ctx_size: int = DEFAULT_CTX_SIZE,
        max_sequences: int = 4,
        mode: str = "lossless",
        threads: int | None = None,
        check: bool = False,
        progress: Progress | None = None,
        tau: float | Sequence[float] | str = 0.5,
        min_depth: int = 1,
        gate: str = "similarity",
        max_depth: int | None = None,
        prefill: str = "exact",
        prefill_depth: int | None = None,
        backbone_layers: int | None = None,
        repair: int = 0,
        river_bits: int | None = None,
        river_group: int | None = None,
        river_method: str = "hqq",
        river_head: str = "quantized",
        draft: str = "auto",
        graph: bool = True,
    ) -> Engine:
        """Load a model folder.

        device: "auto", "cpu", "cuda" or "cuda:N". dtype: "auto", "float32", "float16" or "bfloat16".
        ctx_size: positions of one sequence, prompt and answer together; 0 takes the model's own limit, and more than
            that limit is capped to it (``engine.ctx_size`` tells). max_sequences: how many can be live at once; the
            KV arena is allocated for all of them here.
        mode: "exact", the checkpoint's own computation, a token a step. "lossless", the same tokens sooner: the river
            drafts, the backbone verifies. "river": tokens leave the backbone early and finish in the river, which is a
            quantized copy of its layers, made on first use and kept in the cache folder. It is small and fast where a
            packed kernel reads it: in bfloat16. Elsewhere it is dequantized.
        tau, min_depth, max_depth, gate, prefill, prefill_depth, repair: river mode, see ``RiverOptions``. tau "auto" is
            the one that ``riverinfer calibrate`` certified for this river and these options; where it could certify
            none, exact mode, with a warning.
        backbone_layers: in river mode, load only so many layers of the backbone; every token leaves there at the
            latest, prompts too, and other modes are refused. None loads all.
        river_bits, river_group, river_method: the copy, see ``RiverSettings``; "awq" takes longer to make, and loses
            less. None: 4 bits in groups of 64; in lossless mode 4 or 8, whichever is measured to draft faster.
        river_head: "quantized" gives tokens that left the backbone logits from a 4-bit copy of the head, the highest
            64 of them recomputed exactly, where a packed kernel reads it; "exact" the checkpoint's head.
        draft: in lossless mode, "lookup" only repeats what stands in the text, which needs no river; "auto" drafts in
            a river too where one is cheaper than the backbone, "river" everywhere. Without the memory, exact mode.
        graph: on a GPU, in bfloat16, decode with fused kernels, a CUDA graph a step; False walks layer by layer.
        threads: CPU threads for torch, process-wide.
        check: refuse weights that are NaN or infinite. progress: called while weights are read.

        Raises ModelNotFoundError, ConfigError, UnsupportedModelError, WeightsError, TokenizerError,
        EngineMemoryError, InvalidRequestError.
        """
        if mode not in MODES:
            raise InvalidRequestError(f"unknown mode {mode!r}", field="mode", remedy=f"use {', '.join(MODES)}")
        auto = isinstance(tau, str)
        if isinstance(tau, str):
            check_auto(tau, mode)
            tau = RiverOptions.tau
        options = RiverOptions(tau, min_depth, max_depth, gate, prefill, prefill_depth, repair=repair)
        request = RiverRequest(river_bits, river_group, river_method, river_head, draft)
        check_integer("ctx_size", ctx_size, 0)
        check_integer("max_sequences", max_sequences, 1)
        if threads is not None:
            check_integer("threads", threads, 1, MAX_THREADS)
            torch.set_num_threads(threads)
        checkpoint = Checkpoint.open(model_dir)
        config = checkpoint.config
        tokenizer = Tokenizer.load(checkpoint.model_dir, vocab_size=config.vocab_size)
        generation_config = load_generation_config(checkpoint.model_dir, config)
        place = resolve_device(device)
        kind = resolve_dtype(dtype, checkpoint.stored_dtype, place)
        held = config.num_layers
        if backbone_layers is not None:
            if mode != "river":
                raise InvalidRequestError("needs river mode", field="backbone_layers", remedy='give mode="river" too')
            check_integer("backbone_layers", backbone_layers, 0, config.num_layers)
            held = backbone_layers
        limited = options.limited(config.num_layers, held) if mode == "river" else options
        candidates = request.candidates(config, mode, kind, place)
        fused = graph and kind == torch.bfloat16 and triton_runs(place.type)
        conditions: dict[str, Any] = {}
        if mode == "river":
            conditions = text_conditions(limited, candidates[0], head=river_head, dtype=kind, device=place, fused=fused)
        if auto:
            certified = certified_tau(checkpoint, candidates[0], conditions)
            if certified is None:
                mode, candidates = "exact", []
            else:
                options = replace(options, tau=certified)
        absent = (config.num_layers - held) * sum(rows * columns for rows, columns in linear_shapes(config).values())
        positions = effective_ctx_size(ctx_size, config.context_limit)
        if ctx_size > positions and ctx_size != DEFAULT_CTX_SIZE:
            warnings.warn(
                f"{model_dir}: the context is {positions} tokens, the model's limit, not {ctx_size}",
                RiverinferWarning,
                stacklevel=2,
            )
        fits = partial(
            require_memory,
            place,
            slots=max_sequences,
            ctx_size=positions,
            bytes_per_token=config.kv_bytes_per_token(kind.itemsize),
        )
        backbone = (checkpoint.parameters - absent) * kind.itemsize
        river = max((river_bytes(config, each, river_head, kind, place) for each in candidates), default=0)
        try:
            fits(weights=backbone + river)
        except EngineMemoryError:
            if mode != "lossless" or not river:
                raise
            fits(weights=backbone)
            warnings.warn(
                f"{model_dir}: backbone and river ({gib(backbone)} + {gib(river)}) do not both fit into memory;"
                " running exact mode (river mode with --backbone-layers needs less)",
                RiverinferWarning,
                stacklevel=2,
            )
            mode, candidates = "exact", []
        cache = max_sequences * positions * config.kv_bytes_per_token(kind.itemsize)
        with explain_out_of_memory(place, weights=backbone + river, cache=cache):
            arena = KVArena(config, slots=max_sequences, ctx_size=positions, dtype=kind, device=place)
            model = load_model(
                checkpoint, device=place, dtype=kind, backbone_layers=held, check=check, progress=progress
            )
            # Kernels read whole tables, also those of a measurement.
            model.rope.reserve(max(positions, MEASURED_POSITIONS) if fused else positions)
            if fused:
                from riverinfer.device_setup import decode_on_device, tune_kernels

                tune_kernels(config, place, progress)
            chosen = None
            if candidates:
                needed = mode == "river" or request.named
                chosen = load_river(
                    model,
                    tokenizer,
                    checkpoint,
                    candidates,
                    head=river_head,
                    progress=progress,
                    optional=not needed,
                    fused=fused,
                )
            model.script()
            engine = cls(checkpoint.model_dir, model, tokenizer, generation_config, arena, mode, options)
            engine.river_settings, engine.river_conditions = chosen, conditions
            if fused:
                decode_on_device(engine, arena, progress)
            return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back. Waits for a running step; later calls raise EngineClosedError."""
        with self._step_lock:
            if self.model.device_walk is not None:
                self.model.device_walk.close()
            self._arena = self.decoder = self.rounds = self.model.device_walk = None
            self.slots.close()
            self.model.layers.clear()
            self.model.river.clear()
            self.model.backbone_script = self.model.river_script = None
            self.model.head = self.model.embed = self.model.river_head = None  # type: ignore[assignment]

    @property
    def closed(self) -> bool:
        return self._arena is None

    def default_params(self, **changes: Any) -> SamplingParams:
        """The model's recommended sampling (``generation_config.json``), with ``changes`` on top."""
        return replace(self.generation_config.params(), **changes)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 [T, vocab]: row i is the prediction after ``token_ids[: i + 1]``."""
        self.choose_mode("exact", None)
        ids = self.check_ids(token_ids)
        sequence = TokenSequence(self.model, self.ctx_size)
        try:
            self.slots.acquire(sequence)
            return self.extend(sequence, ids, all_logits=True)
        finally:
            self.slots.release(sequence, keep=False)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        mode: str | None = None,
        river: RiverOptions | None = None,
        similarities: bool = False,
    ) -> Output:
        """Continue ``prompt`` (text, or token ids) to the end.

        Without ``params``, the model's recommended ones; without ``mode`` and ``river``, those of ``load``.
        ``similarities``: in river mode, record those of every token and layer (``Step.similarities``).
        Raises InvalidRequestError, ContextLengthError (its ``output`` holds what had been generated),
        NoFreeSlotError, EngineClosedError.
        """
        output = Output()
        for _ in self.stream(prompt, params, mode=mode, river=river, similarities=similarities, output=output):
            pass
        return output

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        mode: str | None = None,
        river: RiverOptions | None = None,
        similarities: bool = False,
        output: Output | None = None,
    ) -> Iterator[Step]:
        """Like ``generate``, one step a token. Closing the iterator, or dropping it, frees its slot.

        Bad input raises here, not at the first step. ``output`` is filled along the way.
        """
        began = time.perf_counter()
        ids = self.encode_prompt(prompt)
        params = (params or self.default_params()).with_seed()
        how = self.choose_mode(mode, river, similarities)
        output = output if output is not None else Output()
        return self._stream(ids, params, how, similarities, output, began)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        mode: str | None = None,
        river: RiverOptions | None = None,
    ) -> list[Output]:
        """Continue several prompts side by side, at most ``max_sequences``: an output each, in their order.

        A step reads the matrices once for all sequences. In river mode each exits for itself, so that a text does not
        depend on its neighbours beyond the order of sums, or all together (``RiverOptions.scope``).
        Raises what ``generate`` raises; ContextLengthError, when a context is full, has
        all ``outputs``.
        """
        several = params if isinstance(params, Sequence) else [params or self.default_params()] * len(prompts)
        check_batch(prompts, several, self.max_sequences)
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        mode, options = self.choose_mode(mode, river)
        return generate_batch(self, encoded, [each.with_seed() for each in several], mode, options)

    def choose_mode(
        self, mode: str | None, options: RiverOptions | None, similarities: bool = False
    ) -> tuple[str, RiverOptions | None]:
        """The mode of a call and its river options: None in exact mode, and where there is no river to draft in.

        Raises InvalidRequestError for what does not go together, or was not loaded.
        """
        mode = mode or self.mode
        if mode not in MODES:
            raise InvalidRequestError(f"unknown mode {mode!r}", field="mode", remedy=f"use {', '.join(MODES)}")
        if mode != "river" and self.model.offloaded:
            raise InvalidRequestError(
                f"only {self.model.held_layers} of {self.config.num_layers} backbone layers are loaded",
                field="mode",
                remedy='use mode="river", or load without backbone_layers (--backbone-layers)',
            )
        for field, wanted in (("similarities", similarities), ("river", options is not None)):
            if wanted and mode == "exact":
                raise InvalidRequestError("has no effect in exact mode", field=field, remedy='give mode="river" too')
        if not self.model.river:
            if mode == "river" or options is not None:
                asked, remedy = ("mode", 'mode="river"') if mode == "river" else ("river", 'draft="river"')
                raise InvalidRequestError("no river is loaded", field=asked, remedy=f"load the engine with {remedy}")
            return mode, None
        if mode == "exact":
            return mode, None
        # Drafts go straight through the river: what passes the backbone first costs more than it is accepted more.
        default = self.river_options if mode == "river" else RiverOptions(gate="always")
        return mode, (options or default).limited(self.config.num_layers, self.model.held_layers)

    def _stream(
        self,
        ids: list[int],
        params: SamplingParams,
        how: tuple[str, RiverOptions | None],
        similarities: bool,
        output: Output,
        began: float,
    ) -> Iterator[Step]:
        sequence = TokenSequence(self.model, self.ctx_size)
        try:
            self.slots.acquire(sequence)
            yield from self.run(sequence, ids, params, output, began=began, how=how, similarities=similarities)
        finally:
            self.slots.release(sequence, keep=False)

    def session(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] = (),
        chat_template: str | None = None,
        template_name: str | None = None,
        use_template: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatSession:
        """A chat that keeps its KV cache between turns. The options are those of ``ChatSession``."""
        from riverinfer.session import ChatSession

        self._require_open()
        return ChatSession(
            self,
            system=system,
            messages=messages,
            chat_template=chat_template,
            template_name=template_name,
            use_template=use_template,
            template_kwargs=template_kwargs,
        )

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, checked: not empty, in the vocabulary, shorter than the context."""
        self._require_open()
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("the prompt is empty", remedy="give at least one character")
            prompt = self.tokenizer.encode(prompt)
        return self.check_ids(prompt)

    def check_ids(self, token_ids: Sequence[int]) -> list[int]:
        """The ids as a list; raises InvalidRequestError or ContextLengthError if the model cannot take them."""
        self._require_open()
        try:
            ids = [operator.index(token) for token in token_ids]
        except TypeError as exc:
            raise InvalidRequestError("token ids must be integers", remedy="give text, or a list of ids") from exc
        if not ids:
            raise InvalidRequestError("the prompt has no tokens", remedy="give at least one token")
        bad = next((token for token in ids if not 0 <= token < self.config.vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(
                f"token id {bad} is outside the vocabulary", remedy=f"give ids from 0 to {self.config.vocab_size - 1}"
            )
        if len(ids) > self.ctx_size:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, the context {self.ctx_size}",
                remedy="shorten it or load with a larger --ctx-size (ctx_size)",
            )
        return ids

    @contextmanager
    def stepping(self) -> Iterator[Engine]:
        """The engine's lock, for whoever queues steps himself. Raises EngineClosedError."""
        with self._step_lock:
            self._require_open()
            yield self

    def extend(
        self,
        sequence: TokenSequence,
        ids: Sequence[int],
        *,
        all_logits: bool = False,
        gate: Gate | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """``sequence.extend`` under the engine's lock: steps of several threads queue."""
        with self.stepping():
            self._forget_placed()
            return sequence.extend(ids, all_logits=all_logits, gate=gate, trace=trace)

    def _forget_placed(self) -> None:
        """A sequence grows by the host's hand: what rows on the device stood for may be its past."""
        if self.model.device_walk is not None:
            self.model.device_walk.owner = None

    def draft(
        self, sequence: TokenSequence, token: int, ahead: int, *, gate: Gate | None, trace: Trace | None = None
    ) -> Tensor:
        """``sequence.draft`` under the engine's lock."""
        with self._step_lock:
            self._require_open()
            return sequence.draft(token, ahead, gate=gate, trace=trace)

    def extend_batch(
        self, sequences: Sequence[TokenSequence], ids: Sequence[int], *, gates: Sequence[Gate], traces: Sequence[Trace]
    ) -> Tensor:
        """One token more for each sequence, as ``decode.decode_batch``: float32 logits [B, vocab]."""
        with self.stepping():
            self._forget_placed()
            return extend_batch(sequences, ids, gates=gates, traces=traces)

    def run(
        self,
        sequence: TokenSequence,
        ids: list[int],
        params: SamplingParams,
        output: Output,
        *,
        began: float,
        how: tuple[str, RiverOptions | None] = ("exact", None),
        similarities: bool = False,
        extra_stop_ids: Sequence[int] = (),
    ) -> Iterator[Step]:
        """Generate after ``ids`` on a sequence that has a slot, reusing what it has cached. ``how``: ``choose_mode``'s.

        Fills ``output`` before each step is yielded. Raises ContextLengthError when the context is full.
        """
        mode, river = how
        generation = self.generation(ids, params, output, began=began, extra_stop_ids=extra_stop_ids)
        gate = None if river is None else river.make_gate()
        try:
            if mode == "lossless":
                logits = self.read_prompt(sequence, generation, None)
                yield from self._rounds(sequence, generation, gate, similarities).run(logits)
            else:
                yield from self._one_by_one(sequence, generation, river, gate, similarities)
        finally:
            output.stats.undefined_similarities += undefined_steps(gate)
            warn_of_undefined(output.stats.undefined_similarities)

    def _rounds(
        self, sequence: TokenSequence, generation: Generation, gate: Gate | None, similarities: bool
    ) -> LosslessRounds:
        kind: type[LosslessRounds] = LosslessRounds
        straight = gate is None or (isinstance(gate, FixedDepth) and gate.depth == 0)
        if self.rounds is not None and straight and generation.params.alike_every_step and not similarities:
            from riverinfer.device_rounds import DeviceRounds as kind
        return kind(self, sequence, generation, gate=gate, similarities=similarities)

    def _one_by_one(
        self,
        sequence: TokenSequence,
        generation: Generation,
        river: RiverOptions | None,
        gate: Gate | None,
        similarities: bool,
    ) -> Iterator[Step]:
        """Exact and river mode: every step a token."""
        trace = None if river is None else Trace(similarities=[] if similarities else None)
        logits = self.read_prompt(sequence, generation, river, trace)
        alone = not similarities and not (river and river.repair) and generation.params.alike_every_step
        if self.decoder is not None and alone:
            yield generation.step(generation.choose(logits[0]), trace)
            yield from self.decoder.single_steps(self, sequence, generation, gate, trace)
            return
        while True:
            yield generation.step(generation.choose(logits[0]), trace)
            if generation.finished:
                return
            generation.require_room()
            generation.resume()
            if river is not None and river.repair and len(sequence.tokens) - sequence.exact >= river.repair:
                self._repair(sequence, generation)
            logits = self.extend(sequence, generation.context[-1:], gate=gate, trace=trace)

    def _repair(self, sequence: TokenSequence, generation: Generation) -> None:
        stats, began = generation.output.stats, time.perf_counter()
        with self._step_lock:
            self._require_open()
            rewritten, others = sequence.repair(generation.context[-1])
        stats.repaired += rewritten
        stats.repair_disagreements += others
        stats.repair_s += time.perf_counter() - began

    def generation(
        self,
        ids: list[int],
        params: SamplingParams,
        output: Output,
        *,
        began: float,
        extra_stop_ids: Sequence[int] = (),
    ) -> Generation:
        """A request that continues ``ids`` and stops where ``params`` and the model say."""
        stop_ids = {*params.stop_token_ids}
        if not params.ignore_eos:
            stop_ids |= {*self.generation_config.eos_token_ids, *extra_stop_ids}
        return Generation(
            ids,
            params,
            output,
            tokenizer=self.tokenizer,
            stop_ids=stop_ids,
            ctx_size=self.ctx_size,
            began=began,
        )

    def read_prompt(
        self, sequence: TokenSequence, generation: Generation, river: RiverOptions | None, trace: Trace | None = None
    ) -> Tensor:
        """Bring a sequence to the end of the request's prompt: float32 logits [1, vocab] for its first token."""
        ids, stats = generation.context, generation.output.stats
        # With repair all before the answer is exact: what an earlier turn left unrepaired is computed again here.
        stats.cached_tokens = sequence.keep_common(ids, exact=river is None or river.repair > 0)
        started = time.perf_counter()
        gate = None if river is None else river.make_prefill_gate()
        logits = self.extend(sequence, ids[stats.cached_tokens :], gate=gate, trace=trace)
        stats.prefill_s = time.perf_counter() - started
        stats.undefined_similarities += undefined_steps(gate)
        return logits

    def memory(self) -> MemoryReport:
        """What the engine holds, part by part, next to what is measured. Raises EngineClosedError."""
        with self._step_lock:
            if self._arena is None:
                raise closed_error()
            workspace = 0
            if self.decoder is not None and self.rounds is not None:
                workspace = self.decoder.nbytes + self.rounds.nbytes
            return memory_report(self.model, self._arena, workspace)

    def _require_open(self) -> None:
        if self._arena is None:
            raise closed_error()


def effective_ctx_size(requested: int, limit: int) -> int:
    """0 means the model's own limit; more than the limit is capped to it."""
    return limit if requested == 0 else min(requested, limit)
