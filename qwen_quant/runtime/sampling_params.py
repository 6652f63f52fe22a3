"""How the next token is to be chosen."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_quant.errors import UsageError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token.

    temperature 0 takes the most likely one. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are
    off. `seed` None draws a new seed from the system. Raises UsageError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = [
            (0.0 <= self.temperature < float("inf"), "temperature", "zero or more"),
            (self.top_k >= 0, "top_k", "zero (off) or more"),
            (0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1"),
            (0.0 <= self.min_p <= 1.0, "min_p", "from 0 to 1"),
            (0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", "above 0"),
            (self.seed is None or self.seed >= 0, "seed", "zero or more"),
        ]
        for valid, name, wanted in checks:
            if not valid:
                raise UsageError(f"{name} is {getattr(self, name)}; it has to be {wanted}")

    @property
    def needs_logits(self) -> bool:
        """Whether it takes more than the most likely token."""
        return self.temperature > 0.0 or self.repetition_penalty != 1.0
