"""The grids of GGUF files by the names of their types."""

from __future__ import annotations

from qwen_quant.errors import UsageError
from qwen_quant.grids.blocks import BlockGrid
from qwen_quant.grids.iq4 import IQ4_NL, IQ4_XS
from qwen_quant.grids.k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from qwen_quant.grids.legacy_quants import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

GRIDS: dict[str, type[BlockGrid]] = {
    grid.name: grid for grid in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS)
}


def gguf_grid(type_name: str) -> BlockGrid:
    """The grid of a GGUF type name. Raises UsageError for types that are not grids."""
    if type_name not in GRIDS:
        raise UsageError(f"type {type_name!r} is not a quantized GGUF type; choose one of {', '.join(GRIDS)}")
    return GRIDS[type_name]()
