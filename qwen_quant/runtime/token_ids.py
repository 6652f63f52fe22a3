"""Token ids as the engine takes them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen_quant.errors import QwenQuantError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def as_token_ids(tokens: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Token ids [T] as the engine takes them. Raises QwenQuantError for what is not a list of ids."""
    import numpy as np

    ids = np.asarray(tokens)
    if ids.size == 0:
        raise QwenQuantError("the prompt is empty; give at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise QwenQuantError(f"token ids have to be a list of integers, not {ids.dtype} of shape {ids.shape}")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise QwenQuantError(f"token ids from {ids.min()} to {ids.max()} are outside every vocabulary")
    return np.ascontiguousarray(ids, dtype=np.int32)


def plain_token_ids(tokens: Sequence[int]) -> array[int]:
    """As `as_token_ids`, to which it leaves the complaints, but without numpy."""
    try:
        ids = array("i", tokens)
    except (TypeError, OverflowError):
        ids = array("i")
    return ids if ids and min(ids) >= 0 else array("i", as_token_ids(tokens).tolist())
