"""The C library's heap."""

from __future__ import annotations

import ctypes


def give_back_memory() -> None:
    """Hand freed memory back to the system where the C library can (glibc's malloc_trim).

    What a layer keeps lies between what it has freed, and glibc would hold on to all of that: after many experts
    several times what is in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
