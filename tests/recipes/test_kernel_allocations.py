"""The kernel, compiled with a counting allocator."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from kernels import needs_kernel

pytestmark = needs_kernel


@pytest.mark.skipif(not shutil.which("g++") or platform.libc_ver()[0] != "glibc", reason="this takes g++ and glibc")
def test_warm_calls_allocate_nothing(tmp_path):
    root = Path(__file__).parents[2]
    sources = [root / "src/slimlstm/csrc" / f"{name}.cpp" for name in ("layer", "pack", "pool", "portable")]
    program = tmp_path / "allocations"
    command = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{sources[0].parent}", root / "tests/allocations.cpp"]
    subprocess.run([*command, *sources, "-o", program], check=True)
    counts = subprocess.run([program], check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    assert set(counts) == {"100 0"}
    assert len(counts) == 24
