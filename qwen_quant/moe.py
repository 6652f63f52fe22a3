"""Mixtures of experts: which layers of a Qwen2-MoE or Qwen3-MoE are sparse, and their tensors."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_quant.config import ConfigReader
from qwen_quant.errors import ConfigError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MOST_EXPERTS = 4096  # a damaged count must not become an inventory of millions of tensors


@dataclass(frozen=True)
class MoESpec:
    """The numbers of a sparse block: a token's output is the sum over its `num_experts_per_tok` best experts,
    weighted by the router's softmax over all experts (`norm_topk_prob`: rescaled so that they sum to 1)."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int | None  # None: the family has no shared expert
    norm_topk_prob: bool
    sparse_layers: tuple[int, ...]


def read_moe(get: ConfigReader, layers: int, shared: bool) -> MoESpec:
    """The experts of a config. Raises ConfigError naming the key for what cannot be."""
    # transformers 5 writes num_local_experts for Qwen3-MoE.
    key = "num_experts" if get.config.get("num_local_experts") is None else "num_local_experts"
    experts = get.positive(key, most=MOST_EXPERTS)
    active = get.positive("num_experts_per_tok")
    if active > experts:
        raise ConfigError(f"{get.where}: num_experts_per_tok {active} is more than {key} {experts}")
    step = get.positive("decoder_sparse_step", 1)
    dense = get.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"{get.where}: mlp_only_layers is {dense!r}; it must be a list of layer numbers")
    return MoESpec(
        num_experts=experts,
        num_experts_per_tok=active,
        moe_intermediate_size=get.positive("moe_intermediate_size"),
        shared_expert_intermediate_size=get.positive("shared_expert_intermediate_size") if shared else None,
        norm_topk_prob=get.flag("norm_topk_prob"),
        sparse_layers=tuple(i for i in range(layers) if (i + 1) % step == 0 and i not in dense),
    )


def expert_name(layer: int, expert: int, projection: str) -> str:
    """The name of one expert's weight."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


@dataclass(frozen=True)
class Fused:
    """A tensor that newer transformers writes for all experts of a layer: its `parts` (name and shape) lie in it
    one after the other."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]


def fused_tensors(moe: MoESpec, hidden_size: int, layer: int) -> tuple[Fused, Fused]:
    """The two fused tensors of a layer; in the first an expert's gate lies before its up."""
    count, size = moe.num_experts, moe.moe_intermediate_size
    prefix = f"model.layers.{layer}.mlp.experts"
    first = [(e, name) for e in range(count) for name in PROJECTIONS[:2]]
    return (
        Fused(
            f"{prefix}.gate_up_proj",
            (count, 2 * size, hidden_size),
            tuple((expert_name(layer, e, name), (size, hidden_size)) for e, name in first),
        ),
        Fused(
            f"{prefix}.down_proj",
            (count, hidden_size, size),
            tuple((expert_name(layer, e, PROJECTIONS[2]), (hidden_size, size)) for e in range(count)),
        ),
    )
