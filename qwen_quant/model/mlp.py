"""The feed-forward part of a decoder layer: one SwiGLU, or experts of which each token has its own few.

Shapes: hidden states [..., hidden]; tokens [T, hidden] where experts take turns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_quant.moe import MoESpec


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate(x)) * up(x) [..., intermediate]: the input of down_proj."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden]"""
        return self.down_proj(self.gated(x))


class SparseMLP(nn.Module):
    """Experts: each token goes through its best few, weighted by the router's softmax (Shazeer et al. 2017,
    arXiv:1701.06538); Qwen2-MoE adds an expert that sees every token, times a sigmoid gate of its own."""

    def __init__(self, hidden_size: int, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe
        self.gate = nn.Linear(hidden_size, moe.num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(hidden_size, moe.moe_intermediate_size) for _ in range(moe.num_experts)
        )
        if moe.shared_expert_intermediate_size is not None:
            self.shared_expert = MLP(hidden_size, moe.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of tokens x [T, hidden] and their weights, both [T, num_experts_per_tok]."""
        probabilities = torch.softmax(self.gate(x).float(), dim=-1)
        weights, experts = probabilities.topk(self.moe.num_experts_per_tok, dim=-1)
        if self.moe.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden]"""
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            rows, ranks = torch.where(chosen == index)
            self.add_expert(out, index, tokens[rows], rows, weights[rows, ranks])
        self.add_shared(out, tokens)
        return out.view_as(x)

    def add_expert(self, out: Tensor, index: int, x: Tensor, rows: Tensor, weights: Tensor) -> None:
        """Add to `rows` of out [T, hidden] what an expert makes of x [rows, hidden], times `weights` [rows]."""
        out.index_add_(0, rows, self.experts[index](x) * weights[:, None])

    def add_shared(self, out: Tensor, tokens: Tensor) -> None:
        """Add to out [T, hidden] what the shared expert makes of all tokens [T, hidden], where there is one."""
        if self.moe.shared_expert_intermediate_size is not None:
            out += torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
