"""Qwen (1) in torch, under its checkpoints' own names: one projection for queries, keys and values, and what
happens beyond the trained context (see qwen_quant.qwen1). The stages of a layer are those of every DecoderLayer.

The classes take their parents' methods, not their parameters, so their __init__ begins at nn.Module's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_quant.model.cache import KVCache
from qwen_quant.model.mlp import MLP
from qwen_quant.model.transformer import (
    DecoderLayer,
    Model,
    RMSNorm,
    Rotary,
    causal_attention,
    inverse_frequencies,
    rotate,
)
from qwen_quant.qwen1 import Qwen1Spec
from qwen_quant.spec import ModelSpec


class Qwen1Rotary(Rotary):
    """Tables whose base depends on how many tokens the text began with."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.spec, self.rope_theta = spec, spec.rope_theta

    def forward(self, start: int, length: int, prompt: int | None = None) -> tuple[Tensor, Tensor]:
        """As Rotary's; `prompt` is the number of tokens that were read first, by default all up to the last."""
        spec = self.spec
        assert spec.qwen1 is not None
        theta = spec.qwen1.rope_theta(spec.rope_theta, spec.head_dim, prompt or start + length)
        if theta != self.rope_theta:
            self.inv_freq = inverse_frequencies(replace(spec, rope_theta=theta)).to(self.inv_freq.device)
            self.rope_theta = theta
        return super().forward(start, length)


def query_scales(qwen1: Qwen1Spec, start: int, length: int, device: torch.device) -> Tensor:
    """What queries at positions start … start + length - 1 are multiplied by [length], FP32."""
    if not qwen1.use_logn_attn or start + length <= qwen1.seq_length:
        return torch.ones(length, device=device)
    counted = torch.arange(start + 1, start + length + 1, dtype=torch.float64)
    return (counted.log() / math.log(qwen1.seq_length)).clamp(min=1).float().to(device)


class Qwen1Attention(nn.Module):
    """Multi-head attention whose queries, keys and values are the thirds of one projection."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.qwen1 is not None
        self.qwen1, self.head_dim = spec.qwen1, spec.head_dim
        self.c_attn = nn.Linear(spec.hidden_size, spec.q_size + 2 * spec.kv_size, bias=spec.qkv_bias)
        self.c_proj = nn.Linear(spec.q_size, spec.hidden_size, bias=spec.output_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotation, each [batch, heads, seq, head_dim]."""
        thirds = self.c_attn(x).chunk(3, dim=-1)
        queries, keys, values = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in thirds)
        return queries, keys, values

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """Context vectors [batch, seq, q_size]: the input of c_proj."""
        queries, keys, values = self.project(x)
        queries, keys = rotate(queries, table), rotate(keys, table)
        new = queries.shape[2]
        if cache is not None:
            keys, values = cache.append(keys, values, table)
        scales = query_scales(self.qwen1, keys.shape[2] - new, new, x.device)
        return causal_attention(queries * scales[:, None], keys, values)


class Qwen1MLP(MLP):
    """SwiGLU as c_proj(w1(x) * silu(w2(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        nn.Module.__init__(self)
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.c_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def gated(self, x: Tensor) -> Tensor:
        """w1(x) * silu(w2(x)) [..., intermediate]: the input of c_proj."""
        return self.w1(x) * F.silu(self.w2(x))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden]"""
        return self.c_proj(self.gated(x))


class Qwen1Layer(DecoderLayer):
    """One decoder layer."""

    def __init__(self, spec: ModelSpec) -> None:
        nn.Module.__init__(self)
        self.ln_1 = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.attn = Qwen1Attention(spec)
        self.ln_2 = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = Qwen1MLP(spec.hidden_size, spec.intermediate_size)

    def attention_input(self, hidden: Tensor) -> Tensor:
        """What c_attn reads."""
        return self.ln_1(hidden)

    @property
    def attention(self) -> Qwen1Attention:  # type: ignore[override]
        """As DecoderLayer's."""
        return self.attn

    def attend(self, x: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """What the attention's c_proj reads, from what c_attn reads."""
        return self.attn(x, table, cache)

    def attention_output(self, context: Tensor) -> Tensor:
        """What the attention adds to the hidden states, from what c_proj reads."""
        return self.attn.c_proj(context)

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """What w1 and w2 read."""
        return self.ln_2(hidden)


class Qwen1Decoder(nn.Module):
    """Embedding, layers and final norm: the checkpoints' `transformer.` prefix."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.wte = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.h = nn.ModuleList(Qwen1Layer(spec) for _ in range(spec.num_hidden_layers))
        self.ln_f = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Qwen1Model(Model):
    """The causal language model."""

    rotary: Qwen1Rotary

    def __init__(self, spec: ModelSpec) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        self.transformer = Qwen1Decoder(spec)
        self.rotary = Qwen1Rotary(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def parts(self) -> tuple[nn.Embedding, nn.ModuleList, RMSNorm]:
        """Embedding, layers and final norm."""
        return self.transformer.wte, self.transformer.h, self.transformer.ln_f

    def table(self, past: int, new: int, caches: list[KVCache] | None) -> tuple[Tensor, Tensor]:
        """Rotary tables of `new` tokens after `past` others, which `caches` hold."""
        first = caches[0] if caches else None
        return self.rotary(past, new, None if first is None else first.prompt)
