"""`qwen-quant run`: text from a quantized file on the CPU, as it is generated."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_quant.cli import options

if TYPE_CHECKING:
    from qwen_quant.runtime.session import Session

Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", show_default=False, help="What to say to the model; '-' reads stdin."),
]
PromptFile = Annotated[
    Path | None, typer.Option("--file", "-f", show_default=False, help="Read the prompt from this text file.")
]
System = Annotated[str | None, typer.Option("--system", show_default=False, help="The system message.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Take the prompt without a chat template; do not stop at end-of-turn.")
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        show_default=False,
        help="Whether to think first, where the template knows it.",
    ),
]
MaxTokens = Annotated[
    int, typer.Option("-n", "--max-tokens", min=0, help="Generate at most this many tokens.")
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 always takes the most likely token.")]
TopK = Annotated[int, typer.Option("--top-k", help="Choose among this many tokens; 0 is off.")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Choose among the fewest with this much probability; 1 is off.")
]
MinP = Annotated[
    float, typer.Option("--min-p", help="Drop tokens below this share of the best one's; 0 is off.")
]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 makes seen tokens less likely.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", show_default=False, help="Makes sampling repeatable; random by default."),
]


@dataclass(frozen=True)
class Conversation:
    """What is said to the model, and how."""

    prompt: str
    system: str | None
    raw: bool
    thinking: bool | None


def command(
    model: options.Model,
    prompt: Prompt = None,
    file: PromptFile = None,
    max_tokens: MaxTokens = 256,
    system: System = None,
    raw: Raw = False,
    thinking: Thinking = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    threads: options.Threads = None,
    isa: options.Isa = "auto",
    json: options.Json = False,
) -> None:
    """Generate text on the CPU from a GGUF file or a checkpoint."""
    from qwen_quant.runtime.sampling import SamplingParams
    from qwen_quant.runtime.session import Session

    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    conversation = Conversation(read_prompt(prompt, file), system, raw, thinking)
    session = Session.open(find_file(model), n_threads=threads, isa=isa)
    ids = prompt_ids(session, conversation)
    stop_ids = frozenset() if raw else session.eos_ids
    decoder = session.tokenizer.decoder(skip_special=True)
    tokens: list[int] = []
    pieces: list[str] = []
    room = max(session.n_ctx - len(ids), 0)

    def emit(piece: str) -> None:
        pieces.append(piece)
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    try:
        for token in session.generate(ids, min(max_tokens, room), sampling, stop_ids):
            tokens.append(token)
            emit(decoder.push(token))
        emit(decoder.finish())
    finally:
        if not json and pieces:
            sys.stdout.write("\n")
    timings = session.timings
    if json:
        from qwen_quant.cli.output import print_json

        print_json(
            {
                "text": "".join(pieces),
                "tokens": tokens,
                "prompt_tokens": len(ids),
                "pp_tok_s": timings.pp_tok_s,
                "tg_tok_s": timings.tg_tok_s,
                "stop": "length" if len(tokens) == min(max_tokens, room) else "end_of_turn",
            }
        )
    elif sys.stderr.isatty():
        speed = f"{len(ids)} prompt tokens, {timings.pp_tok_s:.1f} tok/s"
        print(f"[{speed}; {len(tokens)} generated, {timings.tg_tok_s:.1f} tok/s]", file=sys.stderr)


def find_file(model: str) -> Path:
    """The GGUF file that MODEL names; a checkpoint folder is copied to one first."""
    path = Path(model).expanduser()
    if path.is_file():  # without the packages that reading a checkpoint needs
        return path
    from qwen_quant.checkpoint import resolve_model
    from qwen_quant.cli.cached import gguf_of

    path = resolve_model(model)
    return gguf_of(path) if path.is_dir() else path


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from -p, -f or standard input. Raises UsageError unless exactly one is given."""
    from qwen_quant.errors import QwenQuantError, UsageError

    if (prompt is None) == (file is None):
        raise UsageError("give the prompt with -p TEXT or -f FILE, one of them")
    if prompt is not None:
        return sys.stdin.read() if prompt == "-" else prompt
    assert file is not None
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise QwenQuantError(f"{file}: cannot be read ({error.strerror}); name a text file with -f") from None
    except UnicodeDecodeError as error:
        raise QwenQuantError(f"{file}: is not UTF-8 text (byte {error.start}); convert it first") from None


def prompt_ids(session: Session, conversation: Conversation) -> list[int]:
    """Token ids of the prompt: by the file's chat template when it has one, as plain text with --raw.

    Raises UsageError when a system message or thinking is asked for and there is no template to place it.
    """
    from qwen_quant.errors import UsageError

    tokenizer = session.tokenizer
    if conversation.raw or tokenizer.chat_template is None:
        if conversation.system is not None or conversation.thinking is not None:
            why = "--raw uses no chat template" if conversation.raw else "the file has no chat template"
            raise UsageError(f"{why}; leave --system and --thinking out")
        return tokenizer.encode(conversation.prompt, special=True)
    messages = [{"role": "user", "content": conversation.prompt}]
    if conversation.system is not None:
        messages.insert(0, {"role": "system", "content": conversation.system})
    return tokenizer.apply_chat_template(messages, enable_thinking=conversation.thinking)
