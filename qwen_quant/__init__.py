"""qwen-quant: from a Qwen checkpoint to a file that runs on a laptop, with the proof beside it."""

__version__ = "0.1.0"
