"""Which type each tensor of a GGUF file has: the mixes that llama.cpp's llama-quantize names, as a table.

A file type like Q4_K_M is a base type for all matrices and rules for those that lose most by it. The names, and what
they mean for every tensor, are llama.cpp's (src/llama-quant.cpp): files of ours have the same sizes, to the byte.
Calibration stands for its importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf


@dataclass(frozen=True)
class Place:
    """Where a matrix stands: it is number `index` of its kind in a model of `layers` layers."""

    index: int
    layers: int
    gqa: int  # query heads for each key-value head
    calibrated: bool


Rule = tuple[Callable[[Place], bool], str]  # the first that holds decides


def _always(type_name: str) -> tuple[Rule, ...]:
    return ((lambda place: True, type_name),)


def _first(count: int) -> Callable[[Place], bool]:
    return lambda place: place.index < count


def _first_part(parts: int) -> Callable[[Place], bool]:
    """The first eighth, say, of the layers (rounded down)."""
    return lambda place: place.index < place.layers // parts


def _more_bits(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = place.layers // 8
    return place.index < eighth or place.index >= 7 * place.layers // 8 or (place.index - eighth) % 3 == 2


def _wide_groups(place: Place) -> bool:
    """Many query heads share these few weights."""
    return place.gqa >= 4


def _early_calibrated(place: Place) -> bool:
    return place.calibrated and _first_part(8)(place)


def _early_uncalibrated(place: Place) -> bool:
    return not place.calibrated and _first_part(8)(place)


@dataclass(frozen=True)
class Mix:
    """A file type: matrices are `base` but for these kinds. `eight` is attn_output's type in models of 8 experts,
    where none of its rules holds."""

    code: gguf.LlamaFileType
    base: str
    attn_v: tuple[Rule, ...] = ()  # also Qwen (1)'s attn_qkv
    attn_output: tuple[Rule, ...] = ()
    ffn_down: tuple[Rule, ...] = ()  # also of experts
    eight: str | None = None


_CODES = gguf.LlamaFileType
MIXES = {
    "F32": Mix(_CODES.ALL_F32, "F32"),
    "F16": Mix(_CODES.MOSTLY_F16, "F16"),
    "BF16": Mix(_CODES.MOSTLY_BF16, "BF16"),
    "Q8_0": Mix(_CODES.MOSTLY_Q8_0, "Q8_0"),
    "Q4_0": Mix(_CODES.MOSTLY_Q4_0, "Q4_0", ffn_down=((_early_calibrated, "Q4_1"),)),
    "Q4_1": Mix(_CODES.MOSTLY_Q4_1, "Q4_1"),
    "Q5_0": Mix(_CODES.MOSTLY_Q5_0, "Q5_0", ffn_down=((_early_calibrated, "Q5_1"),)),
    "Q5_1": Mix(_CODES.MOSTLY_Q5_1, "Q5_1"),
    "Q2_K": Mix(
        _CODES.MOSTLY_Q2_K,
        "Q2_K",
        attn_v=((_wide_groups, "Q4_K"), *_always("Q3_K")),
        attn_output=_always("Q3_K"),
        ffn_down=_always("Q3_K"),
        eight="Q5_K",
    ),
    "Q2_K_S": Mix(
        _CODES.MOSTLY_Q2_K_S,
        "Q2_K",
        attn_v=((_wide_groups, "Q4_K"),),
        ffn_down=((_first_part(8), "Q4_K"),),
    ),
    "Q3_K_S": Mix(_CODES.MOSTLY_Q3_K_S, "Q3_K", eight="Q5_K"),
    "Q3_K_M": Mix(
        _CODES.MOSTLY_Q3_K_M,
        "Q3_K",
        attn_v=((_first(2), "Q5_K"), *_always("Q4_K")),
        attn_output=_always("Q4_K"),
        ffn_down=((_first_part(16), "Q5_K"), *_always("Q4_K")),
        eight="Q5_K",
    ),
    "Q3_K_L": Mix(
        _CODES.MOSTLY_Q3_K_L,
        "Q3_K",
        attn_v=_always("Q5_K"),
        attn_output=_always("Q5_K"),
        ffn_down=_always("Q5_K"),
    ),
    "Q4_K_S": Mix(
        _CODES.MOSTLY_Q4_K_S,
        "Q4_K",
        attn_v=((_first(4), "Q5_K"),),
        ffn_down=((_first_part(8), "Q5_K"),),
        eight="Q5_K",
    ),
    "Q4_K_M": Mix(
        _CODES.MOSTLY_Q4_K_M,
        "Q4_K",
        attn_v=((_more_bits, "Q6_K"),),
        ffn_down=((_more_bits, "Q6_K"),),
        eight="Q5_K",
    ),
    "Q5_K_S": Mix(_CODES.MOSTLY_Q5_K_S, "Q5_K"),
    "Q5_K_M": Mix(
        _CODES.MOSTLY_Q5_K_M,
        "Q5_K",
        attn_v=((_more_bits, "Q6_K"),),
        ffn_down=((_more_bits, "Q6_K"),),
    ),
    "Q6_K": Mix(_CODES.MOSTLY_Q6_K, "Q6_K"),
    "IQ4_NL": Mix(
        _CODES.MOSTLY_IQ4_NL,
        "IQ4_NL",
        attn_v=((_wide_groups, "Q5_K"),),
        ffn_down=((_early_uncalibrated, "Q5_K"),),
        eight="Q5_K",
    ),
    "IQ4_XS": Mix(
        _CODES.MOSTLY_IQ4_XS,
        "IQ4_XS",
        attn_v=((_wide_groups, "Q5_K"),),
        ffn_down=((_early_uncalibrated, "Q5_K"),),
        eight="Q5_K",
    ),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
HEAD_TYPE = "Q6_K"  # of a head, or a tied embedding, in files of fewer bits than Q8_0
# Where the columns do not fill super-blocks of 256; what does not fill blocks of 32 either stays F16.
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
NO_GRID = "F16"
