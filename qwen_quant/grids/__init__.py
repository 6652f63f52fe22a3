"""Weight formats as grids: what codes and parameters a weight can have, and how they are stored."""

from qwen_quant.grids.base import AffineGrid, QuantizedTensor, Scales
from qwen_quant.grids.gguf import GRIDS, BlockGrid, gguf_grid
from qwen_quant.grids.gptq import IntGrid
from qwen_quant.grids.legacy_quants import Q4_0, Q4_1, Q8_0

__all__ = [
    "GRIDS",
    "Q4_0",
    "Q4_1",
    "Q8_0",
    "AffineGrid",
    "BlockGrid",
    "IntGrid",
    "QuantizedTensor",
    "Scales",
    "gguf_grid",
]
