"""Tiny random Qwen models as GGUF files, beside transformers' models with the same (decoded) weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

N_VOCAB = 96

RENAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def attention_with_half_cache(module, query, key, value, *args, **kwargs):  # type: ignore[no-untyped-def]
    """transformers' attention with keys and values rounded to FP16, as the engine's cache holds them."""
    return eager_attention_forward(module, query, key.half().float(), value.half().float(), *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register("half_cache", attention_with_half_cache)
ALL_MASK_ATTENTION_FUNCTIONS.register("half_cache", eager_mask)


@dataclass
class TinyModel:
    """A file, and the model it has to agree with."""

    path: Path
    reference: PreTrainedModel

    def reference_logits(self, tokens: np.ndarray) -> np.ndarray:  # [T] -> [T, V]
        with torch.no_grad():
            return self.reference(torch.from_numpy(tokens)[None].long()).logits[0].numpy()


def build_reference(
    architecture: str, tied: bool, head_dim: int, seed: int, rope: dict[str, Any]
) -> PreTrainedModel:
    common = {
        "vocab_size": N_VOCAB,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "attn_implementation": "half_cache",
    }
    torch.manual_seed(seed)
    if architecture == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=head_dim))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=1.0)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5 * 1.5)
    return model.float().eval()


def write_header(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_token_list([f"t{i}" for i in range(N_VOCAB - 2)] + ["<|endoftext|>", "<|im_end|>"])
    writer.add_eos_token_id(N_VOCAB - 1)


def write_rope_scaling(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    """The keys for transformers' rope parameters; attn_factor comes on top of YaRN's own factor."""
    if "rope_type" not in rope:
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "attention_factor" in rope:
        own = 0.1 * math.log(rope["factor"]) + 1
        writer.add_rope_scaling_attn_factors(rope["attention_factor"] / own)
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if "beta_slow" in rope:
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def write_model(
    path: Path,
    architecture: str,
    tensor_type: str,
    *,
    tied: bool,
    head_dim: int,
    rope: dict[str, Any],
) -> TinyModel:
    model = build_reference(architecture, tied, head_dim, seed=5, rope=rope)
    writer = gguf.GGUFWriter(path, architecture)
    write_header(writer, model)
    write_rope_scaling(writer, rope)
    quantization = gguf.GGMLQuantizationType[tensor_type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for hf_name, gguf_name in RENAMES.items():
                name = name.replace(hf_name, gguf_name)
            if parameter.ndim == 1:
                writer.add_tensor(name, parameter.numpy())
                continue
            stored = gguf.quants.quantize(parameter.numpy(), quantization)
            writer.add_tensor(name, stored, raw_dtype=quantization)
            decoded = gguf.quants.dequantize(stored, quantization).reshape(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(decoded)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, model)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny_model(architecture, type, tied=..., head_dim=..., rope=...), each made once.

    `rope` holds transformers' rope parameters beyond the base.
    """
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[tuple[object, ...], TinyModel] = {}

    def get(
        architecture: str,
        tensor_type: str,
        *,
        tied: bool = True,
        head_dim: int = 32,
        rope: dict[str, Any] | None = None,
    ) -> TinyModel:
        key = (architecture, tensor_type, tied, head_dim, *(rope or {}).items())
        if key not in made:
            path = folder / f"{len(made)}-{architecture}-{tensor_type}.gguf"
            made[key] = write_model(
                path, architecture, tensor_type, tied=tied, head_dim=head_dim, rope=rope or {}
            )
        return made[key]

    return get
