"""Greedy text of the torch reference model."""

from __future__ import annotations

import torch

from qwen_quant.model import Model


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    caches, fresh = model.new_cache(), tokens
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([fresh]), caches)[0, -1]
        fresh = [int(logits.argmax())]
        tokens += fresh
    return tokens[len(prompt) :]
