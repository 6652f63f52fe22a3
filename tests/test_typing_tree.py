"""Type checking sees every folder: the links that stand in for an editable install's mapping are complete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = ROOT / "build" / "typing" / "qwen_quant"
MAPPED = ("cli", "exporters", "calib_data")

pytestmark = pytest.mark.skipif(
    not TREE.is_dir(), reason="no build/typing: made by an editable install (pip install -e .) only"
)


def python_files(folder: Path) -> set[str]:
    # Followed by hand: rglob does not go through links to folders.
    found = set()
    for path in folder.iterdir():
        if path.name == "__pycache__":
            continue
        if path.is_dir():
            found |= {f"{path.name}/{name}" for name in python_files(path)}
        elif path.suffix in (".py", ".pyi"):
            found.add(path.name)
    return found


def test_the_links_cover_all_sources() -> None:
    """After adding or removing a file or folder beside the others in qwen_quant/, install again."""
    expected = python_files(ROOT / "qwen_quant")
    for name in MAPPED:
        expected |= {f"{name}/{file}" for file in python_files(ROOT / name)}
    assert python_files(TREE) == expected


def test_the_links_lead_to_the_sources() -> None:
    for path in TREE.iterdir():
        source = ROOT / path.name if path.name in MAPPED else ROOT / "qwen_quant" / path.name
        assert path.resolve() == source.resolve()


def test_mypy_reports_errors_in_every_folder(tmp_path: Path) -> None:
    """mypy says Success about folders it cannot find, so plant an error in each and look for it."""
    package = tmp_path / "typing" / "qwen_quant"
    package.mkdir(parents=True)
    for path in TREE.iterdir():
        if path.name in MAPPED:
            (package / path.name).mkdir()
            (package / path.name / "__init__.py").touch()
            (package / path.name / "planted.py").write_text('wrong: int = "text"\n')
        elif path.name in ("__init__.py", "errors.py"):
            (package / path.name).symlink_to(path.resolve())
    (package / "planted.py").write_text('wrong: int = "text"\n')
    config = (ROOT / "pyproject.toml").read_text().replace("build/typing", str(tmp_path / "typing"))
    (tmp_path / "pyproject.toml").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    for place in ("planted.py", *(f"{name}/planted.py" for name in MAPPED)):
        assert f"qwen_quant/{place}:1: error" in done.stdout, done.stdout + done.stderr
