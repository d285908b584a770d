"""Exits by script: the layer each token leaves at is prescribed, while every confidence test is paid for.

That times a model whose confidences mean nothing, such as one that cannot be downloaded and has random weights.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field, replace

import torch
import transformers
from torch import Tensor

from offramp.bench_results import FULL, REFERENCE
from offramp.core.confidence import Confidence, Contrast, Contrastive, Reading, softmax_gap
from offramp.core.language_model import LanguageModel
from offramp.core.policy import ExitPolicy
from offramp.core.vocabulary import KINDS

T5_SIZES = {
    "t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}
"""Shapes of the T5 checkpoints, whose vocabulary has 32128 rows."""


@dataclass
class Script:
    """Prescribes the layer at which each tested token of a generation leaves. For one sequence at a time.

    A token is known to be new by its first test (`reading.previous` is None), so every generation must begin with
    `restart`, as `run_bench` sees to. The prompt's own token of a decoder-only model is not tested and not counted.

    Attributes:
        depths: One layer per tested token, in order; used again from the start when they run out. Below the first exit
            means there; L, or any layer that is not an exit, means the next exit, or full depth.
        unsure: The confidence reported before that layer. The adaptive size rule shrinks by it, so it mimics a
            real one.
    """

    depths: tuple[int, ...]
    unsure: float = 0.3
    _token: int = field(default=-1, repr=False, compare=False)

    def restart(self) -> None:
        """Begin with the first token again."""
        self._token = -1

    def answer(self, reading: Reading) -> Tensor:
        """The confidence to report at this test.

        Returns:
            1 from the prescribed layer on, `unsure` before it, [1].

        Raises:
            ValueError: The batch has several rows.
        """
        if len(reading.hidden) != 1:
            raise ValueError(f"a script plays for one sequence, but the batch has {len(reading.hidden)} rows")
        if reading.previous is None:
            self._token += 1
        sure = reading.layer >= self.depths[self._token % len(self.depths)]
        return torch.full((1,), 1.0 if sure else self.unsure, device=reading.hidden.device)


@dataclass(frozen=True)
class Scripted:
    """A measure that does all the work of another one and then answers from a script; exits at thresholds below 1."""

    script: Script
    measure: Confidence = softmax_gap

    def __call__(self, reading: Reading) -> Tensor:
        """The script's answer, [1]."""
        self.measure(reading)
        return self.script.answer(reading)


@dataclass(frozen=True)
class ScriptedContrastive(Contrastive):
    """The same for a contrastive measure: of its type, by which decoding knows that earlier layers are needed."""

    script: Script

    def __call__(self, reading: Reading) -> Tensor:
        """The script's answer, [1]."""
        super().__call__(reading)
        return self.script.answer(reading)


def scripted_depths(count: int, *, mean: float, spread: float, low: int, high: int, seed: int = 0) -> tuple[int, ...]:
    """Layers drawn from a normal distribution, rounded and clipped to low..high."""
    draw = random.Random(seed)
    return tuple(min(high, max(low, round(draw.gauss(mean, spread)))) for _ in range(count))


def scripted_arms(
    lm: LanguageModel, *, tokens: int, mean: float | None = None, min_layer: int | None = None, seed: int = 0
) -> dict[str, ExitPolicy | None]:
    """Arms whose tokens all leave at the same prescribed layers, so that only the way of testing differs.

    Args:
        lm: The model; prompts must come one by one.
        tokens: Length of the script: generated tokens per prompt.
        mean: Mean exit layer, spread by an eighth of the depth; None: three quarters of the depth.
        min_layer: First layer tested; None: 0.3 of the depth (7 of T5-large's 24, as in "Early Exit LLMs").
        seed: Of the script.

    Returns:
        Policies by name; all scripted ones share one `Script`.
    """
    depth = lm.num_layers
    first = max(1, round(0.3 * depth)) if min_layer is None else min_layer
    mean = 0.75 * depth if mean is None else mean
    script = Script(scripted_depths(tokens, mean=mean, spread=depth / 8, low=first, high=depth, seed=seed))
    static = min(depth - 1, max(1, round(statistics.mean(script.depths))))
    softmax = ExitPolicy(Scripted(script), threshold=0.5, min_layer=first)
    jsd = replace(softmax, confidence=ScriptedContrastive(Contrast(), True, script))
    return {
        REFERENCE: None,
        FULL: None,
        f"static {static}": ExitPolicy("static", min_layer=static),
        "softmax": softmax,
        **{f"softmax + {kind}": replace(softmax, vocabulary=kind) for kind in KINDS},
        "contrastive": replace(softmax, confidence=ScriptedContrastive(Contrast(), False, script)),
        "jsd": jsd,
        "jsd + adaptive": replace(jsd, vocabulary="adaptive"),
    }


def random_t5(size: str = "t5-large", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """A T5 of a checkpoint's shape with random weights.

    Returns:
        The model, without a tokenizer: prompts must be token ids. "t5-large" has 738 million weights.

    Raises:
        ValueError: There is no such size.
    """
    if size not in T5_SIZES:
        raise ValueError(f"size is {size!r}; allowed are {', '.join(T5_SIZES)}")
    config = transformers.T5Config(
        vocab_size=32128, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **T5_SIZES[size]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.T5ForConditionalGeneration(config)
    return LanguageModel(model.to(dtype).eval())


def random_prompts(lm: LanguageModel, count: int, *, length: int = 64, seed: int = 0) -> Tensor:
    """Token ids [count, length] drawn evenly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, lm.vocabulary, (count, length), generator=generator)
