"""What one pass of the native engine costs, by number of tokens, beside a plain read of the same bytes.

    python benchmarks/native_kernels.py [--formats bfloat16,int8,int4] [--tokens 1,2,4,8,300] [--context 100]
                                        [--rounds 20]

Random weights of SmolLM2-135M's shape (with int4 of sixteen values in each 32 columns, but for the head); all blocks
and the readout of the last eight tokens. Everything takes turns in every round, after three that are not counted;
medians and quartiles are over the rounds. "of the probe" is the time of the read divided by that of the pass: what it
reaches of the machine's bandwidth. For prompts it says nothing: they are bound by arithmetic, see their tokens/s.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from offramp.hub.pretrained import named_dtype, rounded_dtype
from offramp.native.kernels import address, library
from offramp.native.model import NativeModel
from offramp.runs.tables import markdown

SHAPE = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
HEAD = 49152 * 576 / 134515008  # the share of weights that keeps eight bits
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 2 * 16 / 576}
BYTES["int4"] = HEAD * BYTES["int8"] + (1 - HEAD) * 20 / 32


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spaced(weight: Tensor) -> Tensor:
    """Each 32 columns of a row to the nearest of sixteen equally spaced values, as in a checkpoint of four bits."""
    groups = weight.float().unflatten(1, (-1, 32))
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / 15
    return (((groups - low) / step).round() * step + low).flatten(1).to(weight.dtype)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bfloat16,int8,int4")
    parser.add_argument("--tokens", default="1,2,4,8,300")
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    formats, counts = options.formats.split(","), [int(count) for count in options.tokens.split(",")]
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32).eval()
    weights = sum(parameter.numel() for parameter in made.parameters())
    models = {}
    for name in formats:
        loaded, rounded = rounded_dtype(name)
        one = copy.deepcopy(made).to(named_dtype(loaded))
        if rounded == "int4":
            for parameter in one.model.layers.parameters():
                parameter.data = spaced(parameter.data) if parameter.ndim == 2 else parameter.data
        models[name] = NativeModel(one, rounded=rounded)
    contexts = {
        name: model.run(
            model.start(torch.randint(SHAPE.vocab_size, (1, options.context))), 0, SHAPE.num_hidden_layers
        ).context
        for name, model in models.items()
    }
    memory = torch.zeros(int(weights * max(BYTES[name] for name in formats)) // 8, dtype=torch.long)
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in formats for count in (0, *counts)}
    for turn in range(options.rounds + 3):
        for (name, count), found in times.items():
            model, context = models[name], contexts[name]
            if count:
                state = model.start(torch.randint(SHAPE.vocab_size, (1, count)), context=context, slot=options.context)
                took = seconds(lambda m=model, s=state: m.best(m.run(s, 0, SHAPE.num_hidden_layers).hidden[0, -8:]))  # type: ignore[misc]
            else:
                words = int(weights * BYTES[name]) // 8
                took = seconds(lambda w=words: library().offramp_read(address(memory), w, torch.get_num_threads()))  # type: ignore[misc]
            if turn >= 3:
                found.append(took)
    rows = []
    for (name, count), found in times.items():
        low, median, high = statistics.quantiles(found, n=4)
        probe, one = statistics.median(times[name, 0]), statistics.median(times.get((name, 1), found))
        rows.append([
            name, str(count or "probe"), f"{median * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})",
            *(("", "", "") if not count else (f"{probe / median:.2f}", f"{median / one:.2f}", f"{count / median:.0f}")),
        ])  # fmt: skip
    print(f"{torch.get_num_threads()} threads, {options.context} tokens before, {options.rounds} rounds\n")
    print(markdown(["weights", "tokens", "milliseconds", "of the probe", "of one token", "tokens/s"], rows))


if __name__ == "__main__":
    main()
