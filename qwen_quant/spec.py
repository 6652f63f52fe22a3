"""ModelSpec: what a Qwen checkpoint is, read from `config.json`, and the inventory of its tensors.

Field names are Hugging Face's. Anything that would change the arithmetic and is not understood is an error
that names the key: a wrong guess would only show as a slightly worse model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_quant.config import MOST_LAYERS, ConfigReader
from qwen_quant.dual_chunk import DualChunk, read_dual_chunk
from qwen_quant.errors import ConfigError
from qwen_quant.fixed import FIXED, check_fixed
from qwen_quant.moe import PROJECTIONS, MoESpec, expert_name, read_moe
from qwen_quant.names import HEAD, HUGGING_FACE, QWEN1, Names
from qwen_quant.qwen1 import Qwen1Spec, read_qwen1
from qwen_quant.rope import RopeScaling, read_rope
from qwen_quant.window import read_window

ARCHITECTURES = {
    "QWenLMHeadModel": "qwen",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
QWEN3_HEAD_DIM = 128  # of a Qwen3 config.json without head_dim, whatever its hidden_size


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint. `role`: embedding, head, norm, bias, router (which experts, how much of each) or
    linear; `layer`: -1 outside layers; `expert`: -1 outside experts."""

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int = -1
    expert: int = -1


@dataclass(frozen=True)
class ModelSpec:
    """A decoder, dense or with experts: the numbers that fix its arithmetic and the shapes of its tensors."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    rope_scaling: RopeScaling | None = None
    dual_chunk: DualChunk | None = None
    sliding_window: int | None = None  # positions that `sliding_layers` attend to, the token's own included
    sliding_layers: tuple[int, ...] = ()
    moe: MoESpec | None = None
    qwen1: Qwen1Spec | None = None
    torch_dtype: str = "bfloat16"
    eos_token_id: tuple[int, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelSpec:
        """Read `folder/config.json`. Raises ConfigError when it is missing, not JSON, or of another model."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: not found; MODEL must be a Hugging Face checkpoint folder with config.json"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path}: cannot be read as JSON ({reason}); download it again") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: holds no JSON object; download it again")
        return cls.from_config(config, str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
        """Build the spec from a parsed `config.json`; `where` names the file in errors."""
        get = ConfigReader(config, where)
        model_type = _architecture(get)
        eos_token_id = get.token_ids("eos_token_id")
        if model_type == "qwen":
            return cls(model_type, eos_token_id=eos_token_id, config=dict(config), **read_qwen1(get))
        hidden_size = get.positive("hidden_size")
        heads = get.positive("num_attention_heads")
        qwen3, sparse = model_type.startswith("qwen3"), model_type.endswith("_moe")
        fixed_head = (
            model_type == "qwen3"
        )  # a missing head_dim is a constant there, in all others hidden / heads
        if config.get("head_dim") is None and hidden_size % heads and not fixed_head:
            raise ConfigError(
                f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads} "
                "and head_dim is missing; add head_dim"
            )
        kv_heads = get.positive("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = get.positive("head_dim", QWEN3_HEAD_DIM if fixed_head else hidden_size // heads)
        if head_dim % 2:
            raise ConfigError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even one")
        layers = get.positive("num_hidden_layers", most=MOST_LAYERS)
        max_position = get.positive("max_position_embeddings", 32768)
        rope_theta, rope_scaling = read_rope(get, head_dim, max_position)
        _check_activation(get)
        check_fixed(get, _fixed(get, model_type, rope_theta), model_type)
        window, sliding_layers = read_window(get, layers, model_type)
        # Qwen2 always has Q/K/V biases (its MoE may leave them out) and never an output bias; Qwen3's one flag
        # covers all four.
        attention_bias = get.flag("attention_bias") if qwen3 else False
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=get.positive("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=get.positive("vocab_size"),
            max_position_embeddings=max_position,
            rms_norm_eps=get.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            tie_word_embeddings=get.flag("tie_word_embeddings"),
            qkv_bias=attention_bias
            if qwen3
            else not sparse or config.get("qkv_bias") is None or get.flag("qkv_bias"),
            output_bias=attention_bias,
            qk_norm=qwen3,
            rope_scaling=rope_scaling,
            dual_chunk=read_dual_chunk(get, rope_scaling is not None, window is not None),
            sliding_window=window,
            sliding_layers=sliding_layers,
            moe=read_moe(get, layers, shared=not qwen3) if sparse else None,
            torch_dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
            eos_token_id=eos_token_id,
            config=dict(config),
        )

    @property
    def names(self) -> Names:
        """What the family's checkpoints call their modules."""
        return HUGGING_FACE if self.qwen1 is None else QWEN1

    @property
    def q_size(self) -> int:
        """Rows of q_proj: all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    @property
    def context_length(self) -> int:
        """Positions the model is made for, YaRN's extension included: releases keep the trained length beside it.

        Qwen (1) goes on beyond its own, but no other engine knows how (see Qwen1Spec).
        """
        if self.qwen1 is not None:
            return min(self.qwen1.seq_length, self.max_position_embeddings)
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "yarn":
            return self.max_position_embeddings
        return max(
            self.max_position_embeddings, int(scaling.factor * scaling.original_max_position_embeddings)
        )

    @property
    def plain_context(self) -> int:
        """Positions up to which plain attention, all that other engines know, is the model's own."""
        longest = self.context_length
        return longest if self.dual_chunk is None else min(longest, self.dual_chunk.exact_length)

    def window(self, layer: int) -> int | None:
        """How many positions layer `layer` attends to, the token's own included; None for all."""
        return self.sliding_window if layer in self.sliding_layers else None

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` has experts."""
        return self.moe is not None and layer in self.moe.sparse_layers

    def layer_tensors(self, layer: int) -> list[TensorInfo]:
        """The tensors of decoder layer `layer`, in the order of the computation."""
        hidden, q, kv, names = self.hidden_size, self.q_size, self.kv_size, self.names
        found: list[TensorInfo] = []

        def add(name: str, shape: tuple[int, ...], role: str) -> None:
            found.append(TensorInfo(f"{names.layer(layer)}{name}", shape, role, layer))

        add(f"{names.attention_norm}.weight", (hidden,), "norm")
        for name, rows in zip(names.qkv, (q, kv, kv) if len(names.qkv) == 3 else (q + 2 * kv,), strict=True):
            add(f"{name}.weight", (rows, hidden), "linear")
            if self.qkv_bias:
                add(f"{name}.bias", (rows,), "bias")
        if self.qk_norm:
            add("self_attn.q_norm.weight", (self.head_dim,), "norm")
            add("self_attn.k_norm.weight", (self.head_dim,), "norm")
        add(f"{names.output}.weight", (hidden, q), "linear")
        if self.output_bias:
            add(f"{names.output}.bias", (hidden,), "bias")
        add(f"{names.mlp_norm}.weight", (hidden,), "norm")
        if self.moe is not None and self.is_sparse(layer):
            return found + self._sparse_tensors(self.moe, layer)
        return found + self._mlp_tensors(layer, names.mlp, self.intermediate_size)

    def _mlp_tensors(self, layer: int, names: Sequence[str], ffn: int) -> list[TensorInfo]:
        wide, tall = (ffn, self.hidden_size), (self.hidden_size, ffn)
        return [
            TensorInfo(f"{self.names.layer(layer)}{name}.weight", shape, "linear", layer)
            for name, shape in zip(names, (wide, wide, tall), strict=True)
        ]

    def _sparse_tensors(self, moe: MoESpec, layer: int) -> list[TensorInfo]:
        prefix = f"{self.names.layer(layer)}mlp."
        found = [TensorInfo(f"{prefix}gate.weight", (moe.num_experts, self.hidden_size), "router", layer)]
        wide = (moe.moe_intermediate_size, self.hidden_size)
        for expert in range(moe.num_experts):
            for name, shape in zip(PROJECTIONS, (wide, wide, wide[::-1]), strict=True):
                found.append(TensorInfo(expert_name(layer, expert, name), shape, "linear", layer, expert))
        if moe.shared_expert_intermediate_size is not None:
            shared = [f"mlp.shared_expert.{name}" for name in PROJECTIONS]
            found += self._mlp_tensors(layer, shared, moe.shared_expert_intermediate_size)
            shape = (1, self.hidden_size)
            found.append(TensorInfo(f"{prefix}shared_expert_gate.weight", shape, "router", layer))
        return found

    def outer_tensors(self) -> list[TensorInfo]:
        """The tensors outside the layers: embedding, final norm and, when untied, the head."""
        found = [
            TensorInfo(f"{self.names.embedding}.weight", (self.vocab_size, self.hidden_size), "embedding"),
            TensorInfo(f"{self.names.norm}.weight", (self.hidden_size,), "norm"),
        ]
        if not self.tie_word_embeddings:
            found.append(TensorInfo(f"{HEAD}.weight", (self.vocab_size, self.hidden_size), "head"))
        return found

    def tensors(self) -> list[TensorInfo]:
        """Every tensor a checkpoint of this model holds: the one inventory that all parts share."""
        layers = [t for layer in range(self.num_hidden_layers) for t in self.layer_tensors(layer)]
        return self.outer_tensors() + layers


def _architecture(get: ConfigReader) -> str:
    names = get.names("architectures")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    model_type = get.config.get("model_type")
    if not names and model_type in ARCHITECTURES.values():
        return str(model_type)
    raise ConfigError(
        f"{get.where}: architecture {names or model_type!r} is not supported; "
        f"known are {', '.join(ARCHITECTURES)}"
    )


def _fixed(get: ConfigReader, model_type: str, rope_theta: float) -> dict[str, Any]:
    """What a config may say only in one way, as the family or another key has it."""
    found = {**FIXED, "rotary_emb_base": rope_theta, "use_qk_norm": model_type.startswith("qwen3")}
    if model_type != "qwen2_moe":  # which has flags of its own for both
        found["qkv_bias"] = model_type == "qwen2" or get.flag("attention_bias")
        found["shared_expert_intermediate_size"] = 0
    return found


def _check_activation(get: ConfigReader) -> None:
    act = get.config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ConfigError(f"{get.where}: hidden_act {act!r} is not supported; Qwen models use 'silu'")
