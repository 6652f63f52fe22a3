"""Loading the weights of a GGUF file while Python does other things, such as building the tokenizer."""

from __future__ import annotations

import os
import threading

from qwen_quant import _core


class Loading:
    """An engine that is being made, in a thread of its own; packing weights leaves Python's lock alone.

    Takes what `Session.open` takes for a GGUF file. Raises FormatError at once for one that is missing or damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_threads: int | None = None,
        isa: str = "auto",
        n_ctx: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
    ) -> None:
        self.core = _core.GGUF(path)
        # Tried now, because Python keeps a core busy from here on.
        self._options = (
            n_threads or _core.fastest_thread_count(),
            isa,
            n_ctx or 0,
            cache_type_k,
            cache_type_v,
        )
        self._engine: _core.Engine | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._load)
        self._thread.start()

    def _load(self) -> None:
        try:
            self._engine = _core.Engine(self.core, *self._options)
        except BaseException as error:
            self._error = error

    def engine(self) -> _core.Engine:
        """Waits for it. Raises FormatError for a model that cannot be run exactly, QwenQuantError for options
        that this machine cannot serve."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._engine is not None
        return self._engine
