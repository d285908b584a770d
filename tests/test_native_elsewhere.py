"""Products of the kernels on processors that this machine may not be: compiled for them, run where that can be had."""

import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from offramp.native.kernels import FLAGS, NativeError, find_compiler

HERE = platform.machine() in ("x86_64", "AMD64")
ELSEWHERE = ("aarch64-linux-gnu-g++ -static", "qemu-aarch64")  # Debian: g++-aarch64-linux-gnu, qemu-user
TARGETS = {
    "this one": ("", "", "-march=native" if HERE else "-mcpu=native"),
    "no AVX": ("", "", "-march=x86-64"),
    "ARM": (*ELSEWHERE, "-march=armv8-a"),
    "ARM with products of bytes": (*ELSEWHERE, "-march=armv8.2-a+dotprod"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_products_are_right_and_rows_do_not_depend_on_others(target, tmp_path):
    compiler, emulator, flags = TARGETS[target]
    if target == "no AVX" and not HERE:
        pytest.skip("this is no x86 processor")
    missing = [name for name in (compiler.partition(" ")[0], emulator) if name and not shutil.which(name)]
    if missing:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    try:
        command = shlex.split(compiler) or find_compiler()
    except NativeError as error:
        pytest.skip(str(error))
    made, source = tmp_path / "products", Path(__file__).with_name("products.cpp")
    optimised = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run([*command, *optimised, flags, str(source), "-o", str(made)], check=True, timeout=300)
    done = subprocess.run([*emulator.split(), str(made)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
