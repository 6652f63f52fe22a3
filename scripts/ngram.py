"""An interpolated Kneser-Ney 3-gram model over token ids: the bar that a trained model has to clear."""

from __future__ import annotations

import numpy as np

DISCOUNT = 0.75


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] == wanted, else 0; `keys` sorted."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


def trigram_bits(train: np.ndarray, test: np.ndarray, vocab: int) -> float:
    """Total bits of `test` (ids, 1-D) under a 3-gram model counted on `train`.

    Kneser & Ney 1995 with one absolute discount, interpolated: lower orders count distinct left contexts, and
    the unigram is smoothed with a uniform share so that no token has probability zero.
    """
    a, b, c = (train[i : len(train) - 2 + i].astype(np.int64) for i in range(3))
    x, y, z = (test[i : len(test) - 2 + i].astype(np.int64) for i in range(3))
    trigrams, tri_count = np.unique((a * vocab + b) * vocab + c, return_counts=True)
    contexts, where = np.unique(trigrams // vocab, return_inverse=True)
    context_total = np.bincount(where, weights=tri_count)
    context_kinds = np.bincount(where)
    # Continuation counts: in how many distinct left contexts a bigram (b, c), then a token c, was seen.
    bigrams, bi_kinds = np.unique(trigrams % vocab**2, return_counts=True)
    first = bigrams // vocab
    first_total = np.bincount(first, weights=bi_kinds, minlength=vocab)
    first_kinds = np.bincount(first, minlength=vocab)
    token_kinds = np.bincount(bigrams % vocab, minlength=vocab).astype(float)

    unigram = 0.99 * token_kinds / token_kinds.sum() + 0.01 / vocab
    p1 = unigram[z]
    seen = np.maximum(first_total[y], 1)
    p2 = np.maximum(_lookup(bigrams, bi_kinds, y * vocab + z) - DISCOUNT, 0) / seen
    p2 += np.where(first_total[y] > 0, DISCOUNT * first_kinds[y] / seen, 1.0) * p1
    pair = x * vocab + y
    total = _lookup(contexts, context_total, pair)
    kinds = _lookup(contexts, context_kinds, pair)
    seen = np.maximum(total, 1)
    p3 = np.maximum(_lookup(trigrams, tri_count, pair * vocab + z) - DISCOUNT, 0) / seen
    p3 += np.where(total > 0, DISCOUNT * kinds / seen, 1.0) * p2
    return float(-np.log2(p3).sum()) * len(test) / len(z)
