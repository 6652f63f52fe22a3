"""The key-value part of a GGUF file: what a reader needs to build model and tokenizer, and our recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from qwen_quant import __version__
from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import CheckpointError, FormatError
from qwen_quant.exporters.gguf_mixes import MIXES
from qwen_quant.grids.kv_file import as_arrays
from qwen_quant.grids.kv_layout import KVCacheSpec
from qwen_quant.moe import MoESpec
from qwen_quant.rope import RopeScaling, yarn_attention_factor
from qwen_quant.spec import ModelSpec
from qwen_quant.tokenizer import UNUSED, Tokenizer


def add_metadata(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    file_type: str,
    record: Mapping[str, Any],
) -> None:
    """Add every key to `writer`. `record` (the recipe) goes under `qwen_quant.*`.

    Raises CheckpointError when tokenizer and weights do not belong together, FormatError when the tokenizer
    cuts text in a way that GGUF readers do not know.
    """
    _add_general(writer, checkpoint, file_type)
    _add_architecture(writer, checkpoint.spec)
    _add_tokenizer(writer, checkpoint, tokenizer)
    for key, value in {"version": __version__, **record}.items():
        _add_value(writer, f"qwen_quant.{key}", value)


def add_kv_layout(writer: gguf.GGUFWriter, checkpoint: Checkpoint, layout: KVCacheSpec) -> None:
    """The layout of the KV cache under `qwen_quant.kv_cache.*`, the arrays of `as_arrays` flattened."""
    spec = checkpoint.spec
    for name, array in as_arrays(layout, spec.num_key_value_heads, spec.head_dim).items():
        writer.add_array(f"qwen_quant.kv_cache.{name}", array.ravel().tolist())


def _add_general(writer: gguf.GGUFWriter, checkpoint: Checkpoint, file_type: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_model_name(checkpoint))
    writer.add_size_label(_size_label(checkpoint.spec))
    writer.add_quantized_by(f"qwen-quant {__version__}")
    writer.add_file_type(MIXES[file_type].code)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _size_label(spec: ModelSpec) -> str:
    """As `596M` or `128x0.2B`: experts are counted apart from what all tokens share."""
    infos = spec.tensors()
    total = sum(math.prod(info.shape) for info in infos)
    experts = 0 if spec.moe is None else spec.moe.num_experts
    routed = sum(math.prod(info.shape) for info in infos if info.expert >= 0) // max(1, experts)
    return gguf.size_label(total, total - routed * experts, routed, experts)


def architecture(spec: ModelSpec) -> str:
    """llama.cpp's name of the family: `qwen3moe` for Hugging Face's `qwen3_moe`."""
    return spec.model_type.replace("_", "")


def _model_name(checkpoint: Checkpoint) -> str:
    """The name the checkpoint gives itself, else its folder's."""
    stored = checkpoint.spec.config.get("_name_or_path")
    name = Path(stored).name if isinstance(stored, str) else ""
    return name or checkpoint.folder.resolve().name


def _add_architecture(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_context_length(spec.plain_context)
    writer.add_embedding_length(spec.hidden_size)
    # Qwen (1) counts w1 and w2 together, in config.json as in GGUF.
    writer.add_feed_forward_length(spec.intermediate_size * (1 if spec.qwen1 is None else 2))
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    if spec.rope_scaling is not None:
        _add_rope_scaling(writer, spec.rope_scaling)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    if spec.moe is not None:
        writer.add_expert_count(spec.moe.num_experts)
        writer.add_expert_used_count(spec.moe.num_experts_per_tok)
        writer.add_expert_feed_forward_length(spec.moe.moe_intermediate_size)
        if spec.moe.shared_expert_intermediate_size is not None:
            writer.add_expert_shared_feed_forward_length(spec.moe.shared_expert_intermediate_size)
    writer.add_vocab_size(spec.vocab_size)


def _add_rope_scaling(writer: gguf.GGUFWriter, scaling: RopeScaling) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        # Readers multiply by the paper's own factor.
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / yarn_attention_factor(scaling.factor))


def check_expressible(checkpoint: Checkpoint) -> None:
    """Raise FormatError for what llama.cpp would leave out without a word when it runs a file of this architecture."""
    spec = checkpoint.spec
    if spec.moe is not None:
        _check_experts(checkpoint, spec.moe)
    if spec.qwen1 is not None and spec.tie_word_embeddings:
        raise FormatError(
            f"{checkpoint.folder}: tie_word_embeddings is true; llama.cpp's {architecture(spec)} has a head of its "
            "own: store the embedding a second time as lm_head.weight and set tie_word_embeddings to false"
        )
    if spec.output_bias:
        raise FormatError(
            f"{checkpoint.folder}: attention_bias is true, but GGUF's {architecture(spec)} has no place for the bias "
            "of o_proj: use qwen-quant gptq"
        )
    if spec.sliding_window is not None and spec.sliding_window < spec.context_length:
        raise FormatError(
            f"{checkpoint.folder}: sliding_window {spec.sliding_window} is active in {len(spec.sliding_layers)} "
            f"layers; GGUF's {architecture(spec)} has no window: set use_sliding_window to false to attend fully, "
            f"or max_position_embeddings to {spec.sliding_window}"
        )
    scaling = spec.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return
    for key, value, fixed in (
        ("beta_fast", scaling.beta_fast, 32.0),
        ("beta_slow", scaling.beta_slow, 1.0),
        ("truncate", scaling.truncate, True),
    ):
        if value != fixed:
            raise FormatError(
                f"{checkpoint.folder}: rope_scaling has {key} {value!r}; llama.cpp runs {architecture(spec)} files "
                f"with {fixed!r} whatever they say: use qwen-quant gptq, or set {key} to {fixed!r}"
            )


def _check_experts(checkpoint: Checkpoint, moe: MoESpec) -> None:
    """llama.cpp's qwen2moe and qwen3moe have no key for these."""
    spec = checkpoint.spec
    if len(moe.sparse_layers) != spec.num_hidden_layers:
        raise FormatError(
            f"{checkpoint.folder}: only {len(moe.sparse_layers)} of {spec.num_hidden_layers} layers have experts "
            f"(decoder_sparse_step, mlp_only_layers); llama.cpp's {architecture(spec)} has them in every layer: "
            "use qwen-quant gptq"
        )
    fixed = spec.model_type == "qwen3_moe"
    if moe.norm_topk_prob != fixed:
        raise FormatError(
            f"{checkpoint.folder}: norm_topk_prob is {str(moe.norm_topk_prob).lower()}; llama.cpp runs "
            f"{architecture(spec)} files with {str(fixed).lower()} whatever they say: use qwen-quant gptq"
        )


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    size = checkpoint.spec.vocab_size
    if tokenizer.vocab_size > size:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding "
            f"{size} rows; tokenizer and weights do not belong together"
        )
    padding = range(tokenizer.vocab_size, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre_tokenizer_name())
    writer.add_token_list([*tokenizer.tokens, *(f"[PAD{i}]" for i in padding)])
    writer.add_token_types([*tokenizer.token_types, *(UNUSED for _ in padding)])
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    named = {key: tokenizer.token_id(spelling) for key, spelling in tokenizer.named_tokens.items()}
    end_of_text, end_of_turn = tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<|im_end|>")
    ids = {
        gguf.Keys.Tokenizer.BOS_ID: _first(
            named.get("bos_token"), checkpoint.spec.config.get("bos_token_id"), end_of_text
        ),
        gguf.Keys.Tokenizer.EOS_ID: _first(*tokenizer.eos_ids),
        gguf.Keys.Tokenizer.EOT_ID: end_of_turn,
        gguf.Keys.Tokenizer.PAD_ID: _first(named.get("pad_token"), end_of_text),
    }
    for key, token in ids.items():
        if token is not None:
            writer.add_uint32(key, token)
    writer.add_array("qwen_quant.eos_token_ids", list(tokenizer.eos_ids))
    writer.add_add_bos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _first(*candidates: Any) -> int | None:
    """The first that is a token id."""
    return next((c for c in candidates if isinstance(c, int) and c >= 0), None)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int) and -(2**63) <= value < 2**63:
        writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float64(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_string(key, json.dumps(value, ensure_ascii=False, sort_keys=True, default=str))
