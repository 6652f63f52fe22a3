"""Several processes calibrate together: `torchrun --nproc-per-node N -m qwen_quant.cli gptq …`.

The first one ("rank 0") runs the command; it alone prints and writes. The others run what it calls with `joined`, and
inside of that all walk through the same layers with the same hidden states. What takes long is cut into pieces, each
piece is computed by one rank (`each_on_its_rank`), and its result is handed to all. Pieces do not depend on the number
of ranks and nothing is summed over ranks, so the result is the same to the bit for any number of them.

All ranks meet in `_Team.gather` before anything is sent. There a rank can say instead that it failed, and the first
one that something else comes next, so that no rank waits for another in vain. Outside `joined`, and in a process that
was started alone, `each_on_its_rank` is `map`.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qwen_quant.errors import QwenQuantError, ResourceError, UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

# A rank may compute for hours while others wait; one that is gone is noticed by its closed connection.
PATIENCE = timedelta(days=30)
PIECE, CALL, WAITING, FAILED, END = "piece", "call", "waiting", "failed", "end"


@dataclass(frozen=True)
class _Header:
    """What a rank is about to send: a pickle, and the type, shape and device of each tensor that was left out of it."""

    kind: str
    data: bytes = b""
    tensors: tuple[tuple[torch.dtype, torch.Size, str], ...] = ()


class _Recalled(Exception):
    """Rank 0 turned to something else, or some rank failed; `headers` are those it was told with."""

    def __init__(self, headers: list[_Header]) -> None:
        self.headers = headers


class _Packer(pickle.Pickler):
    """Leaves tensors and arrays out, which are sent as they lie in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> tuple[int, bool] | None:
        if not isinstance(value, Tensor | np.ndarray):
            return None
        self.tensors.append(torch.from_numpy(value) if isinstance(value, np.ndarray) else value)
        return len(self.tensors) - 1, isinstance(value, np.ndarray)


class _Unpacker(pickle.Unpickler):
    """Puts back what `_Packer` left out."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, place: tuple[int, bool]) -> Tensor | np.ndarray:
        index, is_array = place
        return self.tensors[index].numpy() if is_array else self.tensors[index]


class _Team:
    """All processes of a run, and how they speak to each other."""

    def __init__(self) -> None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"torchrun: the processes cannot reach each other ({reason})") from None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Whether what was announced has not all been sent: then nobody can be told anything any more.
        self.midway = False
        self._own: list[Tensor] = []

    def gather(self, kind: str, value: object = None) -> list[_Header]:
        """Tell all ranks what this one is about to send; what each of them is."""
        file = io.BytesIO()
        packer = _Packer(file)
        packer.dump(value)
        self._own = packer.tensors
        tensors = tuple((tensor.dtype, tensor.shape, tensor.device.type) for tensor in packer.tensors)
        found: list[Any] = [None] * self.size
        self.midway = True
        with _noticing_loss():
            dist.all_gather_object(found, _Header(kind, file.getvalue(), tensors))
        self.midway = False
        return found

    def receive(self, headers: list[_Header], sources: Iterable[int]) -> Iterator[Any]:
        """What the ranks `sources` announced, in this order; each rank asks for all of it."""
        self.midway = True
        for source in sources:
            header, tensors = headers[source], []
            for place, (dtype, shape, device) in enumerate(header.tensors):
                tensor = (
                    self._own[place].contiguous()
                    if source == self.rank
                    else torch.empty(shape, dtype=dtype, device=device)
                )
                if tensor.numel():
                    with _noticing_loss():
                        dist.broadcast(tensor.reshape(-1).view(torch.uint8), source)
                tensors.append(tensor)
            yield _Unpacker(io.BytesIO(header.data), tensors).load()
        self.midway = False
        self._own = []

    def check(self, headers: list[_Header]) -> None:
        """Raise what a rank failed with: the error itself on rank 0, _Recalled on others; and there also when rank 0
        does not take part."""
        failed = [header for header in headers if header.kind == FAILED]
        if self.rank and (failed or headers[0].kind != PIECE):
            raise _Recalled(headers)
        for header in failed:
            raise pickle.loads(header.data)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`each_on_its_rank`, among these ranks."""
        for start in range(0, len(items), self.size):
            here = items[start : start + self.size]
            try:
                headers = self.gather(PIECE, function(here[self.rank]) if self.rank < len(here) else None)
            except Exception as error:
                if self.midway:
                    raise
                headers = self.gather(FAILED, _portable(error))
            self.check(headers)
            yield from self.receive(headers, range(len(here)))

    def call(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        """On rank 0: let the others run `function(*arguments)`."""
        headers = self.gather(CALL, (function, arguments))
        self.check(headers)
        list(self.receive(headers, [0]))

    def follow(self) -> None:
        """On the other ranks: run what rank 0 calls, until it ends."""
        global _together
        headers: list[_Header] | None = None
        report: tuple[str, object] = (WAITING, None)
        while True:
            headers = headers or self.gather(*report)
            kinds, report = [header.kind for header in headers], (WAITING, None)
            if kinds[0] == END:
                return
            if kinds[0] != CALL or FAILED in kinds:
                headers = None  # rank 0 has heard of a failure, and will call again or end
                continue
            [(function, arguments)] = self.receive(headers, [0])
            headers, _together = None, self
            try:
                function(*arguments)
            except _Recalled as recalled:
                headers = recalled.headers
            except Exception as error:
                if self.midway:
                    raise
                report = (FAILED, _portable(error))
            finally:
                _together = None


_leading: _Team | None = None  # in rank 0 of several
_together: _Team | None = None  # while all ranks are at the same work


def each_on_its_rank(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`function` of each item, in order and on every rank; each rank computes some. All have to be taken.

    Results may be whatever can be pickled, and hold tensors and arrays. The first exception is raised everywhere.
    """
    return map(function, items) if _together is None else _together.map(function, items)


def on_one_rank(function: Callable[[], Result]) -> Result:
    """What `function` gives on rank 0, on every rank."""
    [found] = each_on_its_rank(lambda _: function(), [None])
    return found


def own_part(items: Sequence[Item]) -> Sequence[Item]:
    """Those of `items` that `each_on_its_rank` computes in this process."""
    return items if _together is None else items[_together.rank :: _together.size]


def shares(items: Sequence[Item]) -> list[Sequence[Item]]:
    """`items` in as many runs as there are ranks."""
    size = 1 if _together is None else _together.size
    return [items[len(items) * i // size : len(items) * (i + 1) // size] for i in range(size)]


def device_here(device: str) -> str:
    """`--device` as this process has to take it: with several, each has a CUDA device of its own."""
    if _together is None or torch.device(device).type != "cuda":
        return device
    if device != "cuda":
        raise UsageError(f"--device {device}: several processes need a device each; give --device cuda")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextlib.contextmanager
def joined(function: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """While the body runs in rank 0, the others run `function(*arguments)`; both must share out the same pieces."""
    global _together
    if _leading is None:
        yield
        return
    _leading.call(function, arguments)
    _together = _leading
    try:
        yield
    finally:
        _together = None


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Rank 0, for the whole of its command: the others follow until this ends."""
    global _leading
    _leading = team = _Team()
    try:
        yield
    except KeyboardInterrupt:  # at any point: the others notice by the closed connection
        team.midway = True
        raise
    finally:
        _leading = None
        if not team.midway:
            with contextlib.suppress(ResourceError):
                team.gather(END)
            dist.destroy_process_group()


def follow() -> int:
    """The other ranks, for the whole of the command; they print nothing. Returns the exit code."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            _Team().follow()
        except (KeyboardInterrupt, QwenQuantError):
            return 1
    dist.destroy_process_group()
    return 0


@contextlib.contextmanager
def _noticing_loss() -> Iterator[None]:
    """Turn what torch says of a closed connection into one line."""
    try:
        yield
    except RuntimeError:
        raise ResourceError(
            "torchrun: another process of this run has ended, killed perhaps for want of memory; start fewer, or lower "
            "--num-samples"
        ) from None


def _portable(error: Exception) -> Exception:
    """`error`, or what is left of it when it cannot be sent."""
    try:
        return (
            error if isinstance(pickle.loads(pickle.dumps(error)), type(error)) else RuntimeError(str(error))
        )
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
