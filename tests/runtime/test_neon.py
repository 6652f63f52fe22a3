"""The NEON kernels, built by a cross compiler and run by an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "qwen_quant" / "csrc"
BASELINE = ("cpu", "kernels_scalar", "packed", "quant_blocks")
# With their flags: CMakeLists.txt's, and some speed for what the emulator spends most of its time in.
SOURCES = {
    HERE / "check_kernels.cpp": "-O1",
    **{CSRC / f"{name}.cpp": "-O1" for name in BASELINE},
    CSRC / "kernels_neon.cpp": "-march=armv8.2-a+dotprod",
    CSRC / "kernels_neon_i8mm.cpp": "-march=armv8.2-a+dotprod+i8mm",
}


def build(folder: Path) -> Path:
    flags = [
        "-std=c++17",
        "-O0",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-DQQ_NEON",
        f"-I{CSRC}",
    ]
    for source, own in SOURCES.items():
        command = [COMPILER, *flags, *own.split(), "-c", source, "-o", folder / f"{source.stem}.o"]
        subprocess.run(command, check=True)
    subprocess.run([COMPILER, "-static", "-o", folder / "check", *sorted(folder.glob("*.o"))], check=True)
    return folder / "check"


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"{COMPILER} is not installed")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"{EMULATOR} (qemu-user) is not installed")
def test_kernels_and_their_choice(tmp_path: Path) -> None:
    """One test, because building takes its time."""
    program = build(tmp_path)

    def run(*arguments: str, cpu: str = "max") -> tuple[int, list[str]]:
        done = subprocess.run([EMULATOR, "-cpu", cpu, program, *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    assert run(cpu="cortex-a72") == (0, ["scalar"])
    assert run(cpu="cortex-a76") == (0, ["scalar", "neon"])
    assert run() == (0, ["scalar", "neon", "neon-i8mm"])
    for isa in ("neon", "neon-i8mm"):
        assert run(isa) == (0, [f"{isa}: 15 types checked"])
