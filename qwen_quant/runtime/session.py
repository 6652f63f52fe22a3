"""One conversation with one model file: prefill, step, generate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_quant import _core
from qwen_quant.errors import UsageError
from qwen_quant.runtime.gguf import GGUFFile
from qwen_quant.runtime.loading import Loading
from qwen_quant.runtime.lookup import LookupSteps
from qwen_quant.runtime.sampling_params import SamplingParams
from qwen_quant.runtime.token_ids import as_token_ids, plain_token_ids

if TYPE_CHECKING:  # numpy takes a tenth of a second, which the most likely token does without
    import numpy as np
    import numpy.typing as npt

    from qwen_quant.runtime.onnx import OnnxEngine, OnnxFolder
    from qwen_quant.tokenizer import Tokenizer

    Logits = npt.NDArray[np.float32]


@dataclass
class Timings:
    """What the last `generate` did: counts, and seconds for prompt processing and for text generation.

    The first generated token falls out of the prompt's logits, so `tg_tokens` counts the steps after it.
    `drafted` counts the tokens that prompt lookup guessed, `accepted` those of them that were generated.
    """

    prompt_tokens: int = 0
    pp_s: float = 0.0
    tg_tokens: int = 0
    tg_s: float = 0.0
    drafted: int = 0
    accepted: int = 0

    @property
    def pp_tok_s(self) -> float:
        return self.prompt_tokens / self.pp_s if self.pp_s > 0 else 0.0

    @property
    def tg_tok_s(self) -> float:
        return self.tg_tokens / self.tg_s if self.tg_s > 0 else 0.0


class Session:
    """A model that runs, and the context it has read so far.

    `draft_max` is how many tokens prompt lookup may guess at a time; 0 generates them one by one. `after_prompt` is
    called when `generate` has read its prompt.
    """

    def __init__(self, file: GGUFFile | OnnxFolder, engine: _core.Engine | OnnxEngine | Loading) -> None:
        self.file = file
        self._engine = engine
        self.draft_max = 0
        self.after_prompt: Callable[[], None] | None = None
        self.timings = Timings()
        self._tokens: list[int] = []

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        n_threads: int | None = None,
        isa: str = "auto",
        n_ctx: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
    ) -> Session:
        """Opens a GGUF file or an ONNX folder.

        `n_threads` None takes as many CPUs as a short trial finds fastest; `isa` is auto or one of
        `_core.cpu_isas()`; `n_ctx` overrides the context length in the file; the cache of keys and values is f16,
        int8, int4 or auto (as the file's calibration chose). Raises FormatError for a file that cannot be run
        exactly, QwenQuantError for options that this machine cannot serve.
        """
        from qwen_quant.runtime.onnx import OnnxEngine, OnnxFolder, is_onnx_folder

        if is_onnx_folder(Path(path)):
            if (cache_type_k, cache_type_v) != ("f16", "f16"):
                raise UsageError(
                    f"{path}: an ONNX folder's cache is as its graph has it; drop the cache types"
                )
            folder = OnnxFolder(path)
            return cls(folder, OnnxEngine(folder, n_threads or 0, n_ctx or 0))
        file = GGUFFile(path)
        engine = _core.Engine(file.core, n_threads or 0, isa, n_ctx or 0, cache_type_k, cache_type_v)
        return cls(file, engine)

    @classmethod
    def of(cls, loading: Loading) -> Session:
        """The session of a GGUF file whose weights may still be loading. `engine` waits for them, and so does what
        needs it: errors come there."""
        return cls(GGUFFile(loading.core), loading)

    @property
    def engine(self) -> _core.Engine | OnnxEngine:
        """What computes."""
        if isinstance(self._engine, Loading):
            self._engine = self._engine.engine()
        return self._engine

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's keys and values."""
        return self.file.metadata

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding, V."""
        return self.engine.n_vocab

    @property
    def n_ctx(self) -> int:
        """Tokens that fit into the context."""
        return self.engine.n_ctx

    @property
    def n_past(self) -> int:
        """Tokens in the context now."""
        return self.engine.n_past

    @property
    def tokens(self) -> Sequence[int]:
        """The ids of the context, n_past of them."""
        return self._tokens

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored in the file."""
        return self.file.load_tokenizer()

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a turn."""
        return self.file.end_ids()

    def reset(self) -> None:
        """Forgets the context and frees its cache."""
        self.engine.reset()
        self._tokens.clear()

    def truncate(self, n_tokens: int) -> None:
        """Keeps the first `n_tokens` of the context. Raises QwenQuantError when it holds fewer.

        Far back in a quantized cache the tokens before the new end are left in few bits, where they would be read in
        FP16; `keep_shared` avoids that.
        """
        self.engine.truncate(n_tokens)
        del self._tokens[n_tokens:]

    def native(self, wanted: str) -> _core.Engine:
        """The C++ engine, which `wanted` needs. Raises UsageError where another one runs the file."""
        if isinstance(self.engine, _core.Engine):
            return self.engine
        raise UsageError(f"{self.file.path}: {wanted} needs a GGUF file; export the model as one")

    def restore(self, tokens: Sequence[int], layers: Iterable[npt.NDArray[np.uint8]]) -> None:
        """Makes `tokens` the context, with keys and values as `Engine.read_kv` gave them, layer after layer.

        Raises QwenQuantError when they have other sizes; then, as after any error, the context is empty.
        """
        self.reset()
        self.native("a stored context").restore_kv(len(tokens), layers)
        self._tokens[:] = tokens

    def keep_shared(self, tokens: Sequence[int]) -> Sequence[int]:
        """Keeps what the context and `tokens` begin with alike; returns the rest, which is to be prefilled.

        The rest has at least one token, because the logits that follow it are not kept. A quantized cache may go back
        exactly to a little less only, and then the rest has some tokens more.
        """
        limit = max(min(len(self._tokens), len(tokens) - 1), 0)
        pairs = zip(self._tokens[:limit], tokens, strict=False)
        shared = next((i for i, (old, new) in enumerate(pairs) if old != new), limit)
        kept = self.engine.exact_past(shared)
        self.truncate(kept)
        return tokens[kept:]

    def prefill(self, tokens: Sequence[int] | npt.NDArray[Any]) -> Logits:
        """Appends tokens to the context; logits [V] of the last.

        Raises QwenQuantError when there are none, an id is outside the vocabulary, or the context is full.
        Ctrl-C is seen between chunks of 256 tokens.
        """
        return self._forward(as_token_ids(tokens), n_logits=1)[0]

    def extend(self, tokens: Sequence[int] | npt.NDArray[Any]) -> Logits:
        """Appends tokens [T] to the context; logits [T, V] of what follows each. Raises as `prefill` does."""
        ids = as_token_ids(tokens)
        return self._forward(ids, n_logits=len(ids))

    def _forward(self, ids: npt.NDArray[np.int32], n_logits: int) -> Logits:
        n_past = self.engine.n_past
        try:
            return self.engine.forward(ids, n_past, n_logits)
        finally:  # an interrupted prompt has been read in part
            self._tokens[n_past:] = ids[: self.engine.n_past - n_past].tolist()

    def most_likely(self, tokens: Sequence[int]) -> int:
        """Appends tokens to the C++ engine's context; the id that most likely follows. Raises as `prefill` does."""
        engine, n_past, ids = self.native("most_likely"), self.n_past, plain_token_ids(tokens)
        try:
            return engine.most_likely(ids, n_past)
        finally:
            self._tokens[n_past:] = ids[: engine.n_past - n_past]

    def step(self, token: int) -> Logits:
        """Appends one token to the context; logits [V] of what follows it. Raises as `prefill` does."""
        return self.prefill((token,))

    def logits(self, tokens: Sequence[int] | npt.NDArray[Any], first: int = 0) -> Logits:
        """Logits [T - first, V] at the positions of `tokens` [T] from `first` on, in a fresh context.

        Raises as `prefill` does.
        """
        ids = as_token_ids(tokens)
        self.truncate(0)
        return self._forward(ids, n_logits=len(ids) - first)

    def begin_timings(self, prompt_tokens: int) -> Timings:
        """New `timings`, for an answer to so many tokens."""
        self.timings = Timings(prompt_tokens=prompt_tokens)
        return self.timings

    def generate(
        self,
        prompt_tokens: Sequence[int],
        max_tokens: int,
        sampling: SamplingParams | None = None,
        stop_ids: Collection[int] = (),
    ) -> Generator[int, None, None]:
        """Appends the prompt, then yields up to `max_tokens` tokens, ending before one of `stop_ids`.

        The repetition penalty sees the whole context. With `draft_max` several tokens may be computed at once;
        they are the same ones. Afterwards, and while it runs, `timings` tells what it took. Raises as `prefill`
        does.
        """
        # What is drafted may have to be taken back.
        draft_max = min(self.draft_max, self.native("--lookup").exact_rewind) if self.draft_max else 0
        params = sampling or SamplingParams()
        plain = not draft_max and not params.needs_logits and isinstance(self.engine, _core.Engine)
        read: Callable[[Sequence[int]], int | Logits] = self.most_likely if plain else self.prefill
        history = [*self._tokens, *prompt_tokens]
        timings = self.begin_timings(len(prompt_tokens))
        start = time.perf_counter()
        found = read(prompt_tokens)
        timings.pp_s = time.perf_counter() - start
        if self.after_prompt:
            self.after_prompt()
        steps = LookupSteps(self, draft_max) if draft_max else None
        choose: Callable[[Any], int] = int if plain else _sampler(params, history)
        try:
            for index in range(max_tokens):
                start = time.perf_counter()
                if index > 0:
                    last, limit = history[-1], max_tokens - index - 1
                    found = steps.step(last, limit) if steps else read((last,))
                token = choose(found)
                if index > 0:
                    timings.tg_s += time.perf_counter() - start
                    timings.tg_tokens += 1
                if token in stop_ids:
                    return
                history.append(token)
                yield token
        finally:
            if steps:
                steps.close()
                timings.drafted, timings.accepted = steps.drafted, steps.accepted


def _sampler(params: SamplingParams, history: Sequence[int]) -> Callable[[Logits], int]:
    from qwen_quant.runtime.sampling import Sampler

    sampler = Sampler(params)
    return lambda logits: sampler.sample(logits, history)
