"""llama-quantize's own choices of types, kept in tests/data/llama_quantize.json.

    python tests/helpers/llama_quantize.py PATH/TO/llama-quantize

writes the table anew, from the tool's dry runs on F16 files of these models.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TABLE = Path(__file__).parents[1] / "data" / "llama_quantize.json"
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
QWEN3_MOE = {**EXPERTS, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
QWEN2_MOE = {
    **QWEN2,
    **EXPERTS,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 128,
}
# What differs from a tied Qwen3 with rows of 256 weights; the last layers' counts are where rules end.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3, 4 layers": {"num_hidden_layers": 4},
    "qwen3, 9 layers, untied": {"num_hidden_layers": 9, "tie_word_embeddings": False},
    "qwen3, 16 layers, 4 queries a value": {"num_hidden_layers": 16, "num_key_value_heads": 1},
    "qwen2, 28 layers": {**QWEN2, "num_hidden_layers": 28},
    "qwen2, 80 layers": {**QWEN2, "num_hidden_layers": 80, "tie_word_embeddings": False},
    "qwen2, rows of 96": {**QWEN2, "num_hidden_layers": 9, "hidden_size": 96, "num_attention_heads": 4},
    "qwen3, rows of 112 in down": {"num_hidden_layers": 2, "intermediate_size": 112},
    "qwen3moe, 8 experts": {**QWEN3_MOE, "num_hidden_layers": 9, "num_experts": 8},
    "qwen3moe, 4 experts": {**QWEN3_MOE, "num_hidden_layers": 16, "num_experts": 4},
    "qwen2moe, 6 experts": {**QWEN2_MOE, "num_hidden_layers": 9, "num_experts": 6},
}
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "vocab_size": 4112}
TYPES = (
    *("Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("Q3_K", "Q4_K", "Q5_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
)
# With options, all of the first model but one.
OPTIONS: dict[str, tuple[str, list[str]]] = {
    "pure": ("qwen3, 9 layers, untied", ["--pure"]),
    "pure, tied": ("qwen3, 4 layers", ["--pure"]),
    "outer types": (
        "qwen3, 9 layers, untied",
        ["--token-embedding-type", "q5_0", "--output-tensor-type", "iq4_nl"],
    ),
    "tied head": ("qwen3, 4 layers", ["--output-tensor-type", "q5_k"]),
    "tensor types": (
        "qwen3, 16 layers, 4 queries a value",
        [
            *("--tensor-type", r"blk\.[0-5]\.ffn_down=q8_0"),
            *("--tensor-type", "attn_[qk]=iq4_xs"),
            *("--tensor-type", "blk.1.attn_v=q5_0"),
        ],
    ),
    "experts by type": ("qwen2moe, 6 experts", ["--tensor-type", "ffn_down_exps=q6_k"]),
}  # fmt: skip
# Types by tensor; in the table "*" and the type of most matrices, and of other kinds the runs of types by layer.
Choice = dict[str, str]


def cases() -> list[tuple[str, str, str, bool]]:
    """Each a name of OPTIONS or "", a model, a file type, and whether there is an importance matrix."""
    plain = [("", model, kind, matrix) for model in MODELS for kind in TYPES for matrix in (True, False)]
    asked = [
        (name, model, kind, True)
        for name, (model, _) in OPTIONS.items()
        for kind in ("Q4_K_M", "Q2_K", "Q4_0")
    ]
    return plain + asked


def key(options: str, model: str, kind: str, matrix: bool) -> str:
    return " | ".join(filter(None, (options or model, kind, "imatrix" if matrix else "")))


def shortened(types: Choice) -> Choice:
    """The types of all matrices in the table's form."""
    most = Counter(types.values()).most_common(1)[0][0]
    by_kind: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.weight", name)
        assert found is not None
        by_kind.setdefault(found[2], {})[int(found[1] or 0)] = kind
    runs = {
        name: " ".join(f"{len(list(run))}x{kind}" for kind, run in groupby(kinds[i] for i in sorted(kinds)))
        for name, kinds in sorted(by_kind.items())
        if set(kinds.values()) != {most}
    }
    return {"*": most} | runs


def write_imatrix(path: Path) -> None:
    """An importance matrix of a single tensor: there being one decides some types."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 256), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def chosen(tool: str, file: Path, kind: str, imatrix: Path | None, options: list[str]) -> Choice:
    """The type of each matrix of an F16 file after quantizing it as `kind`."""
    matrix = [] if imatrix is None else ["--imatrix", str(imatrix)]
    command = [tool, "--dry-run", *matrix, *options, str(file), kind]
    text = subprocess.run(command, capture_output=True, text=True, check=True)
    output = text.stdout + text.stderr
    found = {}
    # A warning about a shape may stand between a tensor's name and its new type.
    for part in re.split(r"\[ *\d+/ *\d+\] ", output)[1:]:
        name, before = part.split()[0], re.search(r"type = +(\w+),", part)
        after = re.search(r"MiB \((\w+)\)", part)
        assert before is not None
        if before[1] != "f32":
            found[name] = (after or before)[1].upper()
    assert found, output
    return found


def write_table(tool: str) -> None:
    from conftest import TINY, write_random_checkpoint

    from qwen_quant.checkpoint import Checkpoint, resolve_model
    from qwen_quant.exporters.gguf import export_gguf

    table = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_imatrix(folder / "imatrix.gguf")
        for number, (name, changes) in enumerate(MODELS.items()):
            model = write_random_checkpoint(folder / str(number), {**TINY, **SHAPE, **changes})
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(resolve_model("reference") / file, model / file)
            export_gguf(Checkpoint(model), folder / f"{name}.gguf", "F16")
            shutil.rmtree(model)
        for options, model_name, kind, matrix in cases():
            if kind == "Q2_K_S" and not matrix:
                continue  # which llama-quantize refuses
            asked = OPTIONS[options][1] if options else []
            imatrix = folder / "imatrix.gguf" if matrix else None
            types = chosen(tool, folder / f"{model_name}.gguf", kind, imatrix, asked)
            table[key(options, model_name, kind, matrix)] = shortened(types)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(types)}" for name, types in table.items())
    TABLE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write_table(sys.argv[1])
