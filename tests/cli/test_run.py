"""`qwen-quant run`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_quant.runtime import prompt_cache
from qwen_quant.runtime.session import Session
from qwen_quant.tokenizer import Tokenizer

PROMPT = "The harbour was"


def test_json_contract(cli: Callable, gguf_file: Path, tokenizer: Tokenizer) -> None:
    found = cli("run", gguf_file, "-p", PROMPT, "--raw", "-n", "12", "--json").json
    assert {"text", "tokens", "prompt_tokens", "pp_tok_s", "tg_tok_s"} <= found.keys()
    assert len(found["tokens"]) == 12
    assert found["text"] == tokenizer.decode(found["tokens"], skip_special=True)
    assert found["prompt_tokens"] == len(tokenizer.encode(PROMPT))
    assert found["pp_tok_s"] > 0
    assert found["tg_tok_s"] > 0


def test_tokens_are_the_sessions_greedy_ones(cli: Callable, gguf_file: Path) -> None:
    session = Session.open(gguf_file)
    expected = list(session.generate(session.tokenizer.encode(PROMPT), 8))
    assert cli("run", gguf_file, "-p", PROMPT, "--raw", "-n", "8", "--json").json["tokens"] == expected


def test_text_streams_to_stdout(cli: Callable, gguf_file: Path) -> None:
    arguments = ["run", gguf_file, "-p", PROMPT, "--raw", "-n", "12"]
    plain = cli(*arguments)
    assert (plain.code, plain.err) == (0, "")
    assert plain.out == cli(*arguments, "--json").json["text"] + "\n"


def test_chat_template_is_used_unless_raw(cli: Callable, gguf_file: Path, tokenizer: Tokenizer) -> None:
    found = cli(
        "run", gguf_file, "-p", PROMPT, "--system", "Be brief.", "--no-thinking", "-n", "1", "--json"
    ).json
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    assert found["prompt_tokens"] == len(tokenizer.apply_chat_template(messages, enable_thinking=False))
    assert found["prompt_tokens"] > len(tokenizer.apply_chat_template(messages))


def test_only_raw_goes_on_after_end_of_turn(
    cli: Callable, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "eos_ids", frozenset(range(5000)))
    chat = cli("run", gguf_file, "-p", PROMPT, "-n", "5", "--json").json
    assert (chat["tokens"], chat["text"], chat["stop"]) == ([], "", "end_of_turn")
    raw = cli("run", gguf_file, "-p", PROMPT, "-n", "5", "--raw", "--json").json
    assert (len(raw["tokens"]), raw["stop"]) == (5, "length")


def test_generation_ends_with_the_context(cli: Callable, gguf_file: Path) -> None:
    session = Session.open(gguf_file)
    prompt = "a " * (session.n_ctx - 20)
    length = len(session.tokenizer.encode(prompt))
    assert session.n_ctx - 40 < length < session.n_ctx
    found = cli("run", gguf_file, "-p", prompt, "--raw", "-n", "1000", "--json").json
    assert len(found["tokens"]) == session.n_ctx - length


def test_a_prompt_longer_than_the_context_is_refused(cli: Callable, gguf_file: Path) -> None:
    found = cli("run", gguf_file, "-p", "word " * 5000, "--raw")
    assert (found.code, found.out) == (1, "")
    assert found.err.startswith("qwen-quant: ")
    assert "raise n_ctx (-c)" in found.err
    assert found.err.count("\n") == 1


def test_the_context_is_as_large_as_asked(cli: Callable, gguf_file: Path) -> None:
    arguments = ["run", gguf_file, "-p", "word " * 40, "--raw", "--json"]
    assert cli(*arguments, "-c", "30").code == 1
    length = cli(*arguments, "-n", "0").json["prompt_tokens"]
    found = cli(*arguments, "-c", length + 5).json
    assert (len(found["tokens"]), found["stop"]) == (5, "context")
    n_ctx = Session.open(gguf_file).n_ctx
    longer = cli("run", gguf_file, "-p", "a " * n_ctx, "--raw", "-n", "1", "--json", "-c", 4 * n_ctx)
    assert longer.json["prompt_tokens"] > n_ctx


def test_sampling_repeats_with_its_seed(cli: Callable, gguf_file: Path) -> None:
    def sample(seed: int) -> list[int]:
        options = ["--temperature", "1.5", "--top-k", "200", "--top-p", "0.99", "--min-p", "0.001"]
        options += ["--repetition-penalty", "1.1", "--seed", seed]
        return cli("run", gguf_file, "-p", PROMPT, "--raw", "-n", "16", "--json", *options).json["tokens"]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_samples_are_the_answers_of_their_seeds(cli: Callable, gguf_file: Path, tokenizer: Tokenizer) -> None:
    arguments = ["run", gguf_file, "-p", PROMPT, "--raw", "-n", "16", "--temperature", "1.5", "--seed"]
    found = cli(*arguments, "3", "--samples", "3", "--json").json
    assert found["prompt_tokens"] == len(tokenizer.encode(PROMPT))
    for seed, sample in enumerate(found["samples"], start=3):
        alone = cli(*arguments, seed, "--json").json
        assert {key: alone[key] for key in sample} == sample
        assert {"text", "tokens", "stop"} <= sample.keys()
    printed = cli(*arguments, "3", "--samples", "3")
    assert printed.code == 0
    expected = (f"--- {i} of 3 ---\n{sample['text']}\n" for i, sample in enumerate(found["samples"], start=1))
    assert printed.out == "".join(expected)


def test_samples_of_a_conversation(cli: Callable, gguf_file: Path) -> None:
    arguments = ["run", gguf_file, "-p", PROMPT, "-n", "16", "--json"]
    alone = cli(*arguments).json
    for sample in cli(*arguments, "--samples", "2").json["samples"]:  # greedy ones are all alike
        assert sample == {key: alone[key] for key in sample}
        assert "message" in sample


def test_samples_end_with_the_context(cli: Callable, gguf_file: Path) -> None:
    found = cli("run", gguf_file, "-p", PROMPT, "--raw", "-c", "20", "--samples", "2", "--json").json
    for sample in found["samples"]:
        assert (len(sample["tokens"]), sample["stop"]) == (20 - found["prompt_tokens"], "context")


@pytest.mark.parametrize("options", [["--lookup"], ["--prompt-cache", "FILE"]])
def test_samples_refuse_what_they_cannot_do(options: list[str], cli: Callable, gguf_file: Path) -> None:
    found = cli("run", gguf_file, "-p", PROMPT, "--samples", "2", *options)
    assert (found.code, found.out) == (2, "")
    assert options[0] in found.err


@pytest.mark.parametrize("options", [[], ["--temperature", "0.8", "--top-k", "20", "--seed", "5"]])
def test_lookup_changes_no_text(options: list[str], cli: Callable, gguf_file: Path) -> None:
    arguments = ["run", gguf_file, "-p", f"{PROMPT} quiet. {PROMPT} quiet. {PROMPT}", "--raw", "-n", "64"]
    arguments += ["--json", *options]
    plain, guessed = cli(*arguments).json, cli(*arguments, "--lookup", "--draft-max", "5").json
    assert guessed["tokens"] == plain["tokens"]
    assert 0 < guessed["accepted"] <= guessed["drafted"]
    assert "drafted" not in plain


@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_is_read_once(raw: bool, cli: Callable, gguf_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "prompt.cache"
    options = ["-n", "12", "--json", *(["--raw"] if raw else [])]
    plain = cli("run", gguf_file, "-p", PROMPT, *options).json
    first = cli("run", gguf_file, "-p", PROMPT, *options, "--prompt-cache", cache).json
    saved = cache.read_bytes()
    second = cli("run", gguf_file, "-p", PROMPT, *options, "--prompt-cache", cache).json
    assert plain["tokens"] == first["tokens"] == second["tokens"]
    assert plain["prompt_tokens"] == second["prompt_tokens"]
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, plain["prompt_tokens"] - 1)
    assert cache.read_bytes() == saved
    longer = f"{PROMPT} so quiet"
    expected = cli("run", gguf_file, "-p", longer, *options).json
    third = cli("run", gguf_file, "-p", longer, *options, "--prompt-cache", cache).json
    assert third["tokens"] == expected["tokens"]
    assert 0 < third["cached_tokens"] <= second["prompt_tokens"]
    assert cache.read_bytes() != saved


def test_a_file_that_is_no_prompt_cache_is_left_alone(cli: Callable, gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader")
    found = cli("run", gguf_file, "-p", PROMPT, "-n", "1", "--prompt-cache", tmp_path / "letter.txt")
    assert (found.code, found.out) == (1, "")
    assert "letter.txt: is no prompt cache" in found.err
    assert found.err.count("\n") == 1
    assert (tmp_path / "letter.txt").read_text() == "Dear reader"


def test_scalar_kernels_on_one_thread_say_the_same(cli: Callable, gguf_file: Path) -> None:
    arguments = ["run", gguf_file, "-p", PROMPT, "--raw", "-n", "16", "--json"]
    scalar = cli(*arguments, "--isa", "scalar", "-t", "1").json
    assert scalar["tokens"] == cli(*arguments).json["tokens"]


def test_prompt_from_a_file_and_from_stdin(
    cli: Callable, process: Callable, gguf_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    expected = cli("run", gguf_file, "-p", PROMPT, "-n", "3", "--json").json["tokens"]
    assert (
        cli("run", gguf_file, "-f", tmp_path / "prompt.txt", "-n", "3", "--json").json["tokens"] == expected
    )
    assert process("run", gguf_file, "-p", "-", "-n", "3", "--json", stdin=PROMPT).json["tokens"] == expected


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "with -p TEXT or -f FILE"),
        (["-p", "x", "-f", "y"], 2, "one of them"),
        (["-f", "/nowhere/prompt.txt"], 1, "/nowhere/prompt.txt: cannot be read"),
        (["-p", "x", "--raw", "--system", "y"], 2, "--raw uses no chat template"),
        (["-p", "x", "--top-p", "7"], 2, "top_p is 7.0"),
        (["-p", "x", "--isa", "mmx"], 1, "isa 'mmx' is unknown"),
        (["-p", "", "--raw"], 1, "the prompt is empty"),
    ],
)
def test_bad_options_are_named(
    options: list[str], code: int, message: str, cli: Callable, gguf_file: Path
) -> None:
    found = cli("run", gguf_file, *options)
    assert (found.code, found.out) == (code, "")
    assert message in found.err
    assert found.err.count("\n") == 1


def test_a_checkpoint_folder_runs_through_a_copy(
    cli: Callable, make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_model()
    first = cli("run", folder, "-p", PROMPT, "-n", "3", "--raw", "--json").json
    copies = list((tmp_path / "cache").rglob("*.gguf"))
    assert len(copies) == 1
    assert cli("run", folder, "-p", PROMPT, "-n", "3", "--raw", "--json").json["tokens"] == first["tokens"]
    assert list((tmp_path / "cache").rglob("*.gguf")) == copies
    make_model(seed=5)
    assert cli("run", folder, "-p", PROMPT, "-n", "3", "--raw", "--json").json["tokens"] != first["tokens"]
    assert len(list((tmp_path / "cache").rglob("*.gguf"))) == 1


def test_a_closed_pipe_ends_quietly(gguf_file: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "qwen_quant.cli",
        "run",
        str(gguf_file),
        "--raw",
        "-p",
        PROMPT,
        "-n",
        "2000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_chat_is_kept_whole(
    cli: Callable, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Hello!", "And the sea?"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    found = cli("run", gguf_file, "-n", "6", "--lookup", "--prompt-cache", tmp_path / "chat.cache")
    assert found.code == 0
    session = Session.open(gguf_file)
    prompt_cache.load(session, tmp_path / "chat.cache")
    text = session.tokenizer.decode(list(session.tokens))
    assert text.index("Hello!") < text.index("And the sea?")
