"""What one decoder layer will need: memory at its worst stage, and operations. The formulas are all here.

Memory in FP32 values unless said otherwise. T: calibration tokens; B: tokens of a forward pass; H, F: hidden and
intermediate size; E problems of W [N, K] share a solve.

    always            hidden states T·H, non-expert weights of one layer until nothing reads them any more, codes of
                      its solved weights (1 byte each)
    targets           hidden states in full precision, T·H of half the windows; beside a Hessian what is lacking: K²
                      of inputs, N·K of outputs; the weights N·K that are solved instead of W; while a part of the
                      layer runs, its weights twice and the activations of B tokens twice
    attention         contexts T·q_size in FP16, unless they are computed again; activations of B tokens
    MLP               gated activations T·F in FP16, unless they are computed again; activations of B tokens
                      (neither hidden states nor these where they lie in files, scratch.py)
    a shared input    its Hessian K²
    experts           their outputs T·H; weights and Hessians of those that are solved together
    solver            max(E·N·K + 2·E·K², 2·E·N·K + 6·P + E·K²): the Hessian in the solver's order and its factor,
                      then compensation and errors of the P weights that are solved at once
    writing           packing of the largest tensor, or a piece of the embedding

Time is counted in operations and divided by what this machine was measured to do (speed.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qwen_quant.moe import MoESpec
from qwen_quant.quantize.calibration import BLOCK
from qwen_quant.quantize.descend import SWEEPS
from qwen_quant.quantize.experts import COLD, groups_of_experts
from qwen_quant.quantize.gptq import FLOATS_AT_ONCE, LARGE, MEASURED, ROWS_AT_ONCE
from qwen_quant.quantize.inputs import ROUTED_AT_ONCE, TOKENS_AT_ONCE, batches_at_once
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.quantize.targets import half_of
from qwen_quant.spec import ModelSpec

# What the process adds to what it has at the time of the plan: tokenizer, calibration text, buffers of BLAS, and
# freed memory that malloc keeps.
OVERHEAD = 300 << 20
FLOAT = 4
NARROW = 2  # bytes of an activation that is kept
CODE = 1.07  # bytes of a code and its share of the scales, as the quantizer holds them
# Floats of the solver for each weight that is solved at once, and for each entry of a Hessian.
COMPENSATION, FACTORISATION = 6, 2
PLAIN = 8  # floats for each weight while a tensor is rounded to nearest
ATTENTION_FLOATS, MLP_FLOATS = 6, 4  # for each output of a token's projections, in a forward pass
PIECE = 32 << 20  # stored bytes of a tensor that is copied in pieces


@dataclass(frozen=True)
class Work:
    """Operations: floating-point ones of matrix products and of factorisations, weights that the solver rounds,
    weights that are only rounded to nearest, bytes that are read or written."""

    matmul: float = 0
    factor: float = 0
    solved: float = 0
    rounded: float = 0
    transferred: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Stage:
    """A point in the run at which memory peaks, `nbytes` above what the process began with, and `overhead` that no
    formula counts; `remedy` is what avoids it, where it is no part of quantizing itself."""

    name: str
    nbytes: float
    remedy: str = ""
    overhead: float = OVERHEAD


@dataclass(frozen=True)
class LayerPlan:
    """A decoder layer: the stage that needs most, and its work."""

    layer: int
    worst: Stage
    work: Work


def _weights(tensors: list[StoredTensor]) -> int:
    return sum(tensor.weights for tensor in tensors)


def copy_work(tensors: list[StoredTensor]) -> Work:
    rounded = [tensor for tensor in tensors if tensor.quantized]
    return Work(rounded=_weights(rounded), transferred=2 * _weights(tensors) + sum(t.nbytes for t in tensors))


def largest(tensors: list[StoredTensor]) -> int:
    return max((math.prod(tensor.info.shape) for tensor in tensors), default=0)


def _packing(tensors: list[StoredTensor]) -> float:
    """Bytes to pack the largest quantized tensor."""
    return max((packing_bytes(tensor) for tensor in tensors if tensor.quantized), default=0)


def packing_bytes(tensor: StoredTensor) -> float:
    """Bytes to pack a tensor: its codes turned, and a byte for each of their bits."""
    return math.prod(tensor.info.shape) * (2 + 1.5 * tensor.bits_per_weight)


def copied_layer(layer: int, tensors: list[StoredTensor]) -> LayerPlan:
    """A layer that is rounded to nearest or copied: one tensor at a time beside the codes of the layer."""
    quantized = [tensor for tensor in tensors if tensor.quantized]
    rounding = (FLOAT * PLAIN) * largest(quantized) + CODE * _weights(quantized)
    writing = CODE * _weights(quantized) + _packing(tensors)
    copying = 4 * PIECE
    return LayerPlan(
        layer, Stage(f"layer {layer}, rounding", max(rounding, writing, copying)), copy_work(tensors)
    )


@dataclass
class CalibratedLayer:
    """Stages and work of one layer as `LayerRun.solve_all` walks through them."""

    spec: ModelSpec
    layer: int
    tensors: list[StoredTensor]
    recipe: Recipe
    keep_activations: bool
    spill: bool = False  # hidden states and what is kept lie in files

    def plan(self) -> LayerPlan:
        worst = max(self._stages(), key=lambda stage: stage.nbytes)
        return LayerPlan(self.layer, Stage(f"layer {self.layer}, {worst.name}", worst.nbytes), self._work())

    @property
    def tokens(self) -> int:
        return self.recipe.num_samples * self.recipe.seq_len

    def at_once(self, limit: int = TOKENS_AT_ONCE) -> int:
        """Tokens of the forward passes that run at a time."""
        count = batches_at_once() if limit == TOKENS_AT_ONCE else 1
        return min(self.tokens, count * max(self.recipe.seq_len, limit))

    @property
    def _holds_activations(self) -> bool:
        return self.keep_activations and not self.spill

    @property
    def moe(self) -> MoESpec | None:
        return self.spec.moe if self.spec.is_sparse(self.layer) else None

    def _stages(self) -> Iterator[Stage]:
        spec, tokens, at_once = self.spec, self.tokens, self.at_once()
        hidden_size, q, qkv = spec.hidden_size, spec.q_size, spec.q_size + 2 * spec.kv_size
        # An expert's name holds its number, a stack of experts in GGUF's does not; both have `.experts.`.
        resident = [t for t in self.tensors if ".experts." not in t.info.name]
        hidden = 0 if self.spill else FLOAT * (tokens + exact_tokens(self.recipe)) * hidden_size
        twice = 2 if self.recipe.correct_targets else 1
        held = hidden + FLOAT * _weights(resident)
        contexts = NARROW * tokens * q if self._holds_activations else 0
        activations = twice * FLOAT * at_once * (ATTENTION_FLOATS * qkv + 3 * hidden_size)
        originals = FLOAT * (twice - 1) * qkv * hidden_size
        solved = CODE * (qkv * hidden_size)
        yield Stage("reading", hidden + FLOAT * _weights(resident) + 3 * largest(resident))
        yield Stage("solving q, k and v", held + self._solve(qkv, hidden_size, hidden_size, chain=q))
        moments = FLOAT * q * (q + (twice - 1) * hidden_size)
        yield Stage("attention", held + solved + originals + contexts + activations + moments)
        yield Stage(
            "solving o",
            held + solved + contexts + self._solve(hidden_size, q, hidden_size, chain=hidden_size),
        )
        codes = CODE * _weights([t for t in self.tensors if t.quantized])
        if self.moe is None:
            aimed = self.recipe.correct_targets
            held -= FLOAT * (qkv + q) * hidden_size
            yield from self._mlp("", held + solved, spec.intermediate_size, self._holds_activations, aimed)
        else:
            routes = tokens * self.moe.num_experts_per_tok * 12
            held += FLOAT * tokens * hidden_size + routes
            yield from self._experts(self.moe, held + codes)
            if self.moe.shared_expert_intermediate_size is not None:
                ffn = self.moe.shared_expert_intermediate_size
                yield from self._mlp("the shared expert's ", held + codes, ffn, keep=False, aimed=False)
        yield Stage("writing", hidden + codes + _packing(self.tensors))

    def _solve(self, rows: int, columns: int, lack: int, aimed: bool = True, chain: int = 0) -> float:
        """Bytes of a solve of weights [rows, columns], for targets where `aimed`: `lack` rows of moments beside it. The
        rows of a `chain` may make up for each other."""
        aiming = FLOAT * columns * (rows + lack) if aimed and self.recipe.correct_targets else 0
        if chain and self.recipe.output_aware:
            aiming += FLOAT * rows * (3 * chain + 4 * columns)
        return solve_bytes(1, rows, columns) + aiming

    def _mlp(self, whose: str, held: float, ffn: int, keep: bool, aimed: bool) -> Iterator[Stage]:
        hidden_size = self.spec.hidden_size
        solving = self._solve(2 * ffn, hidden_size, hidden_size, aimed)
        yield Stage(f"solving {whose}gate and up", held + solving)
        held += CODE * 2 * ffn * hidden_size
        held += NARROW * self.tokens * ffn if keep else 0
        # Where there are experts, the shared one's outputs are computed with theirs.
        at_once = self.at_once(ROUTED_AT_ONCE if self.moe else TOKENS_AT_ONCE)
        running = at_once * (MLP_FLOATS * ffn + 3 * hidden_size)
        if aimed:  # the originals of gate and up, and what down lacks
            running += running + 3 * ffn * hidden_size
        yield Stage(f"running {whose}gate and up", held + FLOAT * (running + ffn * ffn))
        yield Stage(
            f"solving {whose}down", held + self._solve(hidden_size, ffn, hidden_size, aimed, hidden_size)
        )

    def _experts(self, moe: MoESpec, held: float) -> Iterator[Stage]:
        """The largest group of experts, whose tokens are at most those of a forward pass at a time."""
        hidden_size, ffn = self.spec.hidden_size, moe.moe_intermediate_size
        together = len(next(groups_of_experts(moe, hidden_size)))
        held += FLOAT * hidden_size * hidden_size + FLOAT * together * 3 * ffn * hidden_size
        activations = self.at_once(ROUTED_AT_ONCE) * (MLP_FLOATS * ffn + 4 * hidden_size)
        for name, rows, columns in (("gate and up", 2 * ffn, hidden_size), ("down", hidden_size, ffn)):
            stack = FLOAT * together * rows * columns
            moments = FLOAT * together * columns * columns  # of each expert, beside the stack of them all
            solving = solve_bytes(together, rows, columns) + stack + moments
            running = FLOAT * activations + moments
            yield Stage(f"solving {name} of {together} experts", held + max(solving, running))

    def _work(self) -> Work:
        spec, tokens = self.spec, self.tokens
        hidden_size, q, qkv = spec.hidden_size, spec.q_size, spec.q_size + 2 * spec.kv_size
        passes = 1 if self.keep_activations else 2
        attention = 2 * tokens * hidden_size * qkv + 4 * tokens * self.recipe.seq_len * q
        work = Work(matmul=passes * attention + 2 * tokens * q * hidden_size)
        work += hessian_and_solve(1, tokens, qkv, hidden_size) + hessian_and_solve(1, tokens, hidden_size, q)
        exact = exact_tokens(self.recipe)
        if exact:
            work += Work(matmul=exact / tokens * attention + 2 * (exact + q) * q * hidden_size)
            work += aiming_work(exact, qkv, hidden_size, hidden_size)
            work += aiming_work(exact, hidden_size, q, hidden_size)
        if self.moe is None:
            ffn = spec.intermediate_size
            work += self._mlp_work(1, tokens, ffn, passes)
            if exact:
                work += aiming_work(exact, 2 * ffn, hidden_size, hidden_size)
                work += aiming_work(exact, hidden_size, ffn, hidden_size)
                work += Work(matmul=(6 * exact + 2 * ffn) * hidden_size * ffn)
        else:
            moe = self.moe
            routed = tokens * moe.num_experts_per_tok / moe.num_experts
            work += self._mlp_work(moe.num_experts, routed, moe.moe_intermediate_size)
            pool = hessian_work(tokens, hidden_size)
            ffn = moe.moe_intermediate_size
            if routed < COLD * ffn:  # down_proj of a cold expert sees the layer's first tokens as well
                first = min(tokens, COLD * ffn)
                pool += moe.num_experts * (4 * first * hidden_size * ffn + hessian_work(first, ffn))
            pool += 6 * exact * moe.num_experts_per_tok * hidden_size * ffn
            work += Work(matmul=pool)
            if moe.shared_expert_intermediate_size is not None:
                work += self._mlp_work(1, tokens, moe.shared_expert_intermediate_size)
        # Read once to compute and once for the hash, written once to keep the layer and once to the output.
        weights = _weights(self.tensors)
        stored = sum(tensor.nbytes for tensor in self.tensors)
        return work + Work(transferred=4 * weights + weights + stored)

    def _mlp_work(self, count: int, tokens: float, ffn: int, passes: int = 2) -> Work:
        """`count` SwiGLUs of `tokens` each: gate and up run `passes` times, down once."""
        hidden_size = self.spec.hidden_size
        return (
            Work(matmul=count * tokens * (4 * passes + 2) * hidden_size * ffn)
            + hessian_and_solve(count, tokens, 2 * ffn, hidden_size)
            + hessian_and_solve(count, tokens, hidden_size, ffn)
        )


def solve_bytes(problems: int, rows: int, columns: int) -> float:
    """Bytes of a solve: its Hessians and the solver's own."""
    weights, hessians = problems * rows * columns, problems * columns * columns
    threads = torch.get_num_threads()
    parts = min(
        weights, FLOATS_AT_ONCE * min(problems, threads), ROWS_AT_ONCE * columns * max(problems, threads)
    )
    own = max(weights + FACTORISATION * hessians, 2 * weights + COMPENSATION * parts + hessians)
    return FLOAT * (own + hessians)


def hessian_work(tokens: float, columns: int) -> float:
    """Operations of a Hessian of `tokens`: the lower triangle in blocks of rows."""
    return tokens * columns * (columns + min(columns, BLOCK))


def solver_work(rows: int, columns: int) -> float:
    """Operations of the solver's large products: spreading errors (N·K²), the pulls of each sweep (2·N·K²), and
    measuring three errors of some rows (N·K² each)."""
    measured = 3 / MEASURED if rows >= LARGE else 3
    return (1 + 2 * SWEEPS + measured) * rows * columns**2


def exact_tokens(recipe: Recipe) -> int:
    """Tokens that pass in full precision too, for targets."""
    return half_of(recipe.num_samples) * recipe.seq_len if recipe.correct_targets else 0


def aiming_work(tokens: float, rows: int, columns: int, lack: int) -> Work:
    """Correcting the targets of weights [rows, columns]: moments with `lack` rows, a factor, two triangular systems."""
    return Work(matmul=2 * tokens * lack * columns + 2 * rows * columns**2, factor=columns**3 / 3)


def hessian_and_solve(problems: int, tokens: float, rows: int, columns: int) -> Work:
    """A Hessian of `tokens`, its factorisation (K³/3), and solving with it."""
    return Work(
        matmul=problems * (hessian_work(tokens, columns) + solver_work(rows, columns)),
        factor=problems * columns**3 / 3,
        solved=problems * rows * columns,
    )
