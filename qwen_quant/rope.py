"""What a config.json says about rotary position embeddings: the base, and how the context is extended.

transformers 5 writes `rope_parameters`, older releases `rope_theta` and `rope_scaling`; both are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_quant.config import ConfigReader
from qwen_quant.errors import ConfigError

DEFAULT_THETA = 10000.0
_ANY_TYPE = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": _ANY_TYPE,
    "linear": _ANY_TYPE | {"factor"},
    "yarn": _ANY_TYPE
    | {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595).
    `yarn` keeps those that turn at least `beta_fast` times within `original_max_position_embeddings` positions,
    divides those below `beta_slow` turns, blends in between, and multiplies cos and sin by `attention_factor`
    (Peng et al. 2023, arXiv:2309.00071). `truncate` widens the blended range to whole dimensions.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def blended(self, rope_theta: float, head_dim: int) -> tuple[float, float]:
        """Indices of the frequencies between which YaRN goes from kept to divided (equation 23 of the paper)."""

        def index(turns: float) -> float:
            positions_per_turn = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(positions_per_turn) / (2 * math.log(rope_theta))

        first, last = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        return max(first, 0), min(last, head_dim - 1)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What the paper multiplies cos and sin by (equation 22), with transformers' weight on the logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_rope(get: ConfigReader, head_dim: int, max_position: int) -> tuple[float, RopeScaling | None]:
    """The base, and the context extension if there is one. Raises ConfigError naming what is not understood."""
    theta = get.optional_number("rope_theta")
    found: dict[str, RopeScaling | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = get.config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{get.where}: {key} is {rope!r}; it must be an object")
        inner = ConfigReader(rope, f"{get.where}: {key}")
        theta = inner.optional_number("rope_theta") or theta
        found[key] = _read_scaling(get, key, rope, max_position)
    if len(set(found.values())) > 1:
        raise ConfigError(f"{get.where}: rope_scaling and rope_parameters disagree; keep the right one only")
    theta = DEFAULT_THETA if theta is None else theta
    scaling = next(iter(found.values()), None)
    if scaling is not None and scaling.kind == "yarn":
        _check_range(get.where, scaling, theta, head_dim)
    _check_whole_rotation(get)
    return theta, scaling


def _read_scaling(
    get: ConfigReader, key: str, rope: Mapping[str, Any], max_position: int
) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ConfigError(
            f"{get.where}: {key} has rope type {kind!r}, which is not supported "
            f"(known: {', '.join(_KEYS)}); remove it to run without context extension"
        )
    inner = ConfigReader(rope, f"{get.where}: {key}")
    _check_whole_rotation(inner)
    for name, value in rope.items():
        if name not in _KEYS[kind] and value is not None:
            raise ConfigError(
                f"{inner.where}: {name!r} is not known for rope type {kind!r}; remove it if it has no effect"
            )
    if rope.get("type", kind) != kind:
        raise ConfigError(f"{inner.where}: type is {rope['type']!r}, rope_type {kind!r}; keep the right one")
    if kind == "default":
        return None
    factor = inner.optional_number("factor", least=1.0)
    if factor is None:
        raise ConfigError(f"{inner.where}: key 'factor' is missing; rope type {kind!r} needs it")
    if kind == "linear":
        return RopeScaling(kind, factor, max_position)
    # A value beside the object wins, as in transformers.
    original = get.positive(
        "original_max_position_embeddings", inner.positive("original_max_position_embeddings", max_position)
    )
    return RopeScaling(
        kind,
        factor,
        original,
        attention_factor=_attention_factor(inner, factor),
        beta_fast=inner.optional_number("beta_fast", least=1e-3) or 32.0,
        beta_slow=inner.optional_number("beta_slow", least=1e-3) or 1.0,
        truncate=inner.flag("truncate") if "truncate" in rope else True,
    )


def _attention_factor(inner: ConfigReader, factor: float) -> float:
    stated = inner.optional_number("attention_factor")
    if stated is not None:
        return stated
    over, under = inner.optional_number("mscale"), inner.optional_number("mscale_all_dim")
    if over and under:
        return yarn_attention_factor(factor, over) / yarn_attention_factor(factor, under)
    return yarn_attention_factor(factor)


def _check_range(where: str, scaling: RopeScaling, theta: float, head_dim: int) -> None:
    if theta <= 1:
        raise ConfigError(f"{where}: rope_theta is {theta!r}; YaRN needs a base above 1")
    first, last = scaling.blended(theta, head_dim)
    if scaling.beta_fast < scaling.beta_slow or first > last:
        raise ConfigError(
            f"{where}: beta_fast {scaling.beta_fast:g} and beta_slow {scaling.beta_slow:g} leave no frequencies "
            f"between them for original_max_position_embeddings {scaling.original_max_position_embeddings} "
            f"and rope_theta {theta:g}; correct them"
        )


def _check_whole_rotation(get: ConfigReader) -> None:
    if get.optional_number("partial_rotary_factor") not in (None, 1.0):
        raise ConfigError(
            f"{get.where}: partial_rotary_factor is {get.config['partial_rotary_factor']!r}; "
            "Qwen models rotate whole heads"
        )
