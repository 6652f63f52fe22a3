"""ModelSpec: what a Qwen checkpoint is, read from `config.json`, and the inventory of its tensors.

Field names are Hugging Face's. Anything that would change the arithmetic and is not understood is an error
that names the key: a wrong guess would only show as a slightly worse model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_quant.errors import ConfigError

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
KNOWN_ROPE_TYPES = ("default",)
QWEN3_HEAD_DIM = 128  # of a Qwen3 config.json without head_dim, whatever its hidden_size
MOST = 2**31 - 1  # the largest size that any format stores
MOST_LAYERS = 10_000  # a damaged count must not become an inventory of millions of tensors


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint. `role`: embedding, head, norm, bias or linear; `layer`: -1 outside layers."""

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int = -1


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder: the numbers that fix its arithmetic and the shapes of its tensors."""

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
        get = _Reader(config, where)
        model_type = get.architecture()
        hidden_size = get.positive("hidden_size")
        heads = get.positive("num_attention_heads")
        qwen3 = model_type == "qwen3"
        if config.get("head_dim") is None and hidden_size % heads and not qwen3:
            raise ConfigError(
                f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads} "
                "and head_dim is missing; add head_dim"
            )
        kv_heads = get.positive("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = get.positive("head_dim", QWEN3_HEAD_DIM if qwen3 else hidden_size // heads)
        if head_dim % 2:
            raise ConfigError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even one")
        get.check_activation()
        get.check_window()
        # Qwen2 always has Q/K/V biases and never an output bias; Qwen3's one flag covers all four.
        attention_bias = get.flag("attention_bias") if qwen3 else False
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=get.positive("intermediate_size"),
            num_hidden_layers=get.positive("num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=get.positive("vocab_size"),
            max_position_embeddings=get.positive("max_position_embeddings", 32768),
            rms_norm_eps=get.number("rms_norm_eps", 1e-6),
            rope_theta=get.rope_theta(),
            tie_word_embeddings=get.flag("tie_word_embeddings"),
            qkv_bias=attention_bias if qwen3 else True,
            output_bias=attention_bias,
            qk_norm=qwen3,
            torch_dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
            eos_token_id=get.token_ids("eos_token_id"),
            config=dict(config),
        )

    @property
    def q_size(self) -> int:
        """Rows of q_proj: all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    def layer_tensors(self, layer: int) -> list[TensorInfo]:
        """The tensors of decoder layer `layer`, in the order of the computation."""
        hidden, q, kv, ffn = self.hidden_size, self.q_size, self.kv_size, self.intermediate_size
        prefix = f"model.layers.{layer}"
        found: list[TensorInfo] = []

        def add(name: str, shape: tuple[int, ...], role: str) -> None:
            found.append(TensorInfo(f"{prefix}.{name}", shape, role, layer))

        add("input_layernorm.weight", (hidden,), "norm")
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            add(f"self_attn.{name}.weight", (rows, hidden), "linear")
            if self.qkv_bias:
                add(f"self_attn.{name}.bias", (rows,), "bias")
        if self.qk_norm:
            add("self_attn.q_norm.weight", (self.head_dim,), "norm")
            add("self_attn.k_norm.weight", (self.head_dim,), "norm")
        add("self_attn.o_proj.weight", (hidden, q), "linear")
        if self.output_bias:
            add("self_attn.o_proj.bias", (hidden,), "bias")
        add("post_attention_layernorm.weight", (hidden,), "norm")
        add("mlp.gate_proj.weight", (ffn, hidden), "linear")
        add("mlp.up_proj.weight", (ffn, hidden), "linear")
        add("mlp.down_proj.weight", (hidden, ffn), "linear")
        return found

    def outer_tensors(self) -> list[TensorInfo]:
        """The tensors outside the layers: embedding, final norm and, when untied, the head."""
        found = [
            TensorInfo("model.embed_tokens.weight", (self.vocab_size, self.hidden_size), "embedding"),
            TensorInfo("model.norm.weight", (self.hidden_size,), "norm"),
        ]
        if not self.tie_word_embeddings:
            found.append(TensorInfo("lm_head.weight", (self.vocab_size, self.hidden_size), "head"))
        return found

    def tensors(self) -> list[TensorInfo]:
        """Every tensor a checkpoint of this model holds: the one inventory that all parts share."""
        layers = [t for layer in range(self.num_hidden_layers) for t in self.layer_tensors(layer)]
        return self.outer_tensors() + layers


@dataclass(frozen=True)
class _Reader:
    """Typed access to a config with errors that name the file and the key."""

    config: Mapping[str, Any]
    where: str

    def architecture(self) -> str:
        names = self.names("architectures")
        for name in names:
            if name in ARCHITECTURES:
                return ARCHITECTURES[name]
        model_type = self.config.get("model_type")
        if not names and model_type in ARCHITECTURES.values():
            return str(model_type)
        raise ConfigError(
            f"{self.where}: architecture {names or model_type!r} is not supported; "
            f"known are {', '.join(ARCHITECTURES)}"
        )

    def names(self, key: str) -> list[str]:
        """A list of strings, empty when the key is absent or null."""
        value = self.config.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{self.where}: {key} is {value!r}; it must be a list of names")
        return value

    def flag(self, key: str) -> bool:
        """true or false; false when the key is absent or null."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} is {value!r}; it must be true or false")
        return bool(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them, as a tuple."""
        value = self.config.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(
            isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= MOST for token in found
        ):
            raise ConfigError(f"{self.where}: {key} is {value!r}; it must be a token id or a list of them")
        return tuple(found)

    def positive(self, key: str, default: int | None = None, most: int = MOST) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(
                f"{self.where}: key {key!r} is missing; the file does not describe a Qwen model"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ConfigError(f"{self.where}: {key} is {value!r}; it must be a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float) -> float:
        return self._check_number(key, self.config.get(key, default))

    def _check_number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise ConfigError(f"{self.where}: {key} is {value!r}; it must be a positive number")
        return float(value)

    def rope_theta(self) -> float:
        """The base from `rope_theta` or transformers 5's `rope_parameters`; only plain rotation passes."""
        # transformers 5 writes rope_parameters, older releases rope_theta and rope_scaling: read both.
        theta = self.config.get("rope_theta")
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.config.get(key)
            if rope is None:
                continue
            if not isinstance(rope, Mapping):
                raise ConfigError(f"{self.where}: {key} is {rope!r}; it must be an object")
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            if rope_type not in KNOWN_ROPE_TYPES:
                raise ConfigError(
                    f"{self.where}: {key} has rope type {rope_type!r}, which is not supported "
                    f"(known: {', '.join(KNOWN_ROPE_TYPES)}); remove it to run without context extension"
                )
            if "rope_theta" in rope:
                theta = rope["rope_theta"]
        return 10000.0 if theta is None else self._check_number("rope_theta", theta)

    def check_activation(self) -> None:
        act = self.config.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise ConfigError(f"{self.where}: hidden_act {act!r} is not supported; Qwen models use 'silu'")

    def check_window(self) -> None:
        if self.flag("use_sliding_window"):
            raise ConfigError(
                f"{self.where}: use_sliding_window is true, which is not supported; "
                "set it to false to attend fully"
            )
        types = set(self.names("layer_types")) - {"full_attention"}
        if types:
            raise ConfigError(
                f"{self.where}: layer_types has {sorted(types)}; only 'full_attention' is supported"
            )
