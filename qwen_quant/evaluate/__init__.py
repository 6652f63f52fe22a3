"""The proof: perplexity, KL divergence and top-1 agreement of an artifact against its reference."""

from qwen_quant.evaluate.report import EvalResult, evaluate, evaluate_windows

__all__ = ["EvalResult", "evaluate", "evaluate_windows"]
