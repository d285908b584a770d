"""Exits by script: the layer each token leaves at is prescribed, while every confidence test is paid for.

That times a model whose confidences mean nothing, such as one that cannot be downloaded and has random weights.
"""

from __future__ import annotations

import copy
import random
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.initialization import no_init_weights

from offramp.core.confidence import Confidence, Contrast, Contrastive, Reading, begun, softmax_gap
from offramp.core.engine import Engines
from offramp.core.language_model import LanguageModel
from offramp.core.policy import ExitPolicy
from offramp.core.vocabulary import KINDS
from offramp.hub.pretrained import Rounded, model_shaped
from offramp.lm.bench_arms import FULL, REFERENCE
from offramp.values import choice, number

T5: dict[str, Any] = {"vocab_size": 32128, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
SHAPES: dict[str, transformers.PreTrainedConfig] = {
    "t5-small": transformers.T5Config(**T5, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8),
    "t5-base": transformers.T5Config(**T5, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": transformers.T5Config(**T5, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16),
    "smollm2": transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, bos_token_id=0, eos_token_id=1,
    ),
    "llama-3.2-1b": transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=0, eos_token_id=1,
    ),
    "llama-3.1-8b": transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip
"""Shapes of published checkpoints (smollm2: SmolLM2-135M), Llama 3's without the stretching of rotary frequencies."""

_DRAWN = 1_000_003  # values of random weights that are drawn


@dataclass(frozen=True)
class Script:
    """Prescribes the layer at which each token of a generation leaves.

    Attributes:
        depths: One layer per token of a row, the rows one after another; used again from the start when they run out.
            Below the first exit means there; L, or any layer that is not an exit, means the next exit, or full depth.
            A prompt's own token, of a decoder-only model, has an entry that is not used: it is not tested.
        unsure: The confidence reported before that layer. The adaptive size rule shrinks by it, so it mimics a
            real one.
        tokens: Tokens of each row; None: all of `depths` are of one row.
    """

    depths: tuple[int, ...]
    unsure: float = 0.3
    tokens: int | None = None

    def answer(self, row: int, position: int, layer: int) -> float:
        """What to report of a row at a test of its token at `position`: 1 from the prescribed layer on."""
        depths = self.depths
        return 1.0 if depths[(row * (self.tokens or len(depths)) + position) % len(depths)] <= layer else self.unsure


class Playing:
    """A script within one token step: all the work of another measure, then the script's answer."""

    def __init__(self, script: Script, measure: Confidence) -> None:
        self.script, self.measure = script, begun(measure)
        self.restricts = self.measure.restricts

    def __call__(self, reading: Reading) -> Tensor:
        """The script's answer, [A]."""
        worked = self.measure(reading)
        rows, at = reading.rows, reading.position
        places = [at] * len(rows) if isinstance(at, int) else at.tolist()
        answers = [self.script.answer(row, place, reading.layer) for row, place in zip(rows, places, strict=True)]
        return torch.tensor(answers, device=worked.device)

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.measure.select(rows)

    def among(self, scores: Tensor, rows: Tensor) -> Tensor:
        """As the measure."""
        return self.measure.among(scores, rows)


@dataclass(frozen=True)
class Scripted:
    """A measure that does all the work of another one and then answers from a script; exits at thresholds below 1."""

    script: Script
    measure: Confidence = softmax_gap

    def begin(self) -> Playing:
        """The script at the start of a token step."""
        return Playing(self.script, self.measure)

    def __call__(self, reading: Reading) -> Tensor:
        """At the first test of a step, [A]."""
        return self.begin()(reading)


@dataclass(frozen=True)
class ScriptedContrastive(Contrastive):
    """The same for a contrastive measure: of its type, by which decoding knows that earlier layers are needed."""

    script: Script

    def begin(self) -> Playing:
        """The script at the start of a token step."""
        return Playing(self.script, super().__call__)


def scripted_depths(count: int, *, mean: float, spread: float, low: int, high: int, seed: int = 0) -> tuple[int, ...]:
    """Layers drawn from a normal distribution, rounded and clipped to low..high."""
    draw = random.Random(seed)
    return tuple(min(high, max(low, round(draw.gauss(mean, spread)))) for _ in range(count))


def scripted_arms(
    lm: LanguageModel, *, tokens: int, rows: int = 1, mean: float | None = None, min_layer: int | None = None,
    seed: int = 0,
) -> dict[str, ExitPolicy | None]:  # fmt: skip
    """Arms whose tokens all leave at the same layers, spread about a mean, so that only the way of testing differs."""
    depth = lm.num_layers
    first = max(1, round(0.3 * depth)) if min_layer is None else min_layer
    mean = number("mean exit layer", 0.75 * depth if mean is None else mean, 1, depth, why="it is one of the layers")
    depths = scripted_depths(tokens * rows, mean=mean, spread=depth / 8, low=first, high=depth, seed=seed)
    script = Script(depths, tokens=tokens)
    static = min(depth - 1, max(1, round(statistics.mean(depths))))
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


def random_model(
    shape: str = "t5-large", *, dtype: torch.dtype = torch.float32, device: torch.device | None = None,
    engine: Engines = "auto", rounded: Rounded | None = None, seed: int = 0,
) -> LanguageModel:  # fmt: skip
    """A model of one of `SHAPES` with random weights, drawn on their device, in their number format, by the seed.

    Returns:
        The model, without a tokenizer: prompts must be token ids. "t5-large" has 738 million weights, "llama-3.2-1b"
        1.24 billion, "llama-3.1-8b" 8.03.

    Raises:
        ValueError: There is no such shape.
    """
    choice("shape", shape, tuple(SHAPES))
    model = filled(SHAPES[shape], dtype, torch.device("cpu") if device is None else device, seed)
    return LanguageModel(model, name=shape, engine=engine, rounded=rounded)


def filled(
    config: transformers.PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> transformers.PreTrainedModel:
    """A model in evaluation mode, made on its device, in its number format, with random weights."""
    config = copy.deepcopy(config)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with no_init_weights(), device:
        model: transformers.PreTrainedModel = model_shaped(kind, config, dtype)
    model.tie_weights()
    _fill(model, seed)
    return model.eval()


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Give all matrices random values, each row's sum of squares about 1, ten times as fast as drawing every one.

    A million are drawn and laid in again and again; their number is a prime, so that no two rows begin alike.
    """
    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(seed))
    place = 0
    for weight in model.parameters():
        if weight.ndim < 2:
            continue  # norms, which are ones
        flat = weight.data.view(-1)
        scaled = drawn.mul(weight.shape[-1] ** -0.5).to(weight.dtype).roll(place).to(weight.device)
        for begin in range(0, len(flat), _DRAWN):
            piece = flat[begin : begin + _DRAWN]
            piece.copy_(scaled[: len(piece)])
        place += len(flat)


def random_prompts(lm: LanguageModel, count: int, *, length: int = 64, seed: int = 0) -> Tensor:
    """Token ids [count, length] drawn evenly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, lm.vocabulary, (count, length), generator=generator)
