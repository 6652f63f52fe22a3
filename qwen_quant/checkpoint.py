"""Checkpoint: a Hugging Face folder, full precision or GPTQ, read one tensor at a time and checked on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qwen_quant.errors import CheckpointError, ConfigError, UsageError
from qwen_quant.grids.base import QuantizedTensor
from qwen_quant.grids.gptq import V1, V2, IntGrid, PackedLinear, unpack
from qwen_quant.moe import fused_tensors
from qwen_quant.names import HEAD
from qwen_quant.safetensors import bf16_to_f32, storage_dtype
from qwen_quant.spec import ModelSpec, TensorInfo
from qwen_quant.tensor_source import INDEX, SINGLE, TensorSource

__all__ = ["INDEX", "REFERENCE", "SINGLE", "Checkpoint", "GPTQConfig", "TensorSource", "resolve_model"]

REFERENCE = "reference"  # the word that names the bundled checkpoint on the command line
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
UNKNOWN = "not part of the architecture"


def resolve_model(model: str) -> Path:
    """The folder or file that MODEL names: a path, the word `reference`, or a Hugging Face id.

    Raises UsageError when it is none of them, CheckpointError when a download fails.
    """
    try:
        path = Path(model).expanduser()
        found = path.exists()
    except (OSError, RuntimeError):  # a name too long for the system, or ~ of an unknown user
        path, found = Path(model), False
    if found:
        return path
    if model == REFERENCE:
        return Path(__file__).parent / "reference"
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return _download(model)
    raise CheckpointError(f"{model}: no such file or folder; give a path, a Hugging Face id, or 'reference'")


def _download(repo: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repo}: no such folder here; to download it from Hugging Face, pip install 'qwen-quant[hub]'"
        ) from None
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds; all mean that the download failed
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{repo}: no such folder here, and the download failed ({reason}); check the name and the network"
        ) from None


@dataclass(frozen=True)
class GPTQConfig:
    """What `quantization_config` says about the integers of a GPTQ checkpoint."""

    grid: IntGrid
    desc_act: bool
    checkpoint_format: str
    raw: Mapping[str, Any]


class Checkpoint:
    """A model folder: its spec, its tensors, and for GPTQ checkpoints the decoding of its integers."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_file():
            raise CheckpointError(f"{folder}: is a file where a checkpoint folder belongs")
        self.spec = ModelSpec.from_folder(self.folder)
        self.source = TensorSource(self.folder)
        self.quantization = self._quantization()
        self._split_experts()
        self._check_inventory()

    @classmethod
    def open(cls, model: str) -> Checkpoint:
        """Open MODEL as the command line names it."""
        return cls(resolve_model(model))

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        return {info.name: info for info in self.spec.tensors()}

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Why each stored tensor that the spec does not name is left out."""
        known: set[str] = set()
        for name in self.infos:
            stem = name.removesuffix("weight")
            known |= {stem + part for part in GPTQ_PARTS} if self.is_quantized(name) else {name}
        return {name: self._reason(name) for name in self.source.names() if name not in known}

    def _reason(self, name: str) -> str:
        if name == f"{HEAD}.weight":
            return "config.json ties the head to the embedding"
        if name.endswith("rotary_emb.inv_freq"):
            return "computed from config.json"
        info = self.infos.get(f"{name.removesuffix('bias')}weight")
        return "zeros" if info is not None and info.role == "linear" else UNKNOWN

    def _quantization(self) -> GPTQConfig | None:
        config = self.spec.config.get("quantization_config")
        if config is None:
            return None
        where = self.folder / "config.json"
        if not isinstance(config, Mapping):
            raise ConfigError(f"{where}: quantization_config is {config!r}; it must be an object")
        method = config.get("quant_method")
        if method != "gptq":
            raise ConfigError(
                f"{where}: quant_method {method!r} is not supported; start from the unquantized or a GPTQ checkpoint"
            )
        stored_format = config.get("checkpoint_format", V1)
        if stored_format not in (V1, V2):
            raise ConfigError(
                f"{where}: checkpoint_format {stored_format!r} is not supported; use {V1} or {V2}"
            )
        try:
            grid = IntGrid(config.get("bits", 0), config.get("group_size", 0), bool(config.get("sym", True)))
        except UsageError as error:
            raise ConfigError(f"{where}: quantization_config: {error}") from None
        return GPTQConfig(grid, bool(config.get("desc_act", False)), stored_format, dict(config))

    def _split_experts(self) -> None:
        """Find the weights of single experts in the fused tensors that newer transformers write."""
        spec = self.spec
        for layer in () if spec.moe is None else spec.moe.sparse_layers:
            assert spec.moe is not None
            for fused in fused_tensors(spec.moe, spec.hidden_size, layer):
                if fused.name in self.source:
                    self.source.split(fused)

    def _check_inventory(self) -> None:
        """Every tensor the spec names must be there in its shape, before hours are spent on the others."""
        for info in self.spec.tensors():
            if self.is_quantized(info.name):
                continue
            shape = self.source.shape(info.name)
            if shape != info.shape:
                raise CheckpointError(
                    f"{self.folder}: tensor {info.name!r} has shape {list(shape)}, "
                    f"config.json says {list(info.shape)}; config.json and weights do not belong together"
                )
        self._check_biases()

    def _check_biases(self) -> None:
        """AutoGPTQ stores a bias of zeros for linear layers that have none; any other would change the model."""
        for info in self.spec.tensors():
            bias = f"{info.name.removesuffix('weight')}bias"
            known = info.role != "linear" or bias not in self.source or bias in self.infos
            if not known and self.source.read(bias).any():
                raise CheckpointError(
                    f"{self.folder}: tensor {bias!r} is not zero, but the architecture has no such bias; "
                    "config.json and weights do not belong together"
                )

    def is_quantized(self, name: str) -> bool:
        """Whether weight `name` is stored as GPTQ integers."""
        return self.quantization is not None and f"{name.removesuffix('weight')}qweight" in self.source

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32, GPTQ integers decoded to the values that readers compute with."""
        if self.is_quantized(name):
            return self.quantized(name).decode()
        return self.source.read(name)

    def quantized(self, name: str) -> QuantizedTensor:
        """The integers and scales of a quantized weight. Raises CheckpointError when they do not fit together."""
        assert self.quantization is not None
        stem = name.removesuffix("weight")
        parts = {part: self.source.read_raw(stem + part) for part in GPTQ_PARTS if stem + part in self.source}
        grid = self.quantization.grid
        n, k = self.infos[name].shape
        groups = grid.n_groups(k)
        parts.setdefault("g_idx", (np.arange(k) // grid.columns_per_group(k)).astype(np.int32))
        expected = {
            "qweight": (("I32",), (k * grid.bits // 32, n)),
            "qzeros": (("I32",), (groups, n * grid.bits // 32)),
            "scales": (("F16", "BF16", "F32"), (groups, n)),
            "g_idx": (("I32", "I64"), (k,)),
        }
        for part, (dtypes, shape) in expected.items():
            found = f"{storage_dtype(parts[part])} {list(parts[part].shape)}" if part in parts else "nothing"
            if found not in [f"{dtype} {list(shape)}" for dtype in dtypes]:
                raise CheckpointError(
                    f"{self.folder}: tensor {stem + part!r} should be {dtypes[0]} {list(shape)}, found {found}; "
                    "quantization_config and weights do not belong together"
                )
        if parts["g_idx"].min() < 0 or parts["g_idx"].max() >= groups:
            raise CheckpointError(
                f"{self.folder}: tensor {stem + 'g_idx'!r} names groups beyond {groups - 1}"
            )
        scales = parts["scales"]
        if storage_dtype(scales) == "BF16":
            scales = bf16_to_f32(scales)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self.folder}: tensor {stem + 'scales'!r} holds NaN or infinite values")
        packed = PackedLinear(parts["qweight"], parts["qzeros"], scales, parts["g_idx"])
        return unpack(packed, grid, self.quantization.checkpoint_format)
