"""Compiles the kernels of exit tests for GPUs of one compute capability: python FILE 90. Needs Triton and no GPU."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offramp.cuda import kernels

NUMBERS = {"values": "*fp32", "sums": "*fp32", "logits": "*fp32", "tokens": "*i32", "ids": "*i64", "eps": "fp32"}
COMMON = {"TOKENS": 16, "CHUNK": 128}
RMS = {**COMMON, "KIND": 1, "PLUS": 0.0, "EARLY": True, "shift": None, "bias": None, "scale": None, "factor": None}
LAYER = {**COMMON, "KIND": 2, "PLUS": 1.0, "EARLY": False, "ids": None, "logits": None}
CASES = [
    ("linear", "*bf16", {**COMMON, "ROWS": 16}),
    ("scores", "*bf16", {**RMS, "ROWS": 1, "cap": None}),
    ("scores", "*fp16", {**RMS, "ROWS": 16, "TOKENS": 64, "ids": None}),
    ("scores", "*fp32", {**LAYER, "ROWS": 16}),
    ("merge", "", {"BLOCKS": 2048}),
]


def kind(name: str, states: str) -> str:
    """The type of a kernel's argument."""
    if name in {"states", "gain", "shift", "head", "bias", "matrix", "added"} or (name == "made" and states):
        return states
    named = {"made": "*i32", "scale": "fp32", "factor": "fp32", "cap": "fp32"}
    return NUMBERS.get(name) or named.get(name, "i32")


for kernel, states, fixed in CASES:
    function = getattr(kernels, kernel)
    signature = {name: "constexpr" if name in fixed else kind(name, states) for name in function.arg_names}
    made = triton.compile(
        ASTSource(function, signature, constexprs=fixed), target=GPUTarget("cuda", int(sys.argv[1]), 32)
    )
    assert made.asm["cubin"]
    sys.stdout.write(f"{kernel}\n")
