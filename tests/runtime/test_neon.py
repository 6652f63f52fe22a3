"""The NEON kernels, built by a cross compiler and run by an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "qwen_quant" / "csrc"
SOURCES = ["kernels_neon.cpp", "kernels_scalar.cpp", "packed.cpp", "quant_blocks.cpp"]


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"{COMPILER} is not installed")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"{EMULATOR} (qemu-user) is not installed")
def test_packed_kernels(tmp_path: Path) -> None:
    program = tmp_path / "check_kernels"
    subprocess.run(
        [
            COMPILER, "-std=c++17", "-O0", "-static", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
            "-march=armv8.2-a+dotprod", "-DQQ_NEON", "-DQQ_CHECKED=neon_kernels", f"-I{CSRC}", "-o", program,
            HERE / "check_kernels.cpp", *(CSRC / name for name in SOURCES),
        ],
        check=True,
    )  # fmt: skip
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "neon: 12 types checked\n")
