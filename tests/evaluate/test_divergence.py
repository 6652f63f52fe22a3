"""Divergence and agreement of given distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen_quant.evaluate.divergence import Divergence, kl_divergence


def test_two_point_distributions_by_hand() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(np.log(p), np.log(q))[0] == pytest.approx(by_hand)
    assert kl_divergence(np.log(q), np.log(p))[0] != pytest.approx(by_hand, rel=0.1)


def test_equal_distributions_do_not_diverge() -> None:
    logs = np.log(np.random.default_rng(0).dirichlet(np.ones(50), size=20))
    assert kl_divergence(logs, logs).tolist() == [0.0] * 20


def test_statistics_over_blocks() -> None:
    rng = np.random.default_rng(1)
    p, q = (np.log(rng.dirichlet(np.ones(8), size=300)) for _ in range(2))
    found = Divergence()
    for rows in (slice(0, 100), slice(100, 300)):
        found.add(p[rows], q[rows])
    values = (np.exp(p) * (p - q)).sum(axis=1)
    assert found.mean == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(300))
    assert found.percentile(99) == pytest.approx(np.percentile(values, 99))
    assert found.percentile(100) == pytest.approx(values.max())
    assert found.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
