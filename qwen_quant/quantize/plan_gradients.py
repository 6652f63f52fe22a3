"""What taking gradients needs (gradients.py), for a budget (sensitivity.py) or for rows that make up for each other
(row_moments.py): memory in FP32 values, with the names of plan_layer.py, and operations.

gradients     hidden states of G tokens at every layer and their gradient (unless they lie in files), all weights of a
              layer (experts too), and what its backward pass keeps of B tokens; or the head [vocab, H], as it is read
              and in FP32
moments       N² of the N rows of some weights; while a layer is passed three times more of its largest, while rows are
              solved twice more beside what they miss and the weights in another order, 4·N·K
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen_quant.quantize.gradients import POSITIONS
from qwen_quant.quantize.inputs import TOKENS_AT_ONCE
from qwen_quant.quantize.plan_layer import FLOAT, Stage, Work, largest
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.row_moments import gradient_windows, linears
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.spec import ModelSpec

# Floats for each output of a token's projections that the backward pass of a layer keeps or makes.
KEPT_ATTENTION, KEPT_MLP, KEPT_HIDDEN = 5, 6, 8
HEAD = 1.5  # floats for each weight of the head while it is read


def gradient_stages(
    spec: ModelSpec, tensors: list[StoredTensor], seq_len: int, tokens: int, spill: bool = False
) -> Iterator[Stage]:
    """Forward through all layers, the head, and backward."""
    at_once = min(tokens, max(seq_len, TOKENS_AT_ONCE))
    hidden = 0 if spill else FLOAT * tokens * spec.hidden_size
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
        weights = sum(tensor.weights for tensor in mine) + largest(
            mine
        )  # one is read while the others are there
        yield Stage(f"gradients of layer {layer}", states + 3 * hidden + FLOAT * (weights + kept))


def moment_stage(spec: ModelSpec, tensors: list[StoredTensor], recipe: Recipe, spill: bool) -> Stage:
    """The worst moment of measuring moments for a run of `recipe`."""
    tokens = gradient_tokens(spec, recipe)
    worst = max(gradient_stages(spec, tensors, recipe.seq_len, tokens, spill), key=lambda stage: stage.nbytes)
    sums = max(sum(mine.values()) + 3 * max(mine.values()) for mine in _moments(spec, tensors))
    return Stage(worst.name, worst.nbytes + FLOAT * sums)


def moment_bytes(spec: ModelSpec, tensors: list[StoredTensor]) -> float:
    """The moments of all layers."""
    return FLOAT * sum(sum(mine.values()) for mine in _moments(spec, tensors))


def state_bytes(spec: ModelSpec, recipe: Recipe) -> float:
    """The hidden states of all layers, and their gradient."""
    return FLOAT * (spec.num_hidden_layers + 2) * gradient_tokens(spec, recipe) * spec.hidden_size


def gradient_tokens(spec: ModelSpec, recipe: Recipe) -> int:
    """How many tokens gradients are taken of."""
    return gradient_windows(spec, recipe.num_samples, recipe.seq_len) * recipe.seq_len


def moment_work(spec: ModelSpec, tensors: list[StoredTensor], recipe: Recipe) -> Work:
    """Measuring moments: products with each weight (of experts those that a token goes to), and of the gradients; and
    what rows that make up for each other take besides being solved."""
    tokens = gradient_tokens(spec, recipe)
    share = 1.0 if spec.moe is None else spec.moe.num_experts_per_tok / spec.moe.num_experts
    inside = [tensor for tensor in tensors if tensor.info.layer >= 0]
    active = sum(t.weights * (share if ".experts." in t.info.name else 1.0) for t in inside)
    # Forward, forward once more and back; logits, and back from them.
    work = Work(matmul=2 * tokens * (3 * active + 2 * spec.vocab_size * spec.hidden_size))
    for tensor in inside:
        if _linear(tensor) in linears(spec):
            n, k = tensor.info.shape
            work += Work(matmul=2 * tokens * n**2 + n**2 * k, factor=n**3 / 3)
    return work + Work(transferred=4 * sum(tensor.weights for tensor in inside))


def _moments(spec: ModelSpec, tensors: list[StoredTensor]) -> list[dict[str, int]]:
    """How many numbers the moments of each weight are, by layer."""
    found: list[dict[str, int]] = [{"": 0} for _ in range(spec.num_hidden_layers)]
    for tensor in tensors:
        if tensor.info.layer >= 0 and _linear(tensor) in linears(spec):
            found[tensor.info.layer][tensor.info.name] = tensor.info.shape[0] ** 2
    return found


def _linear(tensor: StoredTensor) -> str:
    return tensor.info.name.split(".", 3)[-1].removesuffix(".weight")
