"""Checkpoint: a Hugging Face folder, full precision or GPTQ, read one tensor at a time and checked on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qwen_quant.errors import CheckpointError, ConfigError, UsageError
from qwen_quant.grids.base import QuantizedTensor
from qwen_quant.grids.gptq import V1, V2, IntGrid, PackedLinear, unpack
from qwen_quant.moe import Fused, fused_tensors
from qwen_quant.safetensors import SafetensorsFile, bf16_to_f32, storage_dtype
from qwen_quant.spec import ModelSpec, TensorInfo

REFERENCE = "reference"  # the word that names the bundled checkpoint on the command line
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK_BYTES = 32 << 20  # a piece of a tensor that is copied or scanned in pieces
FLOATS = ("F64", "F32", "F16", "BF16")
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


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


class TensorSource:
    """The tensors of a folder of safetensors shards, by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, SafetensorsFile] = {}
        self._shard_of = self._find_shards()

    def _find_shards(self) -> dict[str, str]:
        if (self.folder / SINGLE).exists():  # before an index, as transformers has it
            return dict.fromkeys(self._file(SINGLE).entries, SINGLE)
        index = self.folder / INDEX
        if index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                mapping = {str(name): str(shard) for name, shard in weight_map.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise CheckpointError(f"{index}: is not a shard index; download it again") from None
            for shard in sorted(set(mapping.values())):
                if Path(shard).name != shard or not (self.folder / shard).is_file():
                    raise CheckpointError(
                        f"{self.folder / shard}: this shard is missing ({INDEX} names it); download it again"
                    )
            return mapping
        if any(self.folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{self.folder}: holds pickled pytorch_model.bin weights, which are not read for safety; "
                "convert them to safetensors first"
            )
        raise CheckpointError(f"{self.folder / SINGLE}: not found; MODEL must hold safetensors weights")

    def _file(self, shard: str) -> SafetensorsFile:
        if shard not in self._files:
            self._files[shard] = SafetensorsFile(self.folder / shard)
        return self._files[shard]

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._shard_of)

    def _locate(self, name: str) -> SafetensorsFile:
        if name not in self._shard_of:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is missing; the checkpoint is incomplete or of another architecture"
            )
        file = self._file(self._shard_of[name])
        if name not in file.entries:
            raise CheckpointError(f"{file.path}: tensor {name!r} is missing, but {INDEX} places it there")
        return file

    def dtype(self, name: str) -> str:
        """The stored dtype as safetensors names it (BF16, F16, I32 …)."""
        return self._locate(name).entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._locate(name).entries[name].shape

    def split(self, fused: Fused) -> None:
        """Know a fused tensor as its parts from now on. Nothing is read: a part is a place in the file like any
        other tensor. Raises CheckpointError when it has another shape."""
        file = self._locate(fused.name)
        shape = file.entries[fused.name].shape
        if shape != fused.shape:
            raise CheckpointError(
                f"{file.path}: tensor {fused.name!r} has shape {list(shape)}, config.json says "
                f"{list(fused.shape)}; config.json and weights do not belong together"
            )
        file.split(fused.name, fused.parts)
        shard = self._shard_of.pop(fused.name)
        self._shard_of |= dict.fromkeys((name for name, _ in fused.parts), shard)

    def read_raw(self, name: str) -> np.ndarray:
        """The stored array; BF16 as uint16 bit patterns."""
        return self._locate(name).read_raw(name)

    def _pieces(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A float tensor in pieces along its first dimension, each as stored and as float32; raises as `read`."""
        file = self._locate(name)
        entry = file.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        step = max(1, rows * CHUNK_BYTES // max(1, entry.nbytes))
        for start in range(0, rows, step):
            raw = file.read_raw(name, start, start + step)
            yield raw, self._floats(file, name, raw)

    def raw_chunks(self, name: str) -> Iterator[np.ndarray]:
        """The stored array in pieces, checked as `read` does: for copying what is too big to hold."""
        return (raw for raw, _ in self._pieces(name))

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """`read` in pieces along the first dimension."""
        return (values for _, values in self._pieces(name))

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The given rows (sorted indices) of a matrix as float32 [len(rows), columns]."""
        found, start = [], 0
        for part in self.chunks(name):
            mine = rows[(rows >= start) & (rows < start + len(part))]
            found.append(part[mine - start])
            start += len(part)
        return np.concatenate(found)

    def read(self, name: str) -> np.ndarray:
        """A floating-point tensor as float32. Raises CheckpointError when it is not finite or not of floats."""
        file = self._locate(name)
        return self._floats(file, name, file.read_raw(name))

    def _floats(self, file: SafetensorsFile, name: str, raw: np.ndarray) -> np.ndarray:
        dtype = file.entries[name].dtype
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has dtype {dtype}, where a float type belongs"
            )
        values = bf16_to_f32(raw) if dtype == "BF16" else raw.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise CheckpointError(
                f"{file.path}: tensor {name!r} holds {bad} NaN or infinite values; download the checkpoint again"
            )
        return values


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
