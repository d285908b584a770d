"""`offramp generate`: text as it comes, each token in the colour of the layer it left at."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from rich.console import Console

    from offramp.core.batch import Step
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy


def generate(
    model: o.Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue; without one, standard input.")
    ] = None,
    confidence: o.Confidence = None,
    threshold: o.Threshold = None,
    min_layer: o.MinLayer = None,
    vocabulary: o.Vocabulary = None,
    vocabulary_size: o.VocabularySize = None,
    skipped: o.Skipped = None,
    draft: o.Draft = None,
    draft_length: o.DraftLength = None,
    accept: o.Accept = None,
    adaptive: o.Adaptive = None,
    prompt_layer: o.PromptLayer = None,
    policy: o.PolicyFile = None,
    exits: o.Exits = None,
    dtype: o.Dtype = "float32",
    engine: o.Engine = "auto",
    device: o.Device = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens generated per prompt; default: as the model's generation config says, else 64."),
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Fewest tokens generated per prompt.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample at this temperature; default: as the model's generation config says, else greedy."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k best tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the smallest set of this probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a sample repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop behind this text; may be given several times.")] = None,
    chat: o.Chat = None,
    show_exits: Annotated[bool, typer.Option("--show-exits", help="Colour each token by its exit layer.")] = False,
    json: o.JsonPath = None,
) -> None:
    """Continue prompts, token by token, each leaving the network where the policy says.

    Without any exit option the full model answers; --skipped verify gives the same text with exits. With
    --exits and without --min-layer, tokens are tested after the layers that have a trained exit.
    """
    import offramp
    from offramp.calibration.certificate import certified_task, check_certificate, check_drift
    from offramp.core.generation_inputs import in_effect

    rule = o.policy_from(
        policy, confidence=confidence, threshold=threshold, min_layer=min_layer, vocabulary=vocabulary,
        vocabulary_size=vocabulary_size, skipped=skipped, draft=draft, accept=accept,
        draft_length=draft_length, adaptive=adaptive, prompt_layer=prompt_layer,
    )  # fmt: skip
    texts = prompts or [o.standard_input("the prompt")]
    lm = offramp.load(model, dtype=dtype, device=device, exits=exits, engine=engine)
    _explain(lm, rule)
    settings = {
        "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "repetition_penalty": repetition_penalty, "seed": seed, "stop_strings": stop,
    }  # fmt: skip
    given = {name: value for name, value in settings.items() if value is not None}
    in_template = lm.has_chat_template if chat is None else chat
    settings = in_effect(given, lm.model.generation_config)
    if in_template != lm.has_chat_template:
        settings["chat"] = in_template
    check_certificate(policy, lm, rule, settings=settings, batch_size=1)
    if (task := certified_task(policy)) not in (None, "prompts"):
        o.note(f"the certificate is about {task} in its prompt template; whether these prompts are that is not checked")
    results = [
        _one(lm, text, rule, {**given, "chat": in_template}, show_exits, quiet=str(json) == "-") for text in texts
    ]
    check_drift(policy, [[token["exit_layer"] for token in result["tokens"]] for result in results])
    learnt = None if rule is None or not rule.adaptive else _learnt(lm, rule)
    o.write_result(
        {
            "schema": "offramp/generate/1", "model": model, "dtype": lm.number_format, "device": str(lm.split.device),
            "num_layers": lm.num_layers,
            "trained_exits": list(lm.split.exit_layers),
            "policy": None if rule is None else rule.to_dict(), "options": {**given, "chat": in_template},
            "generations": results, "adaptive_threshold": learnt,
        },
        json,
    )  # fmt: skip


def _explain(lm: LanguageModel, policy: ExitPolicy | None) -> None:
    """Say before decoding where exits begin to pay."""
    from offramp.core.confidence import HEADLESS
    from offramp.core.costs import break_even, ratios
    from offramp.core.plan import resolve

    if policy is None:
        o.note(f"full depth, {lm.num_layers} layers; exits: see --confidence, --threshold, --min-layer, --skipped")
        return
    plan = resolve(policy, lm.num_layers, lm.vocabulary, lm.split.exit_layers)
    if not plan.thresholds:
        return
    if policy.drafter:
        _explain_drafter(lm, policy)
        return
    shape, head = lm.split.shape, ratios(lm.split.shape)[0]
    listed = None if lm.exits is None else lm.exits.frequent
    frequent = len(listed) if plan.frequent and listed is not None else None
    kept = 0 if policy.confidence in HEADLESS else plan.scored_later(frequent)
    pays = break_even(shape, plan.min_layer, kept, len(plan.thresholds), frequent)
    every = len(plan.thresholds) == plan.num_layers - plan.min_layer
    where = f"from layer {plan.min_layer}" if every else f"after layers {', '.join(map(str, plan.thresholds))}"
    tests = "on all tokens" if kept is None else f"on {kept} kept tokens" if kept else "without the head"
    tests = tests.replace("kept", "frequent") if kept == frequent else tests
    o.note(
        f"{lm.num_layers} layers; one full readout costs as much as {head:.1f} of them; tested {where} {tests}, "
        f"a token saves FLOPs by leaving before layer {min(pays, lm.num_layers):.1f}"
    )


def _explain_drafter(lm: LanguageModel, policy: ExitPolicy) -> None:
    """Say what a draft costs, and that the full model checks it."""
    shape, exits = lm.split.shape, lm.exits
    if exits is None or exits.drafter is None:
        return  # decoding refuses it
    listed = len(exits.frequent) if policy.frequent and exits.frequent is not None else None
    draft = shape.adapter_weights(0) + shape.readout_weights(listed)
    full = sum(block.weights for block in shape.blocks) + shape.readout_weights()
    o.note(
        f"{lm.num_layers} layers; drafts by {len(exits.drafter.branch.blocks())} block(s) before the first one, each "
        f"{draft / full:.3f} of the full model's weights; at most {policy.draft_length} are checked together"
    )


def _learnt(lm: LanguageModel, policy: ExitPolicy) -> dict[str, Any]:
    """Say where an adaptive threshold ended, and return it for JSON."""
    threshold = lm.adaptive_threshold(policy)
    threshold.refit()  # on the last generation, too
    agreed, others = threshold.agree.count, threshold.disagree.count
    o.note(
        f"adaptive threshold: {threshold.start:g} at first, {threshold.value:.2f} now, after {threshold.fits} fits on "
        f"{agreed} tokens whose shallow and deep choices agree and {others} others (no guarantee; see --help)"
    )
    return {
        "start": threshold.start, "value": threshold.value, "fits": threshold.fits,
        "agree": agreed, "disagree": others,
    }  # fmt: skip


def _one(
    lm: LanguageModel, prompt: str, policy: ExitPolicy | None, options: dict[str, Any], show_exits: bool, *, quiet: bool
) -> dict[str, Any]:
    """Stream one generation and return it for JSON."""
    from rich.console import Console

    from offramp.core.plan import resolve

    console = Console(quiet=quiet, soft_wrap=True)
    first, trained = lm.num_layers, lm.split.exit_layers
    first = first if policy is None else resolve(policy, first, lm.vocabulary, trained).min_layer
    painter = Painter(console, lm.tokenizer, lm.num_layers, first, show_exits=show_exits)
    if show_exits:
        painter.legend()
    began = time.perf_counter()
    stream = lm.stream([prompt], policy=policy, **options)
    steps: list[Step] = []
    for step in stream:
        steps.append(step)
        painter.put(int(step.token), int(step.exit_layer))
    painter.end()
    costs = stream.costs
    costs.seconds = time.perf_counter() - began
    full = stream.full_flops(len(steps))
    o.note(
        f"{costs.tokens} tokens · mean exit layer {costs.mean_exit_layer:.1f} of {lm.num_layers} · "
        f"{costs.flops / full:.2f} of the full model's FLOPs · {costs.tokens / costs.seconds:.1f} tokens/s"
    )
    return {
        "prompt": prompt,
        "text": painter.written,
        "tokens": [
            {
                "id": int(step.token),
                "text": lm.tokenizer.decode([int(step.token)]),
                "exit_layer": int(step.exit_layer),
                "confidence": None if math.isnan(float(step.confidence)) else float(step.confidence),
                "flops": step.flops,
            }
            for step in steps
        ],
        "costs": {**costs.to_dict(), "full_model_flops": full},
    }


COLOURS = ("bright_green", "green", "cyan", "yellow", "bright_red", "red")
"""From the earliest exits to the full model."""


class Painter:
    """Writes a text token by token; `show_exits`: coloured by layer from `first` to L, or as `token/layer`."""

    def __init__(self, console: Console, tokenizer: Any, num_layers: int, first: int, *, show_exits: bool) -> None:
        self.console, self.tokenizer = console, tokenizer
        self.num_layers, self.first, self.show_exits = num_layers, first, show_exits
        self.plain = console.color_system is None
        self.ids: list[int] = []
        self.layer = num_layers
        self.written = ""

    def colour(self, layer: int) -> str:
        """Colour of an exit layer."""
        if layer >= self.num_layers:
            return COLOURS[-1]
        share = (layer - self.first) / max(self.num_layers - self.first, 1)
        return COLOURS[min(int(max(share, 0) * (len(COLOURS) - 1)), len(COLOURS) - 2)]

    def legend(self) -> None:
        """Say what the marks mean."""
        if self.plain:
            drafted = "" if self.first else "; 0: drafted, and right"
            self._write(f"[token/layer: the layer each token left at, of {self.num_layers}{drafted}]\n")
            return
        by_colour: dict[str, list[int]] = {}
        for layer in range(self.first, self.num_layers + 1):
            by_colour.setdefault(self.colour(layer), []).append(layer)
        self._write("exit layer: ")
        for colour, layers in by_colour.items():
            span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
            if layers[-1] == self.num_layers:
                span += " (full)"
            self._write(f"■ {span}  ", colour)
        self._write("\n\n")

    def put(self, token: int, layer: int) -> None:
        """Write what one more token adds to the text; half a character waits for its other half."""
        self.ids.append(token)
        self.layer = layer
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("�"):
            self._add(text)

    def end(self) -> None:
        """End the text; half a character whose other half never came is written as the tokenizer has it."""
        self._add(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        self._write("\n")

    def _add(self, text: str) -> None:
        """Write what a text has beyond what is written."""
        new, self.written = text[len(self.written) :], text
        if self.show_exits and self.plain and new:
            new = f"{new}/{self.layer}"
        self._write(new, self.colour(self.layer) if self.show_exits and not self.plain else None)

    def _write(self, text: str, colour: str | None = None) -> None:
        """As segments: a `Text` of rich has blanks for tabs, and no carriage returns."""
        from rich.segment import Segment, Segments
        from rich.style import Style

        style = None if colour is None else Style.parse(colour)
        self.console.print(Segments([Segment(text, style)]), end="", soft_wrap=True)
        self.console.file.flush()
