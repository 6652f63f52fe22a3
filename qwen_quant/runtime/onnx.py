"""ONNX folders on onnxruntime's CPU provider, behind the same interface as the C++ engine's.

Keys and values stay where they are from step to step: either the graph writes new ones into the buffer that holds the
old (GroupQueryAttention with past and present bound to the same memory), or its outputs become the next inputs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_quant.errors import FormatError, QwenQuantError

if TYPE_CHECKING:
    from qwen_quant.tokenizer import Tokenizer

GENAI = "genai_config.json"
LAST_ONLY = "num_logits_to_keep"
CHUNK = 256  # tokens of a prompt that run at once: Ctrl-C is seen in between, and all logits of a chunk fit
FIRST_CAPACITY = 512  # positions of a shared buffer at first; it doubles when they are used up
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


def is_onnx_folder(path: Path) -> bool:
    """Whether `path` is a folder that says which ONNX graph it holds."""
    return (path / GENAI).is_file()


class OnnxFolder:
    """A folder with a graph, tokenizer files and genai_config.json, which says what belongs to what.

    Raises FormatError when it is not such a folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        where = self.path / GENAI
        try:
            config = json.loads(where.read_text(encoding="utf-8"))
            model, search = config["model"], config.get("search", {})
            self.graph = self.path / model["decoder"]["filename"]
            self.context_length = int(model["context_length"])
            self.eos_token_ids = _ids(model.get("eos_token_id"))
            self.shares_buffer = bool(search.get("past_present_share_buffer"))
            # onnxruntime's own settings stand among onnxruntime-genai's, which are no strings or have no dots.
            stated = model["decoder"].get("session_options", {}).items()
            self.options = {k: v for k, v in stated if isinstance(v, str) and "." in k}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(
                f"{where}: cannot be read as onnxruntime-genai's config ({error}); export the model again"
            ) from None
        if not self.graph.is_file():
            raise FormatError(f"{self.graph}: not found, but {GENAI} names it; export the model again")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What genai_config.json says about the model."""
        return dict(json.loads((self.path / GENAI).read_text(encoding="utf-8"))["model"])

    def cache_shape(self, cache: Any) -> tuple[int, int, Any]:
        """Heads, head_dim and dtype of a graph's input; onnxruntime-genai's builder leaves dimensions to its config."""
        decoder = self.metadata["decoder"]
        sizes = ((cache.shape[1], "num_key_value_heads"), (cache.shape[3], "head_size"))
        heads, size = (given if isinstance(given, int) else decoder.get(key) for given, key in sizes)
        if not (isinstance(heads, int) and isinstance(size, int)):
            raise FormatError(
                f"{self.graph}: {cache.name} has no fixed size, and {GENAI} does not give it either"
            )
        return heads, size, _DTYPES[cache.type]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer whose files lie in the folder."""
        from qwen_quant.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path)

    def end_ids(self) -> frozenset[int]:
        """Every id that ends a turn."""
        return frozenset(self.eos_token_ids) | frozenset(self.load_tokenizer().eos_ids)


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (int(value),)


class OnnxEngine:
    """Runs the graph of a folder, one text at a time. As `_core.Engine`, whose methods it has."""

    def __init__(self, folder: OnnxFolder, n_threads: int = 0, n_ctx: int = 0) -> None:
        self._session = open_graph(folder.graph, n_threads, folder.options)
        inputs = {value.name: value for value in self._session.get_inputs()}
        caches = {name: value for name, value in inputs.items() if name.startswith("past_key_values.")}
        self._inputs = set(inputs) | {value.name for value in self._session.get_overridable_initializers()}
        self.n_vocab, self._logits_dtype = self._logits(folder)
        self._binding = self._session.io_binding()
        self.n_ctx = min(n_ctx, folder.context_length) if n_ctx else folder.context_length
        self.n_past = 0
        cache = SharedCache if folder.shares_buffer else GrowingCache
        shapes = {name: folder.cache_shape(value) for name, value in caches.items()}
        self._cache = cache(shapes, self.n_ctx)
        self.kv_bytes_per_token = float(
            sum(h * size * np.dtype(kind).itemsize for h, size, kind in shapes.values())
        )
        self.kv_recent_bytes = 0

    def _logits(self, folder: OnnxFolder) -> tuple[int, Any]:
        """Rows of the head, and the type of what it puts out."""
        logits = next((value for value in self._session.get_outputs() if value.name == "logits"), None)
        if logits is None or not isinstance(logits.shape[-1], int) or "input_ids" not in self._inputs:
            raise FormatError(
                f"{folder.graph}: is not a graph from input_ids to logits; export the model again"
            )
        return logits.shape[-1], _DTYPES[logits.type]

    def reset(self) -> None:
        """Forgets the context and frees its cache."""
        self._cache.clear()
        self.n_past = 0

    def truncate(self, n_tokens: int) -> None:
        """Keeps the first `n_tokens` of the context. Raises QwenQuantError when it holds fewer."""
        if not 0 <= n_tokens <= self.n_past:
            raise QwenQuantError(f"cannot keep {n_tokens} tokens of a context that holds {self.n_past}")
        self._cache.truncate(n_tokens)
        self.n_past = n_tokens

    def exact_past(self, n_tokens: int) -> int:
        """As the C++ engine's: nothing is lost by truncating."""
        return n_tokens

    def forward(
        self, tokens: npt.NDArray[np.int32], n_past: int, n_logits: int = 1
    ) -> npt.NDArray[np.float32]:
        """Logits [n_logits, V] after the last of `tokens` [T], which follow the first `n_past` of the context.

        Raises QwenQuantError when the context is full or an id is outside the vocabulary.
        """
        if int(tokens.max()) >= self.n_vocab:
            raise QwenQuantError(f"token id {int(tokens.max())} is outside the vocabulary of {self.n_vocab}")
        if n_past + len(tokens) > self.n_ctx:
            raise QwenQuantError(
                f"{len(tokens)} tokens after {n_past} do not fit into the context of {self.n_ctx}"
            )
        self.truncate(n_past)
        found = np.empty((n_logits, self.n_vocab), dtype=np.float32)
        first = len(tokens) - n_logits  # whose logits are kept
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            end = start + len(chunk)
            keep = max(end - max(start, first), 0)
            logits = self._run(chunk, max(keep, 1))
            if keep:
                found[end - keep - first : end - first] = logits[-keep:]
        return found

    def _run(self, tokens: npt.NDArray[np.int32], keep: int) -> npt.NDArray[Any]:
        """Logits of at least the last `keep` of `tokens` [T], which join the context."""
        total = self.n_past + len(tokens)
        feeds = {
            "input_ids": tokens.astype(np.int64)[None],
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(self.n_past, total, dtype=np.int64)[None],
            LAST_ONLY: np.array(keep, dtype=np.int64),
        }
        for name, values in feeds.items():
            if name in self._inputs:
                self._bind(self._binding.bind_ortvalue_input, name, values)
        kept = keep if LAST_ONLY in self._inputs else len(tokens)
        logits = np.empty((1, kept, self.n_vocab), dtype=self._logits_dtype)
        self._bind(self._binding.bind_ortvalue_output, "logits", logits)
        self._cache.bind(self._binding, self.n_past, total)
        self._session.run_with_iobinding(self._binding)
        self._cache.take(self._binding)
        self.n_past = total
        return logits[0]

    def _bind(self, how: Callable[[str, Any], None], name: str, values: npt.NDArray[Any]) -> None:
        """Hand an array to the next step, which reads or writes its very memory: the caller keeps it alive."""
        from onnxruntime import OrtValue

        how(name, OrtValue.ortvalue_from_numpy(values))


def open_graph(path: Path, n_threads: int = 0, entries: Mapping[str, str] | None = None) -> Any:
    """An onnxruntime session on the CPU, with `entries` for its configuration.

    Raises QwenQuantError without onnxruntime, FormatError for a graph that it cannot load.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise QwenQuantError(f"{path}: ONNX graphs run on onnxruntime; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads or len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, one for each of its status codes
        reason = str(error).splitlines()[0]
        raise FormatError(f"{path}: onnxruntime cannot load it ({reason}); export the model again") from None


Shapes = Mapping[str, tuple[int, int, Any]]  # past input -> heads, head_dim, dtype


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


class SharedCache:
    """Buffers [1, heads, capacity, head_dim] that are past and present at once."""

    def __init__(self, shapes: Shapes, limit: int) -> None:
        self._shapes, self._limit = shapes, limit
        self._buffers: dict[str, Any] = {}
        self._capacity = 0

    def clear(self) -> None:
        self._buffers, self._capacity = {}, 0

    def truncate(self, n_tokens: int) -> None:
        """Nothing to do: what lies beyond the length is never read."""

    def bind(self, binding: Any, n_past: int, total: int) -> None:
        """Hand the buffers, which get room for `total` positions, to this step and the next ones."""
        if total <= self._capacity:
            return
        self._make_room(n_past, total)
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(_present(name), buffer)

    def take(self, binding: Any) -> None:
        """Nothing to do: the step has written into the buffers."""

    def _make_room(self, n_past: int, total: int) -> None:
        from onnxruntime import OrtValue

        self._capacity = min(max(total, 2 * self._capacity, FIRST_CAPACITY), self._limit)
        for name, (heads, size, dtype) in self._shapes.items():
            grown = np.zeros((1, heads, self._capacity, size), dtype=dtype)
            if n_past:
                grown[:, :, :n_past] = self._buffers[name].numpy()[:, :, :n_past]
            self._buffers[name] = OrtValue.ortvalue_from_numpy(grown)


class GrowingCache:
    """Keys and values as the graph puts them out, longer after every step."""

    def __init__(self, shapes: Shapes, limit: int) -> None:
        self._shapes = shapes
        self.clear()

    def clear(self) -> None:
        from onnxruntime import OrtValue

        self._values = {
            name: OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, size), dtype=dtype))
            for name, (heads, size, dtype) in self._shapes.items()
        }

    def truncate(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` positions."""
        from onnxruntime import OrtValue

        for name, value in self._values.items():
            if value.shape()[2] > n_tokens:
                kept = np.ascontiguousarray(value.numpy()[:, :, :n_tokens])
                self._values[name] = OrtValue.ortvalue_from_numpy(kept)

    def bind(self, binding: Any, n_past: int, total: int) -> None:
        """Hand what is there to a step and let it allocate what comes out."""
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_output(_present(name), "cpu")

    def take(self, binding: Any) -> None:
        """Keep what a step put out."""
        # Outputs come in the order in which their names were bound first: logits, then these.
        self._values = dict(zip(self._values, binding.get_outputs()[1:], strict=True))
