"""Who may import whom: a file imports only from its own layer or the layers below it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"qwen_quant": ROOT / "qwen_quant"} | {
    f"qwen_quant.{name}": ROOT / name for name in ("cli", "exporters", "calib_data")
}
# From the ground up. A module belongs to the longest name here that starts its own.
LAYERS = (
    ("qwen_quant", "qwen_quant.errors", "qwen_quant.files", "qwen_quant.progress", "qwen_quant._core"),
    (
        "qwen_quant.config",
        "qwen_quant.dual_chunk",
        "qwen_quant.fixed",
        "qwen_quant.moe",
        "qwen_quant.names",
        "qwen_quant.qwen1",
        "qwen_quant.rope",
        "qwen_quant.spec",
        "qwen_quant.window",
    ),
    ("qwen_quant.grids", "qwen_quant.safetensors"),
    ("qwen_quant.checkpoint", "qwen_quant.tensor_source"),
    (
        "qwen_quant.tokenizer",
        "qwen_quant.tokenizer_files",
        "qwen_quant.tokenizer_ranks",
        "qwen_quant.tokenizer_vocabulary",
        "qwen_quant.byte_level",
        "qwen_quant.chat",
        "qwen_quant.chat_messages",
        "qwen_quant.chat_parsing",
    ),
    ("qwen_quant.model", "qwen_quant.runtime", "qwen_quant.calib_data"),
    ("qwen_quant.quantize",),
    ("qwen_quant.evaluate",),
    ("qwen_quant.exporters",),
    ("qwen_quant.cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Packages of one layer that must not know each other.
STRANGERS = {"qwen_quant.model", "qwen_quant.runtime", "qwen_quant.calib_data"}
TORCH = ("qwen_quant.model", "qwen_quant.quantize", "qwen_quant.evaluate")


def modules() -> dict[str, Path]:
    """Every Python file of the package under the name it is imported by."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def unit(module: str) -> str:
    """The entry of LAYERS that `module` belongs to."""
    candidates = [
        name for name in RANK if module == name or (module.startswith(name + ".") and name != "qwen_quant")
    ]
    if not candidates:
        raise AssertionError(f"{module} has no layer; give it one in {Path(__file__).name}")
    return max(candidates, key=len)


def imports(module: str, at_start: bool = False) -> Iterator[tuple[str, int]]:
    """What `module` imports, with the line; `at_start` leaves out functions and `if TYPE_CHECKING`."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    later = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    later += [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    inner = {id(node) for block in later for node in ast.walk(block)}
    for node in ast.walk(tree):
        if at_start and id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[module]}:{node.lineno}: relative import; write {module} out"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES or full in RANK else str(node.module), node.lineno


def test_every_folder_is_seen() -> None:
    assert {name.split(".")[1] for name in MODULES if "." in name} >= {
        "cli",
        "exporters",
        "calib_data",
        "model",
    }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_what_lies_below(module: str) -> None:
    mine = unit(module)
    for name, line in imports(module):
        place = f"{MODULES[module].relative_to(ROOT)}:{line}"
        top = name.split(".")[0]
        assert top not in ("cli", "exporters", "calib_data"), f"{place}: write qwen_quant.{name}"
        if top == "torch":
            assert mine in TORCH, f"{place}: torch belongs in {', '.join(TORCH)}"
        assert top not in ("transformers", "safetensors"), f"{place}: {top} is for tests only"
        if top != "qwen_quant":
            continue
        theirs = unit(name)
        assert RANK[theirs] <= RANK[mine], f"{place}: {mine} lies below {theirs}"
        if mine != theirs:
            assert not {mine, theirs} <= STRANGERS, f"{place}: {mine} must not know {theirs}"


def test_exporters_do_not_know_each_other() -> None:
    """Files of one exporter share its name as a prefix: gguf.py, gguf_metadata.py."""
    names = {module.removeprefix("qwen_quant.exporters.") for module in MODULES if ".exporters." in module}
    for name in names:
        for imported, line in imports(f"qwen_quant.exporters.{name}"):
            other = imported.removeprefix("qwen_quant.exporters.")
            if other in names:
                place = f"exporters/{name}.py:{line}"
                assert other.split("_")[0] == name.split("_")[0], f"{place}: imports exporter {other}"


def closure(module: str) -> set[str]:
    """Everything that importing `module` imports, by our own files."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        for name, _ in imports(current, at_start=True):
            if name not in seen:
                seen.add(name)
                if name in MODULES:
                    waiting.append(name)
    return seen


@pytest.mark.parametrize(
    "module",
    [
        "qwen_quant.runtime",
        "qwen_quant.checkpoint",
        "qwen_quant.tokenizer",
        "qwen_quant.cli",
        "qwen_quant.cli.run",
        "qwen_quant.cli.bench",
        "qwen_quant.runtime.bench",
        "qwen_quant.runtime.agreement",
    ],
)
def test_running_a_file_needs_no_torch(module: str) -> None:
    heavy = {name.split(".")[0] for name in closure(module)} & {"torch", "transformers", "gguf", "datasets"}
    assert not heavy


def in_new_interpreter(code: str) -> str:
    # Elsewhere than in the checkout, whose own folders would come first on the path.
    command, folder = [sys.executable, "-c", code], tempfile.gettempdir()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_else() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'tokenizers', 'jinja2', 'typer'}"
    assert in_new_interpreter(f"import sys, qwen_quant; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("module", ["qwen_quant.runtime", "qwen_quant.cli", "qwen_quant.cli.run"])
def test_torch_stays_unloaded(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    assert in_new_interpreter(code) == "[]"
