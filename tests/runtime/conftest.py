"""Tiny random Qwen models as GGUF files, beside transformers' models with the same (decoded) weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from qwen_quant.grids.gguf import gguf_grid

N_VOCAB = 96

# Qwen 1 is a Qwen2 whose key/value heads are not shared; the two differ in how a file stores them.
CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen": (Qwen2Config, Qwen2ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen2moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "qwen": {"num_key_value_heads": 4},
    "qwen2moe": {**EXPERTS, "shared_expert_intermediate_size": 160},
    "qwen3moe": {**EXPERTS, "norm_topk_prob": True},
}

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
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
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


def build_reference(architecture: str, seed: int, changes: dict[str, Any]) -> PreTrainedModel:
    config = {
        "vocab_size": N_VOCAB,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "attn_implementation": "half_cache",
        **OF_ARCHITECTURE.get(architecture, {}),
        **changes,
    }
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[architecture]
    model: PreTrainedModel = model_class(config_class(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=1.0)
            else:
                # Clear choices of experts, or int8 activations would now and then lead to other ones.
                factor = 4.5 if name.endswith("mlp.gate.weight") else 1.5
                parameter.normal_(std=parameter.shape[-1] ** -0.5 * factor)
    return model.float().eval()


def stored_tensors(architecture: str, model: PreTrainedModel) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """GGUF names, and the parameters (or parts of them) whose rows follow one another in that tensor."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        gguf_name = name
        for theirs, ours in RENAMES.items():
            gguf_name = gguf_name.replace(theirs, ours)
        if name.endswith("experts.gate_up_proj"):
            layer = gguf_name.removesuffix(".mlp.experts.gate_up_proj")
            gate, up = parameter.chunk(2, dim=1)
            yield f"{layer}.ffn_gate_exps.weight", [gate]
            yield f"{layer}.ffn_up_exps.weight", [up]
        elif architecture == "qwen" and "q_proj" in name:
            three = [parameters[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            yield gguf_name.replace("attn_q", "attn_qkv"), three
        elif architecture != "qwen" or ("k_proj" not in name and "v_proj" not in name):
            yield gguf_name, [parameter[0] if "shared_expert_gate" in name else parameter]


def write_header(writer: gguf.GGUFWriter, architecture: str, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    # Qwen 1 counts gate and up together.
    writer.add_feed_forward_length(config.intermediate_size * (2 if architecture == "qwen" else 1))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture.endswith("moe"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if architecture == "qwen2moe":
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
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


def stored_and_decoded(values: np.ndarray, tensor_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [..., K] as a file stores them, and what the gguf package reads from that."""
    quantization = gguf.GGMLQuantizationType[tensor_type]
    try:
        stored = gguf.quants.quantize(values, quantization)
    except NotImplementedError:  # the package only reads them
        grid, rows = gguf_grid(tensor_type), values.reshape(-1, values.shape[-1])
        stored = grid.pack(grid.plain_rounding(rows)).reshape(*values.shape[:-1], -1)
    return stored, np.array(gguf.quants.dequantize(stored, quantization)).reshape(values.shape)


def write_model(
    path: Path,
    architecture: str,
    tensor_type: str,
    rope: dict[str, Any],
    types: dict[str, str],
    changes: dict[str, Any],
) -> TinyModel:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    model = build_reference(architecture, 5, {"rope_parameters": parameters, **changes})
    writer = gguf.GGUFWriter(path, architecture)
    write_header(writer, architecture, model)
    write_rope_scaling(writer, rope)
    with torch.no_grad():
        for name, parts in stored_tensors(architecture, model):
            values = torch.cat(parts).numpy()
            if values.ndim == 1 or "ffn_gate_inp" in name:
                writer.add_tensor(name, values)
                continue
            chosen = next((own for part, own in types.items() if part in name), tensor_type)
            stored, decoded = stored_and_decoded(values, chosen)
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[chosen])
            pieces = torch.from_numpy(decoded).split([len(part) for part in parts])
            for part, new in zip(parts, pieces, strict=True):
                part.copy_(new)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, model)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny_model(architecture, type, tied=..., head_dim=..., rope=..., other config fields), each made once.

    `rope` holds transformers' rope parameters beyond the base; head_dim is for Qwen3, Qwen 1 is never tied. `types`
    gives other types to tensors by parts of their names.
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
        types: dict[str, str] | None = None,
        **changes: Any,
    ) -> TinyModel:
        rope, types = rope or {}, types or {}
        key = (architecture, tensor_type, tied, head_dim, *rope.items(), *types.items(), *changes.items())
        if key not in made:
            path = folder / f"{len(made)}-{architecture}-{tensor_type}.gguf"
            changes["tie_word_embeddings"] = tied and architecture != "qwen"
            if architecture.startswith("qwen3"):
                changes["head_dim"] = head_dim
            made[key] = write_model(path, architecture, tensor_type, rope, types, changes)
        return made[key]

    return get
