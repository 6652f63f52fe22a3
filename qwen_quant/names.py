"""What checkpoints call the modules of a decoder: Qwen2 and all later families alike, Qwen (1) in its own way."""

from __future__ import annotations

from dataclasses import dataclass

HEAD = "lm_head"


@dataclass(frozen=True)
class Names:
    """Modules outside the layers (full names) and of one layer (after `layer(index)`).

    `qkv` reads one input together, `mlp` is gate, up and down of a layer without experts.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    layers: str = "model.layers"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    def layer(self, index: int) -> str:
        """What the names of layer `index` begin with."""
        return f"{self.layers}.{index}."


HUGGING_FACE = Names()
# One projection for queries, keys and values; w2 is the gate, because the model computes w1(x) * silu(w2(x)).
QWEN1 = Names(
    embedding="transformer.wte",
    norm="transformer.ln_f",
    layers="transformer.h",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    output="attn.c_proj",
    mlp_norm="ln_2",
    mlp=("mlp.w2", "mlp.w1", "mlp.c_proj"),
)
