"""What a run needs for what it does beside quantizing: memory in FP32 values, with the names of plan_layer.py.

a budget, gradients   plan_gradients.py
a budget, losses      a layer as it is quantized, with the few windows that are measured
the check of a file   all weights of a layer; then the file as its runtime holds it, with logits of the reference
                      [tokens, vocab]; less than elsewhere that no formula counts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qwen_quant.quantize.experts import groups_of_experts
from qwen_quant.quantize.plan_gradients import gradient_stages
from qwen_quant.quantize.plan_layer import FLOAT, PIECE, CalibratedLayer, Stage, largest
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.sensitivity import GRADIENT_TOKENS, HESSIAN_TOKENS
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.spec import ModelSpec

# Copies of the stored weights that a runtime holds: our engine packed, and what it packs; onnxruntime packed, with FP32
# scales, which are more of 4-bit blocks.
ENGINE, PACKED_4BIT, PACKED_8BIT = 1.2, 1.12, 1.02
FOLDED = 128 << 20  # what onnxruntime frees and keeps while it widens and turns floats, unless they are less
GRAPH_LAYER = 2.5e6  # a layer's nodes and caches
LOGITS = 3.2  # of a window: the reference's, and a few rows of both and of their distributions
CHECKER = 60 << 20  # what has come to the process when its check begins, and freed memory was given back


def measuring(spec: ModelSpec, tensors: list[StoredTensor], recipe: Recipe) -> Stage:
    """The worst moment of measuring losses (sensitivity.py) for a file of `tensors`."""
    tokens = recipe.seq_len * _windows(recipe, GRADIENT_TOKENS)
    gradients = gradient_stages(spec, tensors, recipe.seq_len, tokens)
    stages = (*gradients, *_losses(spec, tensors, recipe))
    worst = max(stages, key=lambda stage: stage.nbytes)
    return replace(
        worst, name=f"measuring losses, {worst.name}", remedy="give more, or fix the types with --type"
    )


def _floats(tensors: list[StoredTensor]) -> float:
    """Bytes of a layer in FP32, and of its largest tensor as it is read."""
    return FLOAT * (_weights(tensors) + largest(tensors))


def _piece(tensors: list[StoredTensor]) -> float:
    """Bytes of the piece in which embedding and head are read: as stored and in FP32."""
    return FLOAT * 3 * min(PIECE // 2, largest([tensor for tensor in tensors if tensor.info.layer < 0]))


def _windows(recipe: Recipe, tokens: int) -> int:
    return min(recipe.num_samples, max(1, tokens // recipe.seq_len))


def _losses(spec: ModelSpec, tensors: list[StoredTensor], recipe: Recipe) -> Iterator[Stage]:
    """The layers once more, each tensor tried on all grids of its menu; then embedding and head, some rows of them."""
    few = replace(
        recipe, num_samples=_windows(recipe, HESSIAN_TOKENS), correct_targets=False, output_aware=False
    )
    for layer in range(spec.num_hidden_layers):
        mine = [tensor for tensor in tensors if tensor.info.layer == layer]
        yield CalibratedLayer(spec, layer, mine, few, True).plan().worst
    hidden = FLOAT * few.num_samples * few.seq_len * spec.hidden_size
    yield Stage("embedding and head", 2 * hidden + _piece(tensors) + FLOAT * 6 * spec.hidden_size**2)


def in_onnxruntime(spec: ModelSpec, tensors: list[StoredTensor], exact: bool, beside: float) -> float:
    """Bytes that onnxruntime holds at most of a graph with these weights, while it loads them or runs with `beside`
    bytes of other things; `exact` where integers are multiplied at accuracy_level 0."""
    integers, floats = ([t for t in tensors if t.kind.startswith("int") is kind] for kind in (True, False))
    packed = [(PACKED_8BIT if t.kind.startswith("int8") else PACKED_4BIT) * t.nbytes for t in integers]
    held = sum(packed) + FLOAT * _weights(floats)
    held += GRAPH_LAYER * spec.num_hidden_layers
    held += (
        2 * FLOAT * spec.plain_context * spec.head_dim
    )  # rotary tables and the angles that they are made of
    # Of floats one matrix is there twice for good (as rows and, packed, as the head), of integers while it is packed.
    held += max(FLOAT * largest(floats), min(FLOAT * _weights(floats), FOLDED))
    packing = max((size / t.count for t, size in zip(integers, packed, strict=True)), default=0)
    widened = FLOAT * largest([t for t in integers if t.kind.startswith("int8")]) if exact else 0
    return held + max(packing, widened + beside)


def _weights(tensors: list[StoredTensor]) -> int:
    return sum(tensor.weights for tensor in tensors)


def judging(spec: ModelSpec, tokens: int, rows: int) -> float:
    """Bytes that the check needs beside a runtime: logits of `tokens`, and `rows` of the reference's head."""
    return FLOAT * (LOGITS * tokens * spec.vocab_size + 2 * rows * spec.hidden_size)


def checking(spec: ModelSpec, tensors: list[StoredTensor], running: float) -> Stage:
    """The check of what was written: the reference model runs layer by layer, of experts a few at a time, then its
    head beside the runtime, which takes `running` bytes."""
    resident = [
        tensor for tensor in tensors if tensor.info.layer >= 0 and ".experts." not in tensor.info.name
    ]
    layers = [[t for t in resident if t.info.layer == layer] for layer in range(spec.num_hidden_layers)]
    reference = max(_piece(tensors), *map(_floats, layers))
    if spec.moe is not None:
        together = len(next(groups_of_experts(spec.moe, spec.hidden_size)))
        reference += FLOAT * together * 3 * spec.moe.moe_intermediate_size * spec.hidden_size
    return Stage(
        "checking what was written",
        max(reference, running),
        "give more, or leave it out with --no-verify",
        CHECKER + _piece(tensors) / 3,
    )
