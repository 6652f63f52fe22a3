"""`qwen-quant run`: text from a quantized file on the CPU, as it is generated."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_quant.cli import options

if TYPE_CHECKING:
    from qwen_quant.cli.prompts import Request
    from qwen_quant.runtime.conversation import Conversation
    from qwen_quant.runtime.sampling_params import SamplingParams
    from qwen_quant.runtime.session import Session

Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        show_default=False,
        help="What to say to the model; '-' reads stdin. Without one, a terminal becomes a chat.",
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option("--file", "-f", show_default=False, help="Read the prompt from this text file.")
]
MessagesFile = Annotated[
    str | None,
    typer.Option(
        "--messages",
        metavar="FILE",
        show_default=False,
        help="A JSON file with a conversation in OpenAI's chat format; '-' reads stdin.",
    ),
]
ToolsFile = Annotated[
    Path | None,
    typer.Option(
        "--tools",
        metavar="FILE",
        show_default=False,
        help="A JSON file with the schemas of functions that the model may call.",
    ),
]
System = Annotated[str | None, typer.Option("--system", show_default=False, help="The system message.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Take the prompt without a chat template; do not stop at end-of-turn.")
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        "--think/--no-think",
        show_default=False,
        help="Whether to think first, where the template knows it.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--max-tokens",
        min=0,
        show_default="256; in a chat, what fits into the context",
        help="Generate at most this many tokens.",
    ),
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
KVCache = Annotated[
    str | None,
    typer.Option("--kv-cache", show_default="f16", help="Both cache types: f16, int8, int4 or auto."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", show_default=False, help="Makes sampling repeatable; random by default."),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        min=1,
        max=256,
        help="Write this many answers, side by side: the prompt is read once, the weights once for a token of each. "
        "Seeds count up from --seed.",
    ),
]
Lookup = Annotated[
    bool,
    typer.Option(
        "--lookup/--no-lookup",
        help="Guess tokens where the text says again what it said before, and check them together: faster "
        "where text repeats, slower where it does not; the same text either way.",
    ),
]
DraftMax = Annotated[
    int, typer.Option("--draft-max", min=1, max=128, help="Tokens that --lookup guesses at a time, at most.")
]
CtxSize = Annotated[
    int | None,
    typer.Option(
        "--ctx-size",
        "-c",
        min=1,
        show_default="what the model was made for",
        help="Tokens that prompt and answer may have together; memory is taken as they come.",
    ),
]
PromptCache = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache",
        metavar="FILE",
        show_default=False,
        help="Keep what the model computes of the prompt in FILE, and read no more of the prompt than is new "
        "next time; a chat is kept whole.",
    ),
]

DEFAULT_MAX_TOKENS = 256


def command(
    model: options.Model,
    prompt: Prompt = None,
    file: PromptFile = None,
    messages: MessagesFile = None,
    tools: ToolsFile = None,
    max_tokens: MaxTokens = None,
    system: System = None,
    raw: Raw = False,
    thinking: Thinking = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    samples: Samples = 1,
    lookup: Lookup = False,
    draft_max: DraftMax = 8,
    ctx_size: CtxSize = None,
    prompt_cache: PromptCache = None,
    threads: options.Threads = None,
    isa: options.Isa = "auto",
    cache_type_k: options.CacheTypeK = None,
    cache_type_v: options.CacheTypeV = None,
    kv_cache: KVCache = None,
    json: options.Json = False,
) -> None:
    """Generate text on the CPU from a GGUF file or a checkpoint; without a prompt, chat on the terminal."""
    from qwen_quant.cli.prompts import read_request
    from qwen_quant.errors import UsageError

    if samples > 1 and (lookup or prompt_cache):
        raise UsageError("--samples goes without --lookup and --prompt-cache; leave them out")
    request = read_request(
        prompt, file, messages, tools, system=system, raw=raw, thinking=thinking, json=json
    )
    session = open_session(
        find_file(model),
        n_threads=threads,
        isa=isa,
        n_ctx=ctx_size,
        cache_type_k=cache_type_k or kv_cache or "f16",
        cache_type_v=cache_type_v or kv_cache or "f16",
    )
    from qwen_quant.runtime.sampling_params import SamplingParams

    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if sampling.needs_logits:  # NumPy takes its time, too: now, while the weights are loaded
        import_module("qwen_quant.runtime.sampling")
    session.draft_max = draft_max if lookup else 0
    request.check(session.tokenizer)
    limit = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    save = kept_prompt(session, prompt_cache) if prompt_cache else None
    if request.interactive:
        chat(session, request, sampling, max_tokens)
        if save:
            save()
    elif samples > 1:
        from qwen_quant.cli.samples import complete_all

        complete_all(session, request, sampling, limit, samples)
    else:
        session.after_prompt = save
        answer = go_on if request.is_plain(session.tokenizer) else complete
        answer(session, request, sampling, limit)


def open_session(path: Path, **options: Any) -> Session:
    """What is in `path`, with the options of Session.open. The weights of a GGUF file are loaded while Python imports
    what it needs and the tokenizer is built."""
    from qwen_quant.runtime.loading import Loading

    loading = Loading(path, **options) if path.is_file() else None
    from qwen_quant.runtime.session import Session

    return Session.of(loading) if loading else Session.open(path, **options)


def kept_prompt(session: Session, path: Path) -> Callable[[], None]:
    """Begins with the context that `path` holds, if it exists; returns what writes the context there.

    Raises FormatError when the file belongs to another model, or is something else.
    """
    from qwen_quant.runtime import prompt_cache

    if path.exists():
        prompt_cache.load(session, path)
    known = list(session.tokens)

    def save() -> None:
        if session.n_past and known[: session.n_past] != session.tokens:
            prompt_cache.save(session, path)

    return save


def find_file(model: str) -> Path:
    """The GGUF file or ONNX folder that MODEL names; a checkpoint folder is copied to a GGUF file first."""
    path = Path(model).expanduser()
    if path.is_file():  # without the packages that reading a checkpoint needs
        return path
    from qwen_quant.runtime.onnx import is_onnx_folder

    if is_onnx_folder(path):
        return path
    from qwen_quant.checkpoint import resolve_model
    from qwen_quant.cli.cached import gguf_of

    path = resolve_model(model)
    return gguf_of(path) if path.is_dir() else path


def chat(session: Session, request: Request, sampling: SamplingParams, max_tokens: int | None) -> None:
    """Answer line after line on the terminal."""
    from qwen_quant.cli.chat import Chat

    Chat(conversation_of(session, request, sampling), max_tokens).run()


def complete(session: Session, request: Request, sampling: SamplingParams, max_tokens: int) -> None:
    """Print the answer to a conversation."""
    from qwen_quant.cli import answers

    conversation = conversation_of(session, request, sampling)
    answers.output(conversation.ask((), max_tokens), request.json)
    assert conversation.completion is not None
    answer = conversation.answer
    parsed = {"message": answer.as_message(), "errors": answer.errors}
    answers.report(session, conversation.completion, json=request.json, parsed=parsed)
    for error in answer.errors:
        answers.note(error)


def go_on(session: Session, request: Request, sampling: SamplingParams, max_tokens: int) -> None:
    """Print what the prompt as it stands goes on with."""
    from qwen_quant.chat_parsing import Piece
    from qwen_quant.cli import answers
    from qwen_quant.runtime.conversation import Completion

    ids = session.tokenizer.encode(request.prompt or "", special=True)
    stop_ids = frozenset() if request.raw else session.eos_ids
    completion = Completion(session, ids, max_tokens, sampling, stop_ids)
    answers.output((Piece("content", text) for text in completion), request.json)
    answers.report(session, completion, json=request.json)


def conversation_of(session: Session, request: Request, sampling: SamplingParams) -> Conversation:
    """The conversation up to what the model answers first."""
    from qwen_quant.runtime.conversation import Conversation

    return Conversation(
        session, request.messages, tools=request.tools, thinking=request.thinking, sampling=sampling
    )
