"""Train a small Qwen from scratch and write it as a Hugging Face checkpoint in BF16.

The bundled reference checkpoint was made by

    python scripts/train_tokenizer.py --corpus DIR/train --vocab-size 4096 -o OUT
    python scripts/train_reference.py --corpus DIR/train --tokenizer OUT --minutes 55 -o OUT

and a larger one, for measurements, by e.g. `--hidden 768 --intermediate 2048 --layers 12 --heads 12 --device cuda`.
Matrices are trained with Muon, everything else with AdamW. The printed held-out losses are in bits per byte,
beside an interpolated 3-gram model over the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import END, read_split
from ngram import trigram_bits
from safetensors.torch import save_file
from tokenizers import Tokenizer

from qwen_quant.model import Model
from qwen_quant.spec import ModelSpec

WARMUP, COOLDOWN = 0.02, 0.5  # fractions of the run
# Window length until a fraction of the run: short ones are cheaper, the last ones teach the long positions.
WINDOWS = ((0.6, 256), (0.88, 512), (1.0, 1 << 30))


def config_for(options: argparse.Namespace, tokenizer: Tokenizer) -> dict:
    """A config.json as Hugging Face writes it."""
    head_dim = options.head_dim or options.hidden // options.heads
    config = {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[options.arch]],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": options.hidden,
        "initializer_range": 0.02,
        "intermediate_size": options.intermediate,
        "max_position_embeddings": options.context,
        "max_window_layers": options.layers,
        "model_type": options.arch,
        "num_attention_heads": options.heads,
        "num_hidden_layers": options.layers,
        "num_key_value_heads": options.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": options.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": not options.untied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": -(-tokenizer.get_vocab_size() // 256) * 256,
    }
    if options.arch == "qwen3":
        config |= {"head_dim": head_dim, "attention_bias": False}
    return config


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream of ids, a document end between them."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [*encoding.ids, end]
    return np.array(ids, dtype=np.int32)


def initialise(model: Model) -> None:
    """Normal weights scaled by fan-in; the projections that write to the residual stream start smaller."""
    depth = 2 * model.spec.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 0.02 if "embed" in name or "lm_head" in name else 0.5 / math.sqrt(parameter.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(depth)
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)


def optimizers(model: Model, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for embeddings, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "layers" in name else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=0.05, adjust_lr_fn="original")
    adam = torch.optim.AdamW(rest, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def schedule(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, constant, linear cool-down to almost nothing."""
    if progress < WARMUP:
        return progress / WARMUP
    return max(0.01, min(1.0, (1 - progress) / COOLDOWN))


def sample(stream: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Random windows [batch, length + 1] of the token stream."""
    starts = torch.randint(0, len(stream) - length - 1, (batch,))
    return torch.stack([stream[s : s + length + 1] for s in starts]).long()


def loss_of(model: Model, windows: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
    """Mean next-token cross-entropy in nats over windows [batch, length + 1]."""
    with torch.autocast(windows.device.type, dtype=autocast, enabled=autocast is not None):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_bits(model: Model, tokens: np.ndarray, n_bytes: int, length: int, device: str) -> float:
    """Bits per byte over consecutive windows of `tokens`."""
    total = 0.0
    usable = (len(tokens) - 1) // length * length
    for start in range(0, usable, length * 8):
        stop = min(start + length * 8, usable)
        rows = [tokens[s : s + length + 1] for s in range(start, stop, length)]
        windows = torch.from_numpy(np.stack(rows)).long().to(device)
        total += loss_of(model, windows, None).item() * (stop - start)
    return total / usable * len(tokens) / n_bytes / math.log(2)


def save(model: Model, config: dict, tokenizer_folder: Path, folder: Path) -> None:
    """Write config, weights (BF16), tokenizer and generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if tokenizer_folder != folder:
            (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    path = folder / "model.safetensors"
    save_file(weights, str(path), metadata={"format": "pt"})
    path.chmod(0o644)


def train(model: Model, stream: torch.Tensor, options: argparse.Namespace) -> None:
    """Run until the time is up; the schedule follows the clock, so any machine finishes its cool-down."""
    forward = torch.compile(model) if options.compile else model
    opts = optimizers(model, options)
    began, step, seen, average = time.monotonic(), 0, 0, 0.0
    while (progress := (time.monotonic() - began) / (options.minutes * 60)) < 1:
        length = next(min(n, options.context) for until, n in WINDOWS if progress < until)
        windows = sample(stream, max(1, options.batch_tokens // length), length).to(options.device)
        loss = loss_of(forward, windows, torch.bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + windows[:, 1:].numel()
        average = loss.item() if step == 1 else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            rate = seen / (time.monotonic() - began)
            print(
                f"{progress:6.1%}  step {step}  loss {average:.4f}  {seen / 1e6:.1f}M tokens  {rate:.0f} tok/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True)
    add("--tokenizer", type=Path, required=True)
    add("-o", "--output", type=Path, required=True)
    add("--arch", choices=("qwen2", "qwen3"), default="qwen3")
    add("--hidden", type=int, default=256)
    add("--intermediate", type=int, default=512)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=0)
    add("--context", type=int, default=2048)
    add("--rope-theta", type=float, default=10000.0)
    add("--untied", action="store_true")
    add("--minutes", type=float, default=55)
    add("--batch-tokens", type=int, default=8192)
    add("--muon-lr", type=float, default=0.02)
    add("--adam-lr", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--compile", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    train_texts, held_out_texts = read_split(options.corpus)
    train_tokens, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    n_bytes = sum(len(text.encode()) for text in held_out_texts)
    config = config_for(options, tokenizer)
    model = Model(ModelSpec.from_config(config)).to(options.device)
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tokens):,} training tokens")
    train(model, torch.from_numpy(train_tokens), options)
    save(model, config, options.tokenizer, options.output)
    model.to(torch.bfloat16).float()  # measure what was written
    bits = held_out_bits(model, held_out, n_bytes, min(1024, options.context), options.device)
    trigram = trigram_bits(train_tokens, held_out, config["vocab_size"]) / n_bytes
    print(f"held-out bits per byte: {bits:.4f}, 3-gram {trigram:.4f}")


if __name__ == "__main__":
    main()
