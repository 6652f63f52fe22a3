"""Every Qwen as one config-driven decoder, with Hugging Face's parameter names.

Shapes: hidden states [batch, seq, hidden]; heads [batch, n_heads, seq, head_dim]. Rotary tables, the norms'
sums and softmax are FP32. The layer is split at the inputs of its linear parts (`attention_input`, `attend`,
`mlp_input`, and `gated` of each SwiGLU), because the quantizer needs each of them once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_quant.model import dual_chunk
from qwen_quant.model.cache import KVCache, split_at_stretches
from qwen_quant.model.mlp import MLP, SparseMLP
from qwen_quant.spec import ModelSpec


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rotary(nn.Module):
    """Tables of rotary position embeddings (Su et al. 2021, arXiv:2104.09864), half-split as in GPT-NeoX."""

    inv_freq: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(spec), persistent=False)  # [head_dim / 2]
        self.scale = 1.0 if spec.rope_scaling is None else spec.rope_scaling.attention_factor
        self.dual_chunk = spec.dual_chunk

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin for positions start … start + length - 1, each [length, head_dim], FP32.

        With dual chunk attention each [3, length, head_dim]: see dual_chunk.query_positions.
        """
        positions = torch.arange(start, start + length, device=self.inv_freq.device, dtype=torch.float32)
        if self.dual_chunk is not None:
            positions = dual_chunk.query_positions(self.dual_chunk, positions)
        angles = positions[..., None] * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scale, angles.sin() * self.scale


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Radians per position [head_dim / 2], FP32, with the spec's context extension (see RopeScaling)."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    # The reciprocal, not theta**-exponents, and the rest in transformers' order: last bits count far out.
    periods = spec.rope_theta**exponents
    kept = 1.0 / periods
    scaling = spec.rope_scaling
    if scaling is None:
        return kept
    if scaling.kind == "linear":
        return kept / scaling.factor
    first, last = scaling.blended(spec.rope_theta, spec.head_dim)
    width = last - first or 0.001  # equal ends: a step
    ramp = (torch.arange(spec.head_dim // 2, dtype=torch.float32) - first) / width
    share = 1 - ramp.clamp(0, 1)  # of the kept frequency
    return (1.0 / (scaling.factor * periods)) * (1 - share) + kept * share


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embeddings to x [batch, heads, seq, head_dim]."""
    cos, sin = table
    wide, half = x.float(), x.shape[-1] // 2
    # Each half in its place: a copy of x with its halves exchanged takes longer than all else here.
    turned = wide * cos
    turned[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with optional Q/K/V bias (Qwen2) and per-head Q/K norms (Qwen3).

    With a `window` a token attends to that many positions only, its own included.
    """

    def __init__(self, spec: ModelSpec, window: int | None = None) -> None:
        super().__init__()
        self.spec, self.window, self.head_dim = spec, window, spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, spec.q_size, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, spec.kv_size, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, spec.kv_size, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(spec.q_size, spec.hidden_size, bias=spec.output_bias)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)

    def _heads(self, x: Tensor, n_heads: int) -> Tensor:
        """[batch, seq, n_heads * head_dim] as [batch, seq, n_heads, head_dim]."""
        return x.unflatten(-1, (n_heads, self.spec.head_dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotation, each [batch, heads, seq, head_dim]."""
        spec = self.spec
        queries = self._heads(self.q_proj(x), spec.num_attention_heads)
        keys = self._heads(self.k_proj(x), spec.num_key_value_heads)
        values = self._heads(self.v_proj(x), spec.num_key_value_heads)
        if spec.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """Context vectors [batch, seq, q_size]: the input of o_proj."""
        dual = self.spec.dual_chunk
        queries, keys, values = self.project(x)
        near = table if dual is None else (table[0][0], table[1][0])
        keys = rotate(keys, near)
        if cache is not None:
            keys, values = cache.append(keys, values, near)
        if dual is not None and keys.shape[2] > min(dual.chunk_len, dual.exact_length):
            turned = rotate(queries, (table[0][:, None, None], table[1][:, None, None]))
            return dual_chunk.attend(dual, turned, keys, values).transpose(1, 2).flatten(2)
        return causal_attention(rotate(queries, near), keys, values, self.window)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, window: int | None = None) -> Tensor:
    """Context vectors [batch, seq, q_size] of the last `seq` tokens; keys and values are of all so far.

    With a `window` a token attends to that many positions only, its own included.
    """
    new, total = queries.shape[2], keys.shape[2]
    mask = None
    windowed = window is not None and window < total
    if windowed or 1 < new < total:  # row i is position total - new + i and sees what lies up to it
        mask = torch.ones(new, total, dtype=torch.bool, device=queries.device).tril(total - new)
    if mask is not None and window is not None:
        mask = mask.triu(total - new - window + 1)
    grouped = queries.shape[1] != keys.shape[1]
    context = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None and new > 1, enable_gqa=grouped
    )
    return context.transpose(1, 2).flatten(2)


class DecoderLayer(nn.Module):
    """One decoder layer; `forward` composes the stages that the quantizer also calls one by one."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(spec, spec.window(index))
        if spec.moe is not None and spec.is_sparse(index):
            self.mlp: MLP | SparseMLP = SparseMLP(spec.hidden_size, spec.moe)
        else:
            self.mlp = MLP(spec.hidden_size, spec.intermediate_size)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def attention_input(self, hidden: Tensor) -> Tensor:
        """What q_proj, k_proj and v_proj read."""
        return self.input_layernorm(hidden)

    @property
    def attention(self) -> Attention:
        """The module between `attention_input` and `attention_output`, which has `project`."""
        return self.self_attn

    def attend(self, x: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """What o_proj reads, from what q_proj, k_proj and v_proj read."""
        return self.self_attn(x, table, cache)

    def attention_output(self, context: Tensor) -> Tensor:
        """What the attention adds to the hidden states, from what o_proj reads."""
        return self.self_attn.o_proj(context)

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """What gate_proj and up_proj read, and the router."""
        return self.post_attention_layernorm(hidden)

    def forward(
        self, hidden: Tensor, table: tuple[Tensor, Tensor], cache: KVCache | None = None
    ) -> Tensor:  # [batch, seq, hidden]
        context = self.attend(self.attention_input(hidden), table, cache)
        hidden = hidden + self.attention_output(context)
        return hidden + self.mlp(self.mlp_input(hidden))


class Decoder(nn.Module):
    """Embedding, layers and final norm: Hugging Face's `model.` prefix."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer) for layer in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Model(nn.Module):
    """A causal language model; `state_dict` has exactly the names of a Hugging Face checkpoint."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Decoder(spec)
        self.rotary = Rotary(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def new_cache(self) -> list[KVCache]:
        """An empty cache for each layer."""
        return [KVCache() for _ in range(self.spec.num_hidden_layers)]

    def parts(self) -> tuple[nn.Embedding, nn.ModuleList, RMSNorm]:
        """Embedding, layers and final norm."""
        return self.model.embed_tokens, self.model.layers, self.model.norm

    def table(self, past: int, new: int, caches: list[KVCache] | None) -> tuple[Tensor, Tensor]:
        """Rotary tables of `new` tokens after `past` others, which `caches` hold."""
        return self.rotary(past, new)

    def hidden_states(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Final-norm outputs [batch, seq, hidden] of tokens [batch, seq], after what `caches` hold."""
        pieces = split_at_stretches(tokens, caches) if caches else [tokens]
        return torch.cat([self._hidden_states(piece, caches) for piece in pieces], dim=1)

    def _hidden_states(self, tokens: Tensor, caches: list[KVCache] | None) -> Tensor:
        past = 0 if caches is None else caches[0].length
        embedding, layers, norm = self.parts()
        hidden = embedding(tokens)
        table = self.table(past, tokens.shape[1], caches)
        for index, layer in enumerate(layers):
            hidden = layer(hidden, table, None if caches is None else caches[index])
        return norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of final-norm outputs."""
        embedding, _, _ = self.parts()
        return F.linear(hidden, (embedding if self.spec.tie_word_embeddings else self.lm_head).weight)

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Logits [batch, seq, vocab]."""
        return self.head(self.hidden_states(tokens, caches))
