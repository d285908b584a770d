"""What runs in a peer's own process: it loads a model once and answers requests, one JSON object per line.

This file is run by the peer's Python, which need not have offramp, so it imports nothing of it. The first line on
standard input says what to load and gets {"versions": {...}}; every further one, {"ids": [...], "new": N}, gets
{"tokens": [...], "seconds": ..., "first": ...}: N tokens chosen greedily, the wall-clock seconds they took, and those
until the first of them. What goes wrong is answered as {"error": ...}. The process ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[int], int, Callable[[], None]], list[int]]
"""(prompt ids, number of new tokens, what to call when a token is known) -> the new tokens."""
Loaded = tuple[dict[str, str], Generate]
"""Versions, and what generates."""


def llama_cpp(file: str, context: int, threads: int, tiles: bool) -> Loaded:
    """llama.cpp on a GGUF file, through its C interface: the Python around it keeps a copy of all logits.

    Args:
        file: The GGUF file.
        context: Most tokens of a prompt and its continuation.
        threads: For prompts and for single tokens.
        tiles: Whether weights may be packed for matrix instructions such as AMX.

    Returns:
        Versions, and what generates.

    Raises:
        RuntimeError: It cannot load the file, or there is no room.
    """
    import ctypes

    import llama_cpp as c
    import numpy as np

    said: list[str] = []
    hear = c.llama_log_callback(
        lambda level, text, _: said.append(text.decode(errors="replace")) if level == 4 else None
    )
    c.llama_log_set(hear, None)  # errors only, for the message below
    c.llama_backend_init()
    options = c.llama_model_default_params()
    options.n_gpu_layers, options.use_extra_bufts = 0, tiles
    model = c.llama_model_load_from_file(file.encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {file}: {' '.join(said)}")
    settings = c.llama_context_default_params()
    settings.n_ctx = settings.n_batch = context
    settings.n_threads = settings.n_threads_batch = threads
    session = c.llama_init_from_model(model, settings)
    if not session:
        raise RuntimeError(f"llama.cpp cannot make room for keys and values: {' '.join(said)}")
    size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    row = ctypes.POINTER(ctypes.c_float * size)

    def generate(ids: list[int], new: int, known: Callable[[], None]) -> list[int]:
        c.llama_memory_clear(c.llama_get_memory(session), False)
        tokens: list[int] = []
        todo = ids
        while True:
            array = (c.llama_token * len(todo))(*todo)  # named, so that it lives as long as it is read
            if c.llama_decode(session, c.llama_batch_get_one(array, len(todo))):
                raise RuntimeError("llama.cpp cannot decode")
            assert hear is not None  # llama.cpp calls it as long as it runs
            scores = np.frombuffer(ctypes.cast(c.llama_get_logits_ith(session, -1), row).contents, dtype=np.float32)
            tokens.append(int(scores.argmax()))
            known()
            if len(tokens) == new:
                return tokens
            todo = tokens[-1:]

    features = [part.split(" = ")[0].split(":")[-1].strip() for part in c.llama_print_system_info().decode().split("|")]
    built = " ".join(filter(None, features)) + ("" if tiles else ", weights not packed for AMX")
    return {"llama-cpp-python": c.__version__, "built with": built}, generate


def economize(folder: str, dtype: str, threads: int, threshold: float, min_layer: int) -> Loaded:
    """CALM decoding of economize: a token leaves when the gap of the two best probabilities is above a threshold.

    Args:
        folder: The model, as transformers saves it.
        dtype: Number format of the weights.
        threads: Of torch.
        threshold: Of all tests.
        min_layer: First layer after which a token may leave.

    Returns:
        Versions, and what generates.
    """
    import economize as package
    import torch
    import transformers
    from economize.techniques.dynamic_depth import CalmConfig

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    model = package.apply(base, CalmConfig(confidence="softmax", threshold=threshold, min_layer=min_layer))

    def generate(ids: list[int], new: int, known: Callable[[], None]) -> list[int]:
        def stop(_so_far: torch.Tensor) -> bool:
            known()
            return False

        tokens: list[int] = model.decode(torch.tensor(ids), new, stop=stop).tokens.tolist()
        return tokens

    versions = {"economize": package.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return versions, generate


PEERS: dict[str, Callable[..., Loaded]] = {"llama.cpp": llama_cpp, "economize": economize}


def answer(generate: Generate, ids: list[int], new: int) -> dict[str, Any]:
    """One timed generation."""
    seen: list[float] = []

    def known() -> None:
        if not seen:
            seen.append(time.perf_counter())

    began = time.perf_counter()
    tokens = generate(ids, new, known)
    ended = time.perf_counter()
    return {"tokens": tokens, "seconds": ended - began, "first": (seen or [ended])[0] - began}


def main() -> None:
    """Answer the lines of standard input. Whatever else is printed goes to standard error."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - sys.path holds strings
    sys.path[:] = [place for place in sys.path if place != here]  # this folder's files are not packages
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(values: dict[str, Any]) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    try:
        settings = json.loads(sys.stdin.readline())
        versions, generate = PEERS[settings.pop("peer")](**settings)
        say({"versions": {"python": sys.version.split()[0], **versions}})
        for line in sys.stdin:
            asked = json.loads(line)
            say(answer(generate, asked["ids"], asked["new"]))
    except Exception as error:  # whatever the engine came up with: the other side says it in one line
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
