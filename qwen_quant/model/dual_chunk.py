"""Dual chunk attention in torch (see qwen_quant.dual_chunk): exact, in pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen_quant.dual_chunk import DualChunk

SCORES = 1 << 27  # attention scores in memory at once


def query_positions(dual: DualChunk, positions: Tensor) -> Tensor:
    """Where queries at `positions` [seq] stand [3, seq] for keys of their own chunk, of the one before, and of
    all earlier ones. The first row is also where the keys stand."""
    own = positions % dual.chunk_len
    before = (own + dual.chunk_len).clamp(max=dual.chunk_size)
    return torch.stack((own, before, torch.full_like(own, dual.farthest)))


def attend(dual: DualChunk, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Context vectors [batch, n_heads, seq, head_dim] of the last tokens of a text.

    `queries` [3, batch, n_heads, seq, head_dim] are rotated to the positions of `query_positions`; `keys` and
    `values` [batch, n_kv_heads, total, head_dim] are those of the whole text so far.
    """
    total, n_kv_heads = keys.shape[2], keys.shape[1]
    first = total - queries.shape[3]
    queries = queries.unflatten(2, (n_kv_heads, -1))  # [3, batch, n_kv_heads, heads of one, seq, head_dim]
    queries = queries * (dual.temperature(total) / queries.shape[-1] ** 0.5)
    rows = max(1, SCORES // (queries[0, ..., 0, 0].numel() * total))
    parts = []
    for start, stop in _pieces(first, total, dual.chunk_len, rows):
        scores = _scores(dual, queries[..., start - first : stop - first, :], keys[:, :, None], start, stop)
        parts.append(torch.softmax(scores, dim=-1) @ values[:, :, None, :stop])
    return torch.cat(parts, dim=-2).flatten(1, 2)


def _pieces(first: int, last: int, chunk_len: int, rows: int) -> Iterator[tuple[int, int]]:
    """Cut positions first … last - 1 into ranges of at most `rows` that do not cross the end of a chunk."""
    while first < last:
        stop = min(first + rows, first - first % chunk_len + chunk_len, last)
        yield first, stop
        first = stop


def _scores(dual: DualChunk, queries: Tensor, keys: Tensor, start: int, stop: int) -> Tensor:
    """Scores [..., stop - start, stop] of queries at start … stop - 1, all of one chunk; -inf for later keys."""
    own = start - start % dual.chunk_len  # where their chunk starts
    before = max(0, own - dual.chunk_len)
    parts = [
        standing @ keys[..., begin:end, :].transpose(-1, -2)
        for standing, begin, end in zip(queries, (own, before, 0), (stop, own, before), strict=True)
    ]
    later = torch.ones(parts[0].shape[-2:], dtype=torch.bool, device=keys.device).triu(start - own + 1)
    parts[0] = parts[0].masked_fill(later, -torch.inf)
    return torch.cat(parts[::-1], dim=-1)
