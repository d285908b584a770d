"""Speed and cost of early exits beside the full model: paired, interleaved runs in one process.

A speed is only claimed as a ratio of two runs made side by side, with its spread. Every batch of prompts is generated
by every arm before the next batch comes, in an order shuffled anew each time, so that whatever else the machine does
meets all arms alike. All arms generate the same number of tokens (end of sequence is held back until then), greedily,
from the same prepared token ids, in the same number format and with the same attention kernels.

`random_t5` and `scripted_arms` time a model that cannot be downloaded: the weights are random, and the layer each token
leaves at is prescribed, while every confidence test is paid for.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from offramp import __version__
from offramp.confidence import Confidence, Contrast, Contrastive, Reading, softmax_gap
from offramp.costs import PARTS, Costs
from offramp.language_model import LanguageModel
from offramp.policy import ExitPolicy
from offramp.vocabulary import KINDS

REFERENCE = "transformers generate"
"""The arm all ratios refer to: the model's own `generate`."""
FULL = "full depth (offramp)"
"""The arm that shows what our loop costs: all layers, no test."""
CONFIDENCE_PARTS = ("readout", "pruned_readout", "select", "confidence")
"""Parts of a generation that reading out and judging belong to, the readout of the emitted token included."""
T5_SIZES = {
    "t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}
"""Shapes of the T5 checkpoints, whose vocabulary has 32128 rows."""

Arms = Mapping[str, ExitPolicy | None]
"""Policies by the name of their row; None: the full model."""
Progress = Callable[[int, int, str], None]
"""Called with the generations done, their total, and what comes next."""


def default_arms(
    lm: LanguageModel, *, threshold: float = 0.9, min_layer: int | None = None
) -> dict[str, ExitPolicy | None]:
    """The two full models, static exits, and each way of testing.

    One threshold serves all measures although they do not compare: read exit layer and agreement next to the speed.

    Args:
        lm: The model.
        threshold: Of all tests.
        min_layer: First layer tested; None: half the depth.

    Returns:
        Policies by name. "defer + fixed" and "verify + fixed" are "softmax + fixed" with exact keys and values.
    """
    depth = lm.num_layers
    statics = sorted(layer for layer in {depth // 2, 3 * depth // 4, depth - 2} if 1 <= layer < depth)
    softmax = ExitPolicy(threshold=threshold, min_layer=min_layer)
    fixed = replace(softmax, vocabulary="fixed")
    jsd = replace(softmax, confidence="jsd")
    return {
        REFERENCE: None,
        FULL: None,
        **{f"static {layer}": ExitPolicy("static", min_layer=layer) for layer in statics},
        "softmax": softmax,
        **{f"softmax + {kind}": replace(softmax, vocabulary=kind) for kind in KINDS},
        "contrastive": replace(softmax, confidence="contrastive"),
        "jsd": jsd,
        "jsd + adaptive": replace(jsd, vocabulary="adaptive"),
        "defer + fixed": replace(fixed, skipped="defer"),
        "verify + fixed": replace(fixed, skipped="verify"),
    }


# ---------------------------------------------------------------- scripted exits


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


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one number per round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value; quartiles interpolate between the values."""
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class ArmResult:
    """What one arm did. Counts are of the first round (greedy rounds repeat each other), seconds of all.

    Attributes:
        name: Its name.
        policy: Its policy; None: the full model.
        seconds: Wall-clock time of each round, all prompts.
        tokens_per_second: Over whole generations, prompt and encoder included.
        ratio: Tokens per second over those of `REFERENCE` in the same round.
        mean_exit_layer: Mean layer after which the tokens left.
        exit_layers: That layer of every token, per prompt.
        agreement: Share of positions with the reference's token. After a first difference the two continue different
            texts, so this is a lower bound of how often the arm would have followed the full model.
        identical: Share of prompts with the very same output.
        common_prefix: Mean number of tokens before the first difference.
        tests: Confidence tests per token.
        flops: FLOPs per token, prompt and encoder included.
        bytes: Bytes read per token, likewise.
        flops_ratio: FLOPs over those of the full model.
        bytes_ratio: Bytes over those of the full model.
        draft_flops: "FLOPs" per token as the source document counts them (see `Costs`).
        confidence_flops: FLOPs per token of `CONFIDENCE_PARTS`.
        confidence_seconds: Seconds of `CONFIDENCE_PARTS` in each round; empty for the reference.
        shares: Share of the time by part, and "other" (preparation, processors, bookkeeping); empty for the reference,
            whose inside is not timed and whose counts are those of `FULL`, which makes the same products.
    """

    name: str
    policy: ExitPolicy | None
    seconds: tuple[float, ...]
    tokens_per_second: Spread
    ratio: Spread
    mean_exit_layer: float
    exit_layers: list[list[int]]
    agreement: float
    identical: float
    common_prefix: float
    tests: float
    flops: float
    bytes: float
    flops_ratio: float
    bytes_ratio: float
    draft_flops: float
    confidence_flops: float
    confidence_seconds: tuple[float, ...]
    shares: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {**vars(self), "policy": _policy_values(self.policy)}
        for name in ("tokens_per_second", "ratio"):
            values[name] = asdict(values[name])
        return values


@dataclass(frozen=True)
class Saving:
    """What pruning made of the confidence part of an arm (readout, selection and the measure itself).

    All are unpruned over pruned, per token: above 1 is a saving. Arms whose tokens left at different layers made
    different numbers of tests; only under a script are these equal.

    Attributes:
        pruned: Name of the arm that prunes.
        unpruned: Name of the arm that is the same in all else.
        tests: Tests made.
        seconds: Measured seconds, in the same round.
        flops: FLOPs, first (full) readout included.
        draft_flops: "FLOPs" by the source document's count, first readout left out.
        whole: Measured seconds of the whole generation, in the same round.
    """

    pruned: str
    unpruned: str
    tests: float
    seconds: Spread
    flops: float
    draft_flops: float
    whole: Spread


@dataclass(frozen=True)
class Bench:
    """The outcome of `run_bench`.

    Attributes:
        conditions: What was held fixed, and versions.
        arms: Results, the two full models first.
        order: order[round][batch]: names in the order in which they ran.
    """

    conditions: dict[str, Any]
    arms: list[ArmResult]
    order: list[list[list[str]]]

    def arm(self, name: str) -> ArmResult:
        """The result of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def savings(self) -> list[Saving]:
        """Every pruned arm beside its unpruned twin, where both ran."""
        pairs = [(a, b) for a in self.arms for b in self.arms if a is not b and _is_pruned_twin(a.policy, b.policy)]
        return [_saving(pruned, unpruned) for pruned, unpruned in pairs]

    @property
    def notes(self) -> list[str]:
        """What to know before reading the numbers: arms that should give the full model's output and do not."""
        dtype = self.conditions["dtype"]
        cause = "unless scores tie, that is a bug" if dtype == "float32" else "rounding can do that"
        exact = [arm for arm in self.arms if arm.policy is None or arm.policy.skipped == "verify"]
        return [
            f"{arm.name} differs from {REFERENCE} at {1 - arm.agreement:.1%} of the positions; in {dtype}, {cause}"
            for arm in exact
            if arm.agreement < 1
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without NaN and infinities."""
        return {
            "schema": "offramp/bench/1",
            "conditions": self.conditions,
            "arms": [arm.to_dict() for arm in self.arms],
            "savings": [asdict(saving) for saving in self.savings],
            "order": self.order,
            "notes": self.notes,
        }

    def table(self) -> str:
        """Tables for a terminal that are Markdown as well: speed and cost, where the time went, what pruning saved."""
        conditions = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.conditions.items())
        blocks = [_speed_table(self.arms), _time_table(self.arms)]
        if self.savings:
            blocks.append(_saving_table(self.savings))
        return "\n\n".join([*blocks, f"Conditions: {conditions}.", *(f"Note: {note}." for note in self.notes)])


def _policy_values(policy: ExitPolicy | None) -> dict[str, Any] | None:
    """A policy as JSON values; a callable confidence by its name."""
    if policy is None:
        return None
    measure = policy.confidence
    if isinstance(measure, str):
        values = policy.to_dict()
    else:
        values = replace(policy, confidence="softmax").to_dict()
        values["confidence"] = getattr(measure, "__name__", type(measure).__name__)
        if script := _script(policy):
            values["script"] = script.depths
    if isinstance(policy.threshold, tuple):
        values["threshold"] = [str(tau) if abs(tau) == float("inf") else tau for tau in policy.threshold]
    return values


def _is_pruned_twin(pruned: ExitPolicy | None, unpruned: ExitPolicy | None) -> bool:
    if pruned is None or unpruned is None or pruned.vocabulary is None or unpruned.vocabulary is not None:
        return False
    sizes: dict[str, Any] = {"vocabulary_size": None, "vocabulary_floor": None, "vocabulary_start": None}
    sizes |= {"vocabulary_shrink": unpruned.vocabulary_shrink, "vocabulary_recursive": unpruned.vocabulary_recursive}
    return replace(pruned, vocabulary=None, **sizes) == replace(unpruned, **sizes)


def _saving(pruned: ArmResult, unpruned: ArmResult) -> Saving:
    def over(name: str) -> float:
        divisor = getattr(pruned, name)
        return float(getattr(unpruned, name) / divisor) if divisor else 1.0

    pairs = zip(unpruned.confidence_seconds, pruned.confidence_seconds, strict=True)
    return Saving(
        pruned=pruned.name,
        unpruned=unpruned.name,
        tests=over("tests"),
        seconds=Spread.of(a / b for a, b in pairs),
        flops=over("confidence_flops"),
        draft_flops=over("draft_flops"),
        whole=Spread.of(a / b for a, b in zip(unpruned.seconds, pruned.seconds, strict=True)),
    )


# ---------------------------------------------------------------- tables


def _speed_table(arms: list[ArmResult]) -> str:
    head = "arm|tokens/s|× generate (quartiles)|exit|same|identical|prefix|tests|FLOPs ×|bytes ×".split("|")
    return _markdown(head, [
        [
            arm.name, f"{arm.tokens_per_second.median:.1f}", str(arm.ratio), f"{arm.mean_exit_layer:.1f}",
            f"{arm.agreement:.0%}", f"{arm.identical:.0%}", f"{arm.common_prefix:.1f}", f"{arm.tests:.1f}",
            f"{arm.flops_ratio:.2f}", f"{arm.bytes_ratio:.2f}",
        ]
        for arm in arms
    ])  # fmt: skip


def _time_table(arms: list[ArmResult]) -> str:
    parts = [p for p in (*PARTS, "other") if any(arm.shares.get(p, 0) > 0 for arm in arms)]
    rows = [[arm.name, *(f"{arm.shares[part]:.0%}" for part in parts)] for arm in arms if arm.shares]
    return _markdown(["share of time", *(part.replace("_", " ") for part in parts)], rows)


def _saving_table(savings: list[Saving]) -> str:
    head = ["pruning saves (×)", "over", "tests", "confidence seconds", "its FLOPs", "source's count", "all seconds"]
    return _markdown(head, [
        [
            s.pruned, s.unpruned, f"{s.tests:.2f}", str(s.seconds), f"{s.flops:.1f}", f"{s.draft_flops:.1f}",
            str(s.whole),
        ]
        for s in savings
    ])  # fmt: skip


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    title = [head[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(head[1:], widths[1:], strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [title, rule, *lines])


# ---------------------------------------------------------------- running


@dataclass
class _Runs:
    """What is collected of one arm while the rounds go on."""

    seconds: list[float] = field(default_factory=list)  # one per round
    parts: list[dict[str, float]] = field(default_factory=list)  # seconds by part, one per round
    costs: list[Costs] = field(default_factory=list)  # one per batch of the first round
    tokens: list[list[int]] = field(default_factory=list)  # one per prompt, of the first round
    layers: list[list[int]] = field(default_factory=list)  # likewise

    def new_round(self) -> None:
        self.seconds.append(0.0)
        self.parts.append(dict.fromkeys(PARTS, 0.0))

    def total(self, name: str) -> int:
        return sum(getattr(costs, name) for costs in self.costs)


def run_bench(
    lm: LanguageModel,
    prompts: Any,
    arms: Arms,
    *,
    max_new_tokens: int = 32,
    repeats: int = 5,
    warmup: int = 1,
    batch_size: int = 1,
    chat: bool = False,
    seed: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Generate with every arm, in turns, and compare.

    Args:
        lm: The model.
        prompts: Texts or chats, or token ids [N, T].
        arms: Policies by name; `REFERENCE` and `FULL` are always run, whether they are named or not.
        max_new_tokens: Tokens generated per prompt, by every arm.
        repeats: Rounds; one round generates all prompts with all arms.
        warmup: Times the first batch is generated by all arms beforehand, untimed.
        batch_size: Prompts generated together.
        chat: Apply the chat template to texts.
        seed: Of the order of the arms.
        name: What the conditions call the model; None: its class.
        progress: Called before every generation.

    Returns:
        Results by arm, with the conditions. A full depth that differs from `transformers` is recorded, not raised.

    Raises:
        ValueError: No prompts, a count that is too small, a policy that does not fit the model, or a script with
            several prompts per batch.
    """
    arms = {REFERENCE: None, FULL: None, **arms}
    _check(lm, arms, max_new_tokens=max_new_tokens, repeats=repeats, warmup=warmup, batch_size=batch_size)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    batches = [lm.encode(prompts[i : i + batch_size], chat=chat) for i in range(0, len(prompts), batch_size)]
    if not batches:
        raise ValueError("there are no prompts; give at least one")
    runs = {arm: _Runs() for arm in arms}
    shuffle = random.Random(seed)
    order: list[list[list[str]]] = []
    done, total = 0, (warmup + repeats * len(batches)) * len(arms)
    for turn in range(-warmup, repeats):
        if turn >= 0:
            order.append([[] for _ in batches])
            for run in runs.values():
                run.new_round()
        for index, inputs in enumerate(batches[:1] if turn < 0 else batches):
            for arm in shuffle.sample(list(arms), len(arms)):
                if progress is not None:
                    progress(done, total, f"{'warm-up' if turn < 0 else f'round {turn + 1}/{repeats}'}: {arm}")
                _run(lm, arm, arms[arm], inputs, max_new_tokens, runs[arm] if turn >= 0 else None)
                done += 1
                if turn >= 0:
                    order[turn][index].append(arm)
    if progress is not None:
        progress(done, total, "done")
    conditions = _conditions(lm, batches, name, max_new_tokens, repeats, warmup, batch_size, seed)
    return Bench(conditions, [_result(arm, arms[arm], runs) for arm in arms], order)


def _check(lm: LanguageModel, arms: Arms, **counts: int) -> None:
    for name, value in counts.items():
        least = 0 if name == "warmup" else 1
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    for arm, policy in arms.items():
        if policy is not None:
            policy.resolve(lm.num_layers, lm.vocabulary)
            if _script(policy) is not None and counts["batch_size"] > 1:
                raise ValueError(f"batch_size is {counts['batch_size']}, but arm {arm!r} is scripted: use batch_size=1")


def _script(policy: ExitPolicy) -> Script | None:
    script = getattr(policy.confidence, "script", None)
    return script if isinstance(script, Script) else None


def _run(
    lm: LanguageModel, arm: str, policy: ExitPolicy | None, inputs: dict[str, Tensor], tokens: int, runs: _Runs | None
) -> None:
    """One timed generation; without `runs`, only to warm up."""
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    settings = lm.model.generation_config
    if settings.pad_token_id is None and settings.eos_token_id is not None:  # as `LanguageModel` does
        eos = settings.eos_token_id
        options["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    if policy is not None and (script := _script(policy)):
        script.restart()
    _synchronize(lm)
    began = time.perf_counter()
    output = (
        lm.model.generate(**inputs, **options) if arm == REFERENCE else lm.generate(inputs, policy=policy, **options)
    )
    _synchronize(lm)
    seconds = time.perf_counter() - began
    if runs is None:
        return
    runs.seconds[-1] += seconds
    first = len(runs.seconds) == 1
    if isinstance(output, Tensor):
        if first:
            runs.tokens += output[:, -tokens:].tolist()
            runs.layers += [[lm.num_layers] * tokens for _ in output]
        return
    for part, entry in output.costs.parts.items():
        runs.parts[-1][part] += entry.seconds
    if first:
        runs.costs.append(output.costs)
        runs.tokens += output.tokens
        runs.layers += output.exit_layers


def _synchronize(lm: LanguageModel) -> None:
    if lm.split.device.type == "cuda":
        torch.cuda.synchronize()


def _result(arm: str, policy: ExitPolicy | None, runs: Mapping[str, _Runs]) -> ArmResult:
    run, reference, full = runs[arm], runs[REFERENCE], runs[FULL]
    counted = full if arm == REFERENCE else run
    tokens = sum(map(len, run.tokens))
    prefixes = [_common(a, b) for a, b in zip(run.tokens, reference.tokens, strict=True)]
    pairs = zip(run.tokens, reference.tokens, strict=True)
    same = sum(a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=False))
    layers = [layer for row in run.layers for layer in row]
    flops = sum(costs.parts[part].flops for costs in counted.costs for part in CONFIDENCE_PARTS)
    return ArmResult(
        name=arm,
        policy=policy,
        seconds=tuple(run.seconds),
        tokens_per_second=Spread.of(tokens / seconds for seconds in run.seconds),
        ratio=Spread.of(a / b for a, b in zip(reference.seconds, run.seconds, strict=True)),
        mean_exit_layer=statistics.mean(layers),
        exit_layers=run.layers,
        agreement=same / sum(map(len, reference.tokens)),
        identical=statistics.mean(a == b for a, b in zip(run.tokens, reference.tokens, strict=True)),
        common_prefix=statistics.mean(prefixes),
        tests=counted.total("tests") / tokens,
        flops=counted.total("flops") / tokens,
        bytes=counted.total("bytes") / tokens,
        flops_ratio=counted.total("flops") / full.total("flops"),
        bytes_ratio=counted.total("bytes") / full.total("bytes"),
        draft_flops=counted.total("draft_flops") / tokens,
        confidence_flops=flops / tokens,
        confidence_seconds=() if arm == REFERENCE else _confidence_seconds(run),
        shares={} if arm == REFERENCE else _shares(run),
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _confidence_seconds(run: _Runs) -> tuple[float, ...]:
    return tuple(sum(parts[part] for part in CONFIDENCE_PARTS) for parts in run.parts)


def _shares(run: _Runs) -> dict[str, float]:
    whole = sum(run.seconds)
    shares = {part: sum(parts[part] for parts in run.parts) / whole for part in PARTS}
    return {**shares, "other": max(0.0, 1 - sum(shares.values()))}


def _conditions(
    lm: LanguageModel, batches: list[dict[str, Tensor]], name: str | None, tokens: int, repeats: int, warmup: int,
    batch_size: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    device, shape = lm.split.device, lm.split.shape
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    return {
        "model": name or type(lm.model).__name__,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "layers": lm.num_layers,
        "width": shape.width,
        "vocabulary": shape.vocabulary,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "attention": str(lm.split.config._attn_implementation),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "prompts": sum(len(batch["input_ids"]) for batch in batches),
        "shortest_prompt": min(lengths),
        "longest_prompt": max(lengths),
        "new_tokens": tokens,
        "batch_size": batch_size,
        "repeats": repeats,
        "warmup": warmup,
        "seed": seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "offramp": __version__,
    }
