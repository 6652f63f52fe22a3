"""What a run needs for what it does beside quantizing: memory in FP32 values, with the names of plan_layer.py.

a budget, gradients   hidden states of G tokens at every layer, all weights of a layer (experts too), and what its
                      backward pass keeps of B tokens; or the head [vocab, H], as it is read and in FP32
a budget, losses      a layer as it is quantized, with the few windows that are measured
the check of a file   logits of the reference [tokens, vocab], with all weights of a layer; then the file as
                      onnxruntime holds it, or twice when the precision of its products is chosen
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qwen_quant.quantize.experts import groups_of_experts
from qwen_quant.quantize.gradients import POSITIONS
from qwen_quant.quantize.inputs import TOKENS_AT_ONCE
from qwen_quant.quantize.plan_layer import FLOAT, PIECE, CalibratedLayer, Stage, largest
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.sensitivity import GRADIENT_TOKENS, HESSIAN_TOKENS
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.spec import ModelSpec

# Floats for each output of a token's projections that the backward pass of a layer keeps or makes.
KEPT_ATTENTION, KEPT_MLP, KEPT_HIDDEN = 5, 6, 8
HEAD = 1.5  # floats for each weight of the head while it is read
# Copies of the stored weights that a runtime holds at most: onnxruntime as stored, in FP32 or as they lie, and packed,
# or 4-bit ones packed, and a few as stored; our engine packed, and what it packs; the reference model none, it reads a
# GPTQ checkpoint layer by layer.
ONNXRUNTIME, ENGINE, STREAMED = 3.0, 1.2, 0.0
PACKED_INT4 = 1.5
LOGITS = 6  # of a window: of both, and their distributions


def measuring(spec: ModelSpec, tensors: list[StoredTensor], recipe: Recipe) -> Stage:
    """The worst moment of measuring losses (sensitivity.py) for a file of `tensors`."""
    stages = (*_gradients(spec, tensors, recipe), *_losses(spec, tensors, recipe))
    worst = max(stages, key=lambda stage: stage.nbytes)
    return replace(
        worst, name=f"measuring losses, {worst.name}", remedy="give more, or fix the types with --type"
    )


def _floats(tensors: list[StoredTensor]) -> float:
    """Bytes of a layer in FP32, and of its largest tensor as it is read."""
    return FLOAT * (sum(tensor.weights for tensor in tensors) + largest(tensors))


def _piece(tensors: list[StoredTensor]) -> float:
    """Bytes of the piece in which embedding and head are read: as stored and in FP32."""
    return FLOAT * 3 * min(PIECE // 2, largest([tensor for tensor in tensors if tensor.info.layer < 0]))


def _windows(recipe: Recipe, tokens: int) -> int:
    return min(recipe.num_samples, max(1, tokens // recipe.seq_len))


def _gradients(spec: ModelSpec, tensors: list[StoredTensor], recipe: Recipe) -> Iterator[Stage]:
    """gradients.py: forward through all layers, the head, and backward."""
    tokens = recipe.seq_len * _windows(recipe, GRADIENT_TOKENS)
    at_once = min(tokens, max(recipe.seq_len, TOKENS_AT_ONCE))
    hidden = FLOAT * tokens * spec.hidden_size
    states = hidden * (spec.num_hidden_layers + 1)
    vocabulary = HEAD * spec.vocab_size * spec.hidden_size + 4 * POSITIONS * spec.vocab_size
    yield Stage("gradients at the head", states + 2 * hidden + FLOAT * vocabulary)
    qkv = spec.q_size + 2 * spec.kv_size
    for layer in range(spec.num_hidden_layers):
        mine = [tensor for tensor in tensors if tensor.info.layer == layer]
        ffn = spec.intermediate_size
        if spec.moe is not None and spec.is_sparse(layer):
            moe = spec.moe
            ffn = moe.num_experts_per_tok * moe.moe_intermediate_size
            ffn += moe.shared_expert_intermediate_size or 0
        kept = at_once * (KEPT_ATTENTION * qkv + KEPT_MLP * ffn + KEPT_HIDDEN * spec.hidden_size)
        held = states + 3 * hidden + _floats(mine)
        yield Stage(f"gradients of layer {layer}", held + FLOAT * kept)


def _losses(spec: ModelSpec, tensors: list[StoredTensor], recipe: Recipe) -> Iterator[Stage]:
    """The layers once more, each tensor tried on all grids of its menu; then embedding and head, some rows of them."""
    few = replace(recipe, num_samples=_windows(recipe, HESSIAN_TOKENS), correct_targets=False)
    for layer in range(spec.num_hidden_layers):
        mine = [tensor for tensor in tensors if tensor.info.layer == layer]
        yield CalibratedLayer(spec, layer, mine, few, True).plan().worst
    hidden = FLOAT * few.num_samples * few.seq_len * spec.hidden_size
    yield Stage("embedding and head", 2 * hidden + _piece(tensors) + FLOAT * 6 * spec.hidden_size**2)


def held_by_onnxruntime(tensors: list[StoredTensor]) -> float:
    """Bytes that onnxruntime holds of a graph with these weights."""
    return sum((PACKED_INT4 if t.kind.startswith("int4") else ONNXRUNTIME) * t.nbytes for t in tensors)


def checking(spec: ModelSpec, tensors: list[StoredTensor], tokens: int, held: float) -> Stage:
    """The check of what was written on windows of `tokens`: the reference model runs layer by layer, of experts a few
    at a time, then window by window its head, beside the runtime, which has `held` bytes of weights."""
    resident = [
        tensor for tensor in tensors if tensor.info.layer >= 0 and ".experts." not in tensor.info.name
    ]
    layers = [[t for t in resident if t.info.layer == layer] for layer in range(spec.num_hidden_layers)]
    reference = max(map(_floats, layers))
    if spec.moe is not None:
        together = len(next(groups_of_experts(spec.moe, spec.hidden_size)))
        reference += FLOAT * together * 3 * spec.moe.moe_intermediate_size * spec.hidden_size
    running = held + LOGITS * FLOAT * tokens * spec.vocab_size + _piece(tensors)
    return Stage(
        "checking what was written",
        max(reference, running),
        "give more, or leave it out with --no-verify",
    )
