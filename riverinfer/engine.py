"""The engine: a loaded model, its KV arena, and the calls that turn text into text."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from riverinfer.batch import check_batch, generate_batch
from riverinfer.draft_policy import Beliefs, Costs
from riverinfer.engine_loading import DEFAULT_CTX_SIZE, LoadRequest, load_parts, plan_load
from riverinfer.errors import ContextLengthError, InvalidRequestError
from riverinfer.evidence.certificate import check_auto
from riverinfer.gates import Gate, undefined_steps
from riverinfer.generation import Generation
from riverinfer.generation_config import GenerationConfig
from riverinfer.kv_arena import KVArena
from riverinfer.memory_report import MemoryReport, memory_report
from riverinfer.model import Model
from riverinfer.modes import check_mode, choose_mode
from riverinfer.outputs import Output, Step
from riverinfer.progress import Progress
from riverinfer.request_steps import request_steps
from riverinfer.river import RiverOptions
from riverinfer.river_loading import RiverRequest
from riverinfer.sampling import SamplingParams
from riverinfer.sequence import SlotPool, TokenSequence, closed_error, extend_batch
from riverinfer.tokenizer import Tokenizer
from riverinfer.trace import Trace
from riverinfer.weights_convert.river_artifact import RiverSettings

if TYPE_CHECKING:
    from riverinfer.device_decode import DeviceDecoder
    from riverinfer.device_rounds import RoundLaunches
    from riverinfer.session import ChatSession


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
        check_mode(mode)
        auto = isinstance(tau, str)
        if isinstance(tau, str):
            check_auto(tau, mode)
            tau = RiverOptions.tau
        request = LoadRequest(
            device=device,
            dtype=dtype,
            ctx_size=ctx_size,
            max_sequences=max_sequences,
            mode=mode,
            threads=threads,
            auto=auto,
            options=RiverOptions(tau, min_depth, max_depth, gate, prefill, prefill_depth, repair=repair),
            backbone_layers=backbone_layers,
            river=RiverRequest(river_bits, river_group, river_method, river_head, draft),
            graph=graph,
        )
        plan = plan_load(model_dir, request)
        with plan.explain_out_of_memory():
            parts = load_parts(plan, check=check, progress=progress)
            model, arena, folder = parts.model, parts.arena, plan.checkpoint.model_dir
            engine = cls(folder, model, plan.tokenizer, plan.generation_config, arena, plan.mode, plan.options)
            engine.river_settings, engine.river_conditions = parts.river_settings, plan.conditions
            if plan.fused:
                from riverinfer.device_setup import decode_on_device

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
        return choose_mode(self, mode, options, similarities)

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
        generation = self.generation(ids, params, output, began=began, extra_stop_ids=extra_stop_ids)
        yield from request_steps(self, sequence, generation, how, similarities)

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
