"""The integers of a GPTQ checkpoint in a GGUF file: the same, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.checkpoints import rewrite
from helpers.gguf_files import decoded, type_of

from qwen_quant.checkpoint import Checkpoint
from qwen_quant.errors import FormatError
from qwen_quant.exporters.gguf import export_gguf
from qwen_quant.exporters.gguf_tensors import gguf_name, pack_tensor
from qwen_quant.grids.base import QuantizedTensor
from qwen_quant.grids.gguf import gguf_grid
from qwen_quant.grids.gptq import IntGrid, pack

MakeModel = Callable[..., Checkpoint]


def make_gptq(
    folder: Path, grid: IntGrid, act_order: bool = False, keep: str = ""
) -> dict[str, QuantizedTensor]:
    """Turn a float checkpoint into a GPTQ one by plain rounding; `keep` is a linear left as it is."""
    checkpoint = Checkpoint(folder)
    tensors: dict[str, QuantizedTensor] = {}
    changed: dict[str, np.ndarray | None] = {}
    for info in checkpoint.spec.tensors():
        if info.role != "linear" or info.name == keep:
            continue
        tensor = grid.plain_rounding(checkpoint.read(info.name))
        if act_order:
            order = np.random.default_rng(0).permutation(info.shape[1])
            tensor.group_index = (np.arange(info.shape[1]) // grid.columns_per_group(info.shape[1]))[order]
        tensors[info.name] = tensor
        changed[info.name] = None
        for part, array in vars(pack(tensor)).items():
            changed[info.name.removesuffix("weight") + part] = array
    rewrite(folder, changed)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.sym,
        "desc_act": act_order,
        "checkpoint_format": "gptq",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize(
    ("bits", "group", "sym", "file_type"),
    [(4, 32, True, "Q4_0"), (4, 64, True, "Q4_0"), (4, 128, True, "Q4_0"), (4, -1, True, "Q4_0"),
     (8, 32, True, "Q8_0"), (8, 128, True, "Q8_0"), (4, 32, False, "Q4_1"), (4, 128, False, "Q4_1")],
)  # fmt: skip
def test_gptq_integers_are_repacked(
    make_model: MakeModel, tmp_path: Path, bits: int, group: int, sym: bool, file_type: str
) -> None:
    folder = make_model(
        hidden_size=128, intermediate_size=160, num_attention_heads=4
    ).folder  # a short last group
    kept = "model.layers.1.mlp.up_proj.weight"
    tensors = make_gptq(folder, IntGrid(bits, group, sym), keep=kept)
    checkpoint = Checkpoint(folder)
    export_gguf(checkpoint, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for name, tensor in tensors.items():
        target = gguf_name(checkpoint.infos[name])
        assert type_of(reader, target) == file_type
        values = decoded(reader, target)
        if sym:
            assert np.array_equal(values, checkpoint.read(name))
        else:
            # Only the minimum is rounded to FP16: half a unit in its last place.
            limit = np.abs(tensor.scales.scale * tensor.scales.offset).max() * 2.0**-11
            assert np.abs(values - checkpoint.read(name)).max() <= limit
        rows = next(t for t in reader.tensors if t.name == target).data
        assert np.array_equal(gguf_grid(file_type).unpack(rows).codes, tensor.codes)
    for name in (kept, "model.embed_tokens.weight"):
        target = gguf_name(checkpoint.infos[name])
        assert type_of(reader, target) == "BF16"
        assert np.array_equal(decoded(reader, target), checkpoint.read(name))


def test_gptq_checkpoint_as_floats(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model().folder
    make_gptq(folder, IntGrid(3, 32, False))
    checkpoint = Checkpoint(folder)
    export_gguf(checkpoint, tmp_path / "m.gguf", "F32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(decoded(reader, "blk.0.ffn_up.weight"), checkpoint.read(name))
    with pytest.raises(FormatError, match=r"asymmetric 3-bit.*--type F16"):
        export_gguf(checkpoint, tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("grid", "act_order", "file_type", "message"),
    [
        (IntGrid(2, 32), False, None, "symmetric 2-bit"),
        (IntGrid(8, 32, False), False, None, "asymmetric 8-bit"),
        (IntGrid(4, 32), False, "Q8_0", "--type Q4_0"),
        (IntGrid(4, 32), True, None, "q_proj.*desc_act.*without --desc-act"),
    ],
)
def test_integers_that_gguf_cannot_hold(
    make_model: MakeModel, tmp_path: Path, grid: IntGrid, act_order: bool, file_type: str | None, message: str
) -> None:
    folder = make_model().folder
    make_gptq(folder, grid, act_order)
    with pytest.raises(FormatError, match=message):
        export_gguf(Checkpoint(folder), tmp_path / "m.gguf", file_type)
    assert not [p for p in tmp_path.iterdir() if p != folder]


def test_repacking_refuses_what_would_change() -> None:
    rng = np.random.default_rng(0)

    def rounded(k: int, grid: IntGrid) -> QuantizedTensor:
        return grid.plain_rounding(rng.standard_normal((4, k), dtype=np.float32))

    with pytest.raises(FormatError, match="do not fill blocks"):
        pack_tensor("w", rounded(48, IntGrid(4, -1)), gguf_grid("Q4_0"))
    tensor = rounded(64, IntGrid(4, 32))
    tensor.scales.scale = tensor.scales.scale * np.float32(1.0001)
    with pytest.raises(FormatError, match="not FP16"):
        pack_tensor("w", tensor, gguf_grid("Q4_0"))
    tensor = rounded(64, IntGrid(4, 32))
    tensor.scales.offset = tensor.scales.offset + 1
    with pytest.raises(FormatError, match="zeros are not all 8"):
        pack_tensor("w", tensor, gguf_grid("Q4_0"))
    tensor = gguf_grid("Q4_0").plain_rounding(rng.standard_normal((4, 64), dtype=np.float32))
    tensor.scales.scale[0, 0] = np.nan
    with pytest.raises(FormatError, match="not finite"):
        pack_tensor("w", tensor, gguf_grid("Q4_0"))
