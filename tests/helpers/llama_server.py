"""llama.cpp in this process. Importing this skips the tests of a file where xllamacpp is not installed."""

from __future__ import annotations

import gc
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")


class LlamaCpp:
    """A llama.cpp server in this process, on one GGUF file."""

    def __init__(self, path: Path) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.cpuparams.n_threads = 2
        parameters.warmup = False
        parameters.n_ctx = 256
        parameters.n_parallel = 1
        parameters.verbosity = 0
        # Attention in FP32, as in the reference: what is compared is the weights.
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(parameters)

    def complete(self, prompt: list[int], count: int, logprobs: int = 1) -> list[dict[str, Any]]:
        """Greedy continuation: for each token its id and its `top_logprobs`."""
        request = {
            "prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": logprobs, "ignore_eos": True,
        }  # fmt: skip
        answer = self._server.handle_completions(request)
        return list((answer["choices"][0]["logprobs"] or {"content": []})["content"])

    def tokenize(self, text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": special}).encode()
        address = f"{self._server.listening_address}/tokenize"
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=20) as answer:
            return list(json.load(answer)["tokens"])


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    server = LlamaCpp(path)
    try:
        yield server
    finally:
        del server
        gc.collect()
