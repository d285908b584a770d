"""How far the answers of number formats are from float32's: ours, torch's and llama.cpp's, on the same text.

    python benchmarks/rounding.py TEXT [--model smollm2] [--windows 16] [--length 256] [--without-peers]

TEXT is a plain-text file (or .gz). Of every next token of its first windows: the divergence KL(float32 || format) in
nats, and how often the most likely token is float32's; float32 is torch's own pass. Brackets are 95 % intervals over
windows (Student's t). llama.cpp is installed where `offramp bench --peers llama.cpp` keeps it.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from claims import shown
from seeds import over
from torch import Tensor

import offramp
from offramp.native.kernels import NativeError
from offramp.native.model import NativeModel
from offramp.peers.starting import LLAMA_CPP, folder_of, python_of
from offramp.peers.weights import FORMATS, gguf_file
from offramp.runs.tables import markdown
from offramp.tasks.rows import read_text

AT_ONCE = 128  # positions whose logits are held

Pass = Callable[[Tensor], Tensor]
"""Token ids [T] -> logits [T, V]."""


def native(model: NativeModel) -> Pass:
    """The native engine's pass over a text."""

    def logits(ids: Tensor) -> Tensor:
        hidden = model.run(model.start(ids[None]), 0, model.num_layers).hidden
        return torch.cat([model.readout(part)[0].float() for part in hidden.split(AT_ONCE, 1)])

    return logits


def llama_cpp(file: Path, length: int) -> Pass:
    """llama.cpp's, in this process, which has its package."""
    from llama_cpp import Llama  # type: ignore[import-not-found]

    threads = torch.get_num_threads()
    made = Llama(
        str(file), n_ctx=length, n_batch=length, n_threads=threads, n_threads_batch=threads, logits_all=True,
        verbose=False,
    )  # fmt: skip

    def logits(ids: Tensor) -> Tensor:
        made.reset()
        made.eval(ids.tolist())
        return torch.from_numpy(np.array(made.scores[: len(ids)])).float()

    return logits


def compared(want: Tensor, got: Tensor) -> list[float]:
    """The mean divergence of logits [T, V] from those that are exact, and the share of equal choices."""
    exact, other = want.log_softmax(-1), got.log_softmax(-1)
    divergence = (exact.exp() * (exact - other)).sum(-1).mean()
    return [float(divergence), float((want.argmax(-1) == got.argmax(-1)).double().mean())]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--without-peers", action="store_true")
    options = parser.parse_args(arguments)
    exact, coarse = (offramp.load(options.model, dtype=kind, device="cpu") for kind in ("float32", "bfloat16"))
    assert exact.tokenizer is not None
    count = options.windows * options.length
    ids = torch.tensor(exact.tokenizer(read_text(options.text), verbose=False)["input_ids"][:count])
    if options.windows < 2 or len(ids) < count:
        parser.error(f"{options.text} has {len(ids)} tokens; {count} are wanted, in two windows or more")
    passes: dict[str, Pass] = {
        "offramp bfloat16": native(NativeModel(coarse.model)),
        "offramp int8": native(NativeModel(coarse.model, rounded="int8")),
        "transformers bfloat16": lambda ids: coarse.model(ids[None]).logits[0].float(),
    }
    try:
        passes["offramp int4"] = native(NativeModel(coarse.model, rounded="int4"))
    except NativeError as error:
        print(f"left out: offramp int4, {error}", file=sys.stderr, flush=True)
    if not options.without_peers:
        python_of(LLAMA_CPP, {}, lambda line: print(line, file=sys.stderr, flush=True))  # installs it
        sys.path.append(str(folder_of(LLAMA_CPP)))
        passes |= {f"{LLAMA_CPP} {kind}": llama_cpp(gguf_file(coarse.model, kind), options.length) for kind in FORMATS}
    found: dict[str, list[list[float]]] = {name: [] for name in passes}
    for number, window in enumerate(ids.view(options.windows, -1), 1):
        want = exact.model(window[None]).logits[0]
        for name, each in passes.items():
            found[name].append(compared(want, each(window)))
        print(f"window {number} of {options.windows}", file=sys.stderr, flush=True)
    rows = []
    for name, values in found.items():
        divergence, same = zip(*values, strict=True)
        rows.append([name, shown(over(divergence), 2, 1e3), shown(over(same), 1, 100)])
    print(markdown(["format", "nats from float32, × 1000", "same most likely token, %"], rows))
    print(f"\n{options.windows} windows of {options.length} tokens of {options.text.name}, {options.model}.")


if __name__ == "__main__":
    main()
