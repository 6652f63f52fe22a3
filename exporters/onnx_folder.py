"""What stands beside the graph, so that each reader finds its own: onnxruntime-genai, Optimum, transformers.js.

onnx/model_q4.onnx, onnx/model_q4.onnx_data   the graph and its weights, where transformers.js looks for them
genai_config.json                             onnxruntime-genai
config.json, generation_config.json, tokenizer files
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_quant import __version__
from qwen_quant.checkpoint import INDEX, Checkpoint
from qwen_quant.config import config_for_all_readers
from qwen_quant.exporters.onnx_ops import Ops
from qwen_quant.exporters.onnx_standard import StandardOps
from qwen_quant.files import SIDE_FILES, copy_side_files
from qwen_quant.spec import ModelSpec
from qwen_quant.tokenizer import Tokenizer

GRAPH_FOLDER = "onnx"
GENAI = "genai_config.json"
# transformers.js's dtypes, each the end of a file name. BF16 weights are computed with as FP32.
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "fp32", "int4": "q4", "int8": "int8"}
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q4": "_q4", "int8": "_int8"}
# Who runs the graph (genai_config.json, ORTModelForCausalLM), by the cache's type: the others hand over FP32 ones.
READERS = {
    "F32": "onnxruntime, onnxruntime-genai, Optimum and transformers.js",
    "int8": "onnxruntime, onnxruntime-genai and Optimum",
    "int4": "onnxruntime and onnxruntime-genai",
}
LEVEL = "session.qdq_matmulnbits_accuracy_level"
NOT_COPIED = ("config.json", "quantize_config.json", GENAI, INDEX)


# Of a graph of standard operators, where the level stands in no node and only genai_config.json gives it.
EXACT = (
    "onnxruntime rounds activations to 8 bits in graphs of standard operators, which changes a few tokens; programs",
    f"that do not read genai_config.json (Optimum) set the session's configuration entry `{LEVEL}` to `0`.",
    "",
)


def graph_name(kind: str) -> str:
    """The graph's file for a type of weights, as `model_q4.onnx`."""
    return f"model{SUFFIXES[DTYPES[kind]]}.onnx"


def write_folder(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    folder: Path,
    graph: Path,
    kind: str,
    ops: Ops,
    accuracy_level: str,
) -> None:
    """Write all but the graph and the card into `folder`."""
    copy_side_files(checkpoint.folder, folder, SIDE_FILES, leave_out=NOT_COPIED)
    if not (folder / "tokenizer.json").exists():
        _write_tokenizer(tokenizer, folder)
    config = config_for_all_readers(checkpoint.spec)
    config.pop("quantization_config", None)
    # transformers.js loads the right file and its weights without being told.
    config["transformers.js_config"] = {
        "dtype": DTYPES[kind],
        "use_external_data_format": {graph.name: 1},
    }
    _write_json(folder / "config.json", config)
    relative = graph.relative_to(folder).as_posix()
    described = genai_config(checkpoint.spec, tokenizer, relative, ops.shares_buffer)
    if ops.opset == StandardOps.opset:
        # onnxruntime makes MatMulNBits of DequantizeLinear and MatMul, and would round activations unasked.
        described["model"]["decoder"]["session_options"][LEVEL] = "4" if accuracy_level == "4" else "0"
    _write_json(folder / GENAI, described)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, the one form that all readers know, in place of vocab.json or qwen.tiktoken; the class that
    tokenizer_config.json names, and Qwen (1)'s template, were code."""
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["tokenizer_class"] = "Qwen2Tokenizer"
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    _write_json(path, config)


def genai_config(spec: ModelSpec, tokenizer: Tokenizer, graph: str, shares_buffer: bool) -> dict[str, Any]:
    """onnxruntime-genai's description of the model: https://onnxruntime.ai/docs/genai/reference/config.html"""
    ends = list(tokenizer.eos_ids)
    pad = tokenizer.token_id("<|endoftext|>")
    begin = spec.config.get("bos_token_id")
    model: dict[str, Any] = {
        "bos_token_id": begin if isinstance(begin, int) else pad,
        "context_length": spec.plain_context,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": graph,
            "head_size": spec.head_dim,
            "hidden_size": spec.hidden_size,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": spec.num_attention_heads,
            "num_hidden_layers": spec.num_hidden_layers,
            "num_key_value_heads": spec.num_key_value_heads,
        },
        "eos_token_id": ends,
        "pad_token_id": pad if pad is not None else ends[0] if ends else 0,
        "type": "qwen3" if spec.model_type.startswith("qwen3") else "qwen2",
        "vocab_size": spec.vocab_size,
    }
    search = {
        "do_sample": False,
        "max_length": spec.plain_context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": shares_buffer,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(
    folder: Path, checkpoint: Checkpoint, graph: Path, types: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """README.md, the model card: https://huggingface.co/docs/hub/model-cards"""
    name = checkpoint.folder.resolve().name
    counts = Counter(types.values())
    check, cache = facts.get("check"), facts.get("kv_cache", "F32")
    described = json.loads((folder / GENAI).read_text(encoding="utf-8"))["model"]["decoder"]
    level = described["session_options"].get(LEVEL)
    lines = [
        "---",
        f"library_name: {'transformers.js' if cache == 'F32' else 'onnxruntime-genai'}",
        "pipeline_tag: text-generation",
        f"base_model: {checkpoint.spec.config.get('_name_or_path') or name}",
        "tags: [onnx, qwen, qwen-quant]",
        "---",
        "",
        f"# {name}, ONNX",
        "",
        f"Written by qwen-quant {__version__}. The graph is `{graph.relative_to(folder).as_posix()}`,",
        f"its cache of keys and values is {cache}. It runs on {READERS[cache]},",
        f"and with `qwen-quant run {folder_name(folder)}`.",
        "",
        *([] if level != "0" else EXACT),
        "| type | tensors |",
        "|---|---:|",
        *(f"| {kind} | {count} |" for kind, count in counts.most_common()),
        "",
    ]
    if check:
        lines += [
            f"Measured against {name} on {check['tokens']} tokens of held-out text: KL divergence "
            f"{check['kld_mean']:.5f} nats per token, top-1 agreement {100 * check['top1_agreement']:.2f} %.",
            "",
        ]
    lines += [
        "## Recipe",
        "",
        "```json",
        json.dumps(dict(facts), indent=2, default=str, ensure_ascii=False),
        "```",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def folder_name(folder: Path) -> str:
    """The name the folder will have: it is written as `.NAME.PID.partial`."""
    name = folder.name
    return name[1:].rsplit(".", 2)[0] if name.endswith(".partial") else name
