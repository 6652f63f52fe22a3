"""Typed access to a parsed `config.json`: anything of another kind is one line that names the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_quant.errors import ConfigError

if TYPE_CHECKING:
    from qwen_quant.spec import ModelSpec

MOST = 2**31 - 1  # the largest size that any format stores
MOST_LAYERS = 10_000  # a damaged count must not become an inventory of millions of tensors


@dataclass(frozen=True)
class ConfigReader:
    """Typed access to a config with errors that name the file and the key."""

    config: Mapping[str, Any]
    where: str

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
        """A whole number from 1 to `most`; `default` when the key is absent or null."""
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
        """A positive number; `default` when the key is absent. null is an error."""
        return self._check_number(key, self.config.get(key, default))

    def optional_number(self, key: str, least: float = 0.0) -> float | None:
        """A positive number of at least `least`; None when the key is absent or null."""
        value = self.config.get(key)
        if value is None:
            return None
        number = self._check_number(key, value)
        if number < least:
            raise ConfigError(f"{self.where}: {key} is {value!r}; it must be at least {least:g}")
        return number

    def _check_number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise ConfigError(f"{self.where}: {key} is {value!r}; it must be a positive number")
        return float(value)


def config_for_all_readers(spec: ModelSpec) -> dict[str, Any]:
    """The checkpoint's config.json with the keys that only older readers ask for beside those of newer ones.

    Older readers know torch_dtype, rope_theta and rope_scaling only; transformers 5 writes dtype and
    rope_parameters.
    """
    model = dict(spec.config)
    model.setdefault("torch_dtype", spec.torch_dtype)
    if spec.qwen1 is None and model.get("rope_theta") is None:
        model["rope_theta"] = spec.rope_theta
    if spec.rope_scaling is not None and not model.get("rope_scaling"):
        model["rope_scaling"] = {k: v for k, v in model["rope_parameters"].items() if k != "rope_theta"}
    if spec.moe is not None:
        model.setdefault("num_experts", spec.moe.num_experts)
    return model
