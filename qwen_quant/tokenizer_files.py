"""Reading a tokenizer: the files of a Hugging Face folder, or the keys of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from qwen_quant import _core, tokenizer_ranks
from qwen_quant.errors import ConfigError, FormatError
from qwen_quant.tokenizer_vocabulary import NORMAL, StoredVocabulary, byte_level_bpe, split_merges

# Releases without added_tokens_decoder name their added tokens only in code: these, after the vocabulary.
_DEFAULT_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_DOWNLOAD = "download the checkpoint's tokenizer files again"


@dataclass(frozen=True)
class SpecialTokens:
    """What stands beside a vocabulary: ids that end a turn, tokens with a part, the chat template."""

    eos_ids: tuple[int, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)  # "eos_token" -> "<|im_end|>"
    chat_template: str | None = None


def read_folder(folder: Path) -> tuple[tokenizers.Tokenizer, SpecialTokens, str]:
    """The tokenizer of a checkpoint folder, its special tokens, and the file it came from.

    Raises ConfigError naming the file that is missing or broken.
    """
    config_path = folder / "tokenizer_config.json"
    config = _read_json(config_path) or {}
    path = folder / "tokenizer.json"
    if path.is_file():
        backend = _read_tokenizer_json(path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        path = folder / "vocab.json"
        backend = _read_vocab_and_merges(path, folder / "merges.txt")
        if not config.get("added_tokens_decoder"):
            backend.add_special_tokens(
                [AddedToken(t, special=True, normalized=False) for t in _DEFAULT_ADDED]
            )
    elif (folder / tokenizer_ranks.FILE_NAME).is_file():
        path = folder / tokenizer_ranks.FILE_NAME
        backend = byte_level_bpe(*tokenizer_ranks.read_ranks(path))
        backend.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in tokenizer_ranks.SPECIAL_TOKENS]
        )
    else:
        raise ConfigError(
            f"{path}: not found, nor vocab.json with merges.txt, nor {tokenizer_ranks.FILE_NAME}; {_DOWNLOAD}"
        )
    _add_tokens(backend, config.get("added_tokens_decoder") or {}, config_path)
    named = _named_tokens(config)
    eos = [backend.token_to_id(named["eos_token"])] if "eos_token" in named else []
    generation = _read_json(folder / "generation_config.json") or {}
    for found in (generation, _read_json(folder / "config.json") or {}):
        stored = found.get("eos_token_id")
        eos += stored if isinstance(stored, list) else [stored]
    ids = tuple(dict.fromkeys(i for i in eos if isinstance(i, int)))
    template = _read_template(folder, config)
    if template is None and generation.get("chat_format") == "chatml":
        from qwen_quant.chat import CHATML_WITH_SYSTEM

        template = CHATML_WITH_SYSTEM  # Qwen (1) has its template in code
    return backend, SpecialTokens(ids, named, template), str(path)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None without such a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); {_DOWNLOAD}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no JSON object; {_DOWNLOAD}")
    return found


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise ConfigError(f"{path}: is no tokenizer ({error}); {_DOWNLOAD}") from None
    if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
        raise ConfigError(f"{path}: is no byte-level BPE tokenizer; Qwen models have one")
    return backend


def _read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> tokenizers.Tokenizer:
    vocab = _read_json(vocab_path) or {}
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{merges_path}: cannot be read ({error}); {_DOWNLOAD}") from None
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    try:
        return byte_level_bpe(vocab, split_merges(merges))
    except Exception as error:
        raise ConfigError(f"{merges_path}: does not fit vocab.json ({error}); {_DOWNLOAD}") from None


def _add_tokens(backend: tokenizers.Tokenizer, decoder: Mapping[str, Any], path: Path) -> None:
    """Add the tokens of `added_tokens_decoder` that the tokenizer lacks, in the order of their ids."""
    known = backend.get_added_tokens_decoder()
    try:
        wanted = sorted((int(i), t) for i, t in decoder.items() if int(i) not in known)
        tokens = {i: AddedToken(**{k: v for k, v in t.items() if k != "__type"}) for i, t in wanted}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: added_tokens_decoder is malformed ({error}); {_DOWNLOAD}") from None
    for i, token in tokens.items():
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise ConfigError(
                f"{path}: added token {token.content!r} has id {i}, but the tokenizer gives it "
                f"{backend.token_to_id(token.content)}; {_DOWNLOAD}"
            )


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            found[key] = value
    return found


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: its own file first, as transformers reads them."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); {_DOWNLOAD}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    return template if isinstance(template, str) else None


def read_gguf(metadata: Mapping[str, Any], where: str) -> tuple[StoredVocabulary, SpecialTokens]:
    """The vocabulary of a GGUF file and its special tokens. Lists of strings may be `_core.Strings`.

    Raises FormatError naming the key that is missing or describes a tokenizer other than Qwen2's.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre != "qwen2":
        raise FormatError(
            f"{where}: tokenizer.ggml.model is {model!r} and .pre {pre!r}; Qwen files have 'gpt2' and 'qwen2'"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens", where)
    merges = _strings(metadata, "tokenizer.ggml.merges", where)
    types = metadata.get("tokenizer.ggml.token_type")
    try:
        types = bytes([NORMAL]) * len(tokens) if types is None else bytes(types)
    except (ValueError, TypeError):
        raise FormatError(
            f"{where}: tokenizer.ggml.token_type is no list of token types; export the file again"
        ) from None
    if len(types) != len(tokens):
        raise FormatError(
            f"{where}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens; "
            "export the file again"
        )
    try:
        return StoredVocabulary(tokens, types, merges), _gguf_special(metadata, tokens)
    except ValueError as error:
        raise FormatError(
            f"{where}: tokenizer.ggml.merges does not fit the tokens ({error}); export the file again"
        ) from None


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> _core.Strings:
    found = metadata.get(key)
    if isinstance(found, _core.Strings):
        return found
    try:
        if isinstance(found, Sequence) and not isinstance(found, str):
            return _core.Strings(found)
    except (TypeError, ValueError):
        pass
    raise FormatError(f"{where}: {key} is missing or no list of strings; export the file again")


def _gguf_special(metadata: Mapping[str, Any], tokens: _core.Strings) -> SpecialTokens:
    def ids(key: str) -> list[int]:
        value = metadata.get(key)
        values = value if isinstance(value, Sequence) else [value]
        return [int(v) for v in values if v is not None and 0 <= int(v) < len(tokens)]

    ends = [*ids("tokenizer.ggml.eos_token_id"), *ids("tokenizer.ggml.eot_token_id")]
    ends += ids("qwen_quant.eos_token_ids")
    keys = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    named = {name: tokens[i] for name, key in keys.items() for i in ids(f"tokenizer.ggml.{key}")}
    template = metadata.get("tokenizer.chat_template")
    return SpecialTokens(tuple(dict.fromkeys(ends)), named, template if isinstance(template, str) else None)
