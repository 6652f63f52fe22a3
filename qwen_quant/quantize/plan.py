"""What a run will need before it begins: where each tensor goes, memory and time. The formulas are all here.

Memory is the largest stage of the largest layer, in bytes of FP32 unless said otherwise. T: calibration tokens; B:
tokens of a forward pass; H, F: hidden and intermediate size; E problems of W [N, K] share a solve.

    always            hidden states T·H, non-expert weights of one layer, codes of its solved weights (1 byte each)
    attention         contexts T·q_size, unless they are computed again; activations of B tokens
    a shared input    its Hessian K², twice: the sum and the mean
    experts           their outputs T·H; weights and Hessians of those that are solved together
    solver            max(E·N·K + 8·E·K², 12·E·N·K + E·K²): factorisation, then compensation and errors
    writing           packing of the largest tensor, or a piece of the embedding

Time is counted in operations and divided by what this machine was measured to do (`speed.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qwen_quant.errors import ResourceError
from qwen_quant.moe import MoESpec
from qwen_quant.quantize.experts import COLD, groups_of_experts
from qwen_quant.quantize.layer_run import TOKENS_AT_ONCE
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.spec import ModelSpec

FLOAT = 4
CODE = 1.07  # bytes of a code and its share of the scales, as the quantizer holds them
# Measured peaks of `solve_stack`, in floats for each weight and for each entry of a Hessian.
COMPENSATION, FACTORISATION = 12, 8
PLAIN = 8  # floats for each weight while a tensor is rounded to nearest
ATTENTION_FLOATS, MLP_FLOATS = 6, 4  # for each output of a token's projections, in a forward pass
PIECE = 32 << 20  # stored bytes of a tensor that is copied in pieces
# What the process adds to what it has at the time of the plan: tokenizer, calibration text, buffers of BLAS, and
# freed memory that malloc keeps.
OVERHEAD = 300 << 20


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
    """A point in the run at which memory peaks, `nbytes` above what the process began with."""

    name: str
    nbytes: float


@dataclass(frozen=True)
class LayerPlan:
    """A decoder layer: the stage that needs most, and its work."""

    layer: int
    worst: Stage
    work: Work


@dataclass(frozen=True)
class Plan:
    """A run: its tensors, its layers and what lies outside them. `base` is what the process holds anyhow."""

    tensors: tuple[StoredTensor, ...]
    layers: tuple[LayerPlan, ...]
    outer: Stage
    outer_work: Work
    base: float
    keep_contexts: bool = True
    hidden_states: float = 0

    @property
    def output_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def worst(self) -> Stage:
        return max((self.outer, *(layer.worst for layer in self.layers)), key=lambda stage: stage.nbytes)

    @property
    def peak(self) -> float:
        """Resident memory at the worst moment, bytes."""
        return self.base + OVERHEAD + self.worst.nbytes

    @property
    def work(self) -> Work:
        return sum((layer.work for layer in self.layers), self.outer_work)


def plan_run(
    spec: ModelSpec,
    tensors: list[StoredTensor],
    recipe: Recipe | None,
    base: float = 0.0,
    keep_contexts: bool = True,
) -> Plan:
    """The plan of a run that writes `tensors`; without a `recipe` nothing is quantized, only copied."""
    by_layer: dict[int, list[StoredTensor]] = {}
    for tensor in tensors:
        by_layer.setdefault(tensor.info.layer, []).append(tensor)
    layers = []
    for layer in range(spec.num_hidden_layers):
        mine = by_layer[layer]
        if recipe is not None and recipe.calibrate:
            layers.append(_CalibratedLayer(spec, layer, mine, recipe, keep_contexts).plan())
        else:
            layers.append(_copied_layer(layer, mine))
    tokens = recipe.num_samples * recipe.seq_len if recipe is not None and recipe.calibrate else 0
    outer = by_layer[-1]
    return Plan(
        tuple(tensors),
        tuple(layers),
        _outer_stage(spec, outer, tokens),
        _copy_work(outer),
        base,
        keep_contexts,
        FLOAT * tokens * spec.hidden_size,
    )


def fit(plan: Plan, spec: ModelSpec, recipe: Recipe | None, max_ram: int, model: str) -> Plan:
    """`plan`, or one with the same result that needs less. Raises ResourceError, naming the remedy, when none needs
    at most `max_ram` bytes."""
    if plan.peak <= max_ram:
        return plan

    def with_samples(count: int) -> Plan:
        assert recipe is not None
        less = replace(recipe, num_samples=count)
        return plan_run(spec, list(plan.tensors), less, plan.base, keep_contexts=False)

    calibrated = recipe is not None and recipe.calibrate
    if recipe is not None and calibrated:
        smaller = with_samples(recipe.num_samples)
        if smaller.peak <= max_ram:
            return smaller
    need = f"{model}: {plan.worst.name} needs about {size(plan.peak)}, --max-ram is {size(max_ram)}"
    if recipe is None or not calibrated:
        raise ResourceError(f"{need}; no option lowers it, give more")
    if with_samples(1).peak <= max_ram:
        low, high = 1, recipe.num_samples  # `low` fits, `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if with_samples(middle).peak <= max_ram else (low, middle)
        raise ResourceError(f"{need}; fewer calibration windows fit: --num-samples {low}, or lower --seq-len")
    least = size(with_samples(1).peak)
    raise ResourceError(
        f"{need}; with one calibration window (--num-samples 1) it still needs {least}: give more, or round "
        "without calibration (--no-calibration)"
    )


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def _weights(tensors: list[StoredTensor]) -> int:
    return sum(tensor.count * math.prod(tensor.info.shape) for tensor in tensors)


def _copy_work(tensors: list[StoredTensor]) -> Work:
    rounded = [tensor for tensor in tensors if tensor.quantized]
    return Work(rounded=_weights(rounded), transferred=2 * _weights(tensors) + sum(t.nbytes for t in tensors))


def _largest(tensors: list[StoredTensor]) -> int:
    return max((math.prod(tensor.info.shape) for tensor in tensors), default=0)


def _packing(tensors: list[StoredTensor]) -> float:
    """Bytes to pack the largest quantized tensor: its codes turned, and a byte for each of their bits."""
    return max(
        (math.prod(t.info.shape) * (2 + 1.5 * t.bits_per_weight) for t in tensors if t.quantized), default=0
    )


def _copied_layer(layer: int, tensors: list[StoredTensor]) -> LayerPlan:
    """A layer that is rounded to nearest or copied: one tensor at a time beside the codes of the layer."""
    quantized = [tensor for tensor in tensors if tensor.quantized]
    rounding = (FLOAT * PLAIN) * _largest(quantized) + CODE * _weights(quantized)
    writing = CODE * _weights(quantized) + _packing(tensors)
    copying = 4 * PIECE
    return LayerPlan(
        layer, Stage(f"layer {layer}, rounding", max(rounding, writing, copying)), _copy_work(tensors)
    )


def _outer_stage(spec: ModelSpec, tensors: list[StoredTensor], tokens: int) -> Stage:
    """Embedding the calibration tokens (each distinct row twice), or copying embedding and head in pieces."""
    rows = min(tokens, spec.vocab_size)
    embedding = FLOAT * spec.hidden_size * (tokens + 2 * rows) + 4 * PIECE if tokens else 0
    floats = max(PLAIN if tensor.quantized else 3 for tensor in tensors)
    copying = FLOAT * floats * min(PIECE // 2, _largest(tensors))
    return Stage(
        "embedding" if embedding > copying else "writing embedding and head", max(embedding, copying)
    )


@dataclass
class _CalibratedLayer:
    """Stages and work of one layer as `LayerRun.solve_all` walks through them."""

    spec: ModelSpec
    layer: int
    tensors: list[StoredTensor]
    recipe: Recipe
    keep_contexts: bool

    def plan(self) -> LayerPlan:
        worst = max(self._stages(), key=lambda stage: stage.nbytes)
        return LayerPlan(self.layer, Stage(f"layer {self.layer}, {worst.name}", worst.nbytes), self._work())

    @property
    def tokens(self) -> int:
        return self.recipe.num_samples * self.recipe.seq_len

    @property
    def at_once(self) -> int:
        return min(self.tokens, max(self.recipe.seq_len, TOKENS_AT_ONCE))

    @property
    def moe(self) -> MoESpec | None:
        return self.spec.moe if self.spec.is_sparse(self.layer) else None

    def _stages(self) -> Iterator[Stage]:
        spec, tokens, at_once = self.spec, self.tokens, self.at_once
        hidden_size, q, qkv = spec.hidden_size, spec.q_size, spec.q_size + 2 * spec.kv_size
        # An expert's name holds its number, a stack of experts in GGUF's does not; both have `.experts.`.
        resident = [t for t in self.tensors if ".experts." not in t.info.name]
        hidden = FLOAT * tokens * hidden_size
        held = hidden + FLOAT * _weights(resident)
        contexts = FLOAT * tokens * q if self.keep_contexts else 0
        activations = FLOAT * at_once * (ATTENTION_FLOATS * qkv + 3 * hidden_size)
        solved = CODE * (qkv * hidden_size)
        yield Stage("reading", hidden + FLOAT * _weights(resident) + 3 * _largest(resident))
        yield Stage("solving q, k and v", held + _solve(1, qkv, hidden_size))
        yield Stage("attention", held + solved + contexts + activations + FLOAT * q * q)
        yield Stage("solving o", held + solved + contexts + _solve(1, hidden_size, q))
        codes = CODE * _weights([t for t in self.tensors if t.quantized])
        if self.moe is None:
            yield from self._mlp("", held + solved, spec.intermediate_size)
        else:
            routes = tokens * self.moe.num_experts_per_tok * 12
            held += hidden + routes
            yield from self._experts(self.moe, held + codes)
            if self.moe.shared_expert_intermediate_size is not None:
                yield from self._mlp(
                    "the shared expert's ", held + codes, self.moe.shared_expert_intermediate_size
                )
        yield Stage("writing", hidden + codes + _packing(self.tensors))

    def _mlp(self, whose: str, held: float, ffn: int) -> Iterator[Stage]:
        hidden_size = self.spec.hidden_size
        yield Stage(f"solving {whose}gate and up", held + _solve(1, 2 * ffn, hidden_size))
        held += CODE * 2 * ffn * hidden_size
        activations = self.at_once * (MLP_FLOATS * ffn + 3 * hidden_size)
        yield Stage(f"running {whose}gate and up", held + FLOAT * (activations + ffn * ffn))
        yield Stage(f"solving {whose}down", held + _solve(1, hidden_size, ffn))

    def _experts(self, moe: MoESpec, held: float) -> Iterator[Stage]:
        """The largest group of experts, whose tokens are at most those of a forward pass at a time."""
        hidden_size, ffn = self.spec.hidden_size, moe.moe_intermediate_size
        together = len(next(groups_of_experts(moe, hidden_size)))
        held += FLOAT * hidden_size * hidden_size + FLOAT * together * 3 * ffn * hidden_size
        activations = self.at_once * (MLP_FLOATS * ffn + 4 * hidden_size)
        for name, rows, columns in (("gate and up", 2 * ffn, hidden_size), ("down", hidden_size, ffn)):
            stack = FLOAT * together * rows * columns
            solving = _solve(together, rows, columns) + stack
            running = FLOAT * (activations + together * columns * columns)
            yield Stage(f"solving {name} of {together} experts", held + max(solving, running))

    def _work(self) -> Work:
        spec, tokens = self.spec, self.tokens
        hidden_size, q, qkv = spec.hidden_size, spec.q_size, spec.q_size + 2 * spec.kv_size
        passes = 1 if self.keep_contexts else 2
        attention = 2 * tokens * hidden_size * qkv + 4 * tokens * self.recipe.seq_len * q
        work = Work(matmul=passes * attention + 2 * tokens * q * hidden_size)
        work += _hessian_and_solve(1, tokens, qkv, hidden_size) + _hessian_and_solve(
            1, tokens, hidden_size, q
        )
        if self.moe is None:
            work += self._mlp_work(1, tokens, spec.intermediate_size)
        else:
            moe = self.moe
            routed = tokens * moe.num_experts_per_tok / moe.num_experts
            work += self._mlp_work(moe.num_experts, routed, moe.moe_intermediate_size)
            pool = 2 * tokens * hidden_size**2
            ffn = moe.moe_intermediate_size
            if routed < COLD * ffn:  # down_proj of a cold expert sees the layer's first tokens as well
                pool += moe.num_experts * min(tokens, COLD * ffn) * (4 * hidden_size * ffn + 2 * ffn**2)
            work += Work(matmul=pool)
            if moe.shared_expert_intermediate_size is not None:
                work += self._mlp_work(1, tokens, moe.shared_expert_intermediate_size)
        # Read once to compute and once for the hash, written once to keep the layer and once to the output.
        weights = _weights(self.tensors)
        stored = sum(tensor.nbytes for tensor in self.tensors)
        return work + Work(transferred=4 * weights + weights + stored)

    def _mlp_work(self, count: int, tokens: float, ffn: int) -> Work:
        """`count` SwiGLUs of `tokens` each: gate and up run twice, down once."""
        hidden_size = self.spec.hidden_size
        return (
            Work(matmul=count * tokens * 10 * hidden_size * ffn)
            + _hessian_and_solve(count, tokens, 2 * ffn, hidden_size)
            + _hessian_and_solve(count, tokens, hidden_size, ffn)
        )


def _solve(problems: int, rows: int, columns: int) -> float:
    """Bytes of a solve: the sums and means of its Hessians and the solver's own."""
    weights, hessians = problems * rows * columns, problems * columns * columns
    own = max(weights + FACTORISATION * hessians, COMPENSATION * weights + hessians)
    return FLOAT * (own + 2 * hessians)


def _hessian_and_solve(problems: int, tokens: float, rows: int, columns: int) -> Work:
    """A Hessian of `tokens`, its factorisation and triangular inverse (K³/3 + K³), the rank updates (N·K²) and
    three error measurements (2·N·K² each)."""
    k2 = columns**2
    return Work(
        matmul=problems * (2 * tokens * k2 + 7 * rows * k2),
        factor=problems * 4 / 3 * k2 * columns,
        solved=problems * rows * columns,
    )
