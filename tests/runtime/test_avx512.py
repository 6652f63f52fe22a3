"""The AVX-512 kernels on any CPU: SIMDe and plain models in place of the instructions."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "qwen_quant" / "csrc"
COMPILER = "g++"
PLAIN = [
    HERE / "check_kernels.cpp",
    HERE / "emulated" / "isas.cpp",
    *(CSRC / f"{name}.cpp" for name in ("kernels_scalar", "packed", "quant_blocks")),
]

pytestmark = [
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"{COMPILER} is not installed"),
    pytest.mark.skipif(
        not Path("/usr/include/simde").exists(), reason="SIMDe (libsimde-dev) is not installed"
    ),
]


def check(folder: Path, isa: str, *definitions: str) -> tuple[int, str]:
    """What check_kernels says of the kernels in kernels_<isa>.cpp."""
    flags = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-DQQ_X86", *definitions]
    emulated = ["-O0", "-D__AVX512VNNI__", f"-I{HERE / 'emulated'}", f"-I{CSRC}", "-Wno-psabi"]
    files = {source: ["-O1", f"-I{CSRC}"] for source in PLAIN}
    files |= {CSRC / "kernels_avx512bf16.cpp": emulated}
    if not definitions:
        files |= {CSRC / "kernels_avx512vnni.cpp": emulated}
    for source, own in files.items():
        command = [COMPILER, *flags, *own, "-c", source, "-o", folder / f"{source.stem}.o"]
        subprocess.run(command, check=True)
    subprocess.run([COMPILER, "-o", folder / "check", *sorted(folder.glob("*.o"))], check=True)
    done = subprocess.run([folder / "check", isa], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_bf16_products(tmp_path: Path) -> None:
    assert check(tmp_path, "avx512bf16", "-DQQ_WITHOUT_VNNI") == (0, "avx512bf16: 3 types checked\n")


@pytest.mark.skipif("QQ_EMULATE_VNNI" not in os.environ, reason="a minute of compiling; set QQ_EMULATE_VNNI")
def test_all_kernels(tmp_path: Path) -> None:
    assert check(tmp_path, "avx512vnni") == (0, "avx512vnni: 15 types checked\n")
