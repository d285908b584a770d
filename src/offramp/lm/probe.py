"""Is a model worth early exits? What its layers would say, when they settle, and from where on leaving pays.

The full model writes; then every layer is read out at each of those positions, in one teacher-forced pass, and compared
with the last. All of it describes the model as it is: keys and values are those of the full model, as if earlier tokens
had not left early, so real exits do a little worse. Layers with a trained exit are read through its lens, and its FLOPs
count; the others are read as they are, and tested as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from offramp.core.costs import break_even, exit_flops, ratios
from offramp.core.vocabulary import Pruning
from offramp.families import SplitModel
from offramp.families.finite import name_of, require_finite
from offramp.families.sizes import ModelShape
from offramp.lm.given import bundled_prompts
from offramp.lm.probe_result import COVERAGE, TOLERANCE, Depths, LayerReport, Probe, verdict
from offramp.runs.progress import shown

if TYPE_CHECKING:
    from offramp.core.generation_inputs import Prompt
    from offramp.core.language_model import LanguageModel

ROWS = 8
"""Prompts decoded together."""
WINDOW = 512
"""Longest piece of a given text, in tokens."""
QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}


class Readings(NamedTuple):
    """All layers at N positions, [L, N]: rank of the final token, largest probability, its gap to the second."""

    rank: Tensor
    peak: Tensor
    gap: Tensor


def rows_in(batch: Mapping[str, Tensor]) -> int:
    """Rows of a batch of inputs."""
    return len(next(iter(batch.values())))


def prompt_batches(lm: LanguageModel, prompts: Any, chat: bool) -> list[dict[str, Tensor]]:
    """Model inputs of a few prompts each."""
    if isinstance(prompts, Tensor | Mapping):
        inputs = lm.encode(prompts)
        splits = {name: torch.split(value, ROWS) for name, value in inputs.items()}
        return [dict(zip(splits, values, strict=True)) for values in zip(*splits.values(), strict=True)]
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        prompts = [prompts]
    if not prompts:
        raise ValueError("there are no prompts; give at least one, or None for the bundled ones")
    return [lm.encode(list(prompts[at : at + ROWS]), chat=chat) for at in range(0, len(prompts), ROWS)]


def windows_of(lm: LanguageModel, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Token ids of texts in pieces, a start token in front of each where the tokenizer puts one before a text."""
    if lm.split.is_encoder_decoder:
        raise ValueError("texts are for decoder-only models; give an encoder-decoder prompts to answer instead")
    texts = [texts] if isinstance(texts, str) else texts
    if not texts:
        raise ValueError("there are no texts; give at least one")
    longest, windows = min(WINDOW, lm.split.max_positions or WINDOW), []
    for text in texts:
        ids = lm.encode([text])["input_ids"]  # [1, T]
        start = int(ids.shape[1] > 1 and int(ids[0, 0]) == lm.tokenizer.bos_token_id)
        pieces = torch.split(ids[:, start:], longest - start, dim=1)
        windows += [{"input_ids": torch.cat([ids[:, :start], piece], dim=1)} for piece in pieces]
    return windows


def text_states(lm: LanguageModel, batch: Mapping[str, Tensor]) -> Tensor:
    """States at every position of a text, [L, N, D]."""
    ids = batch["input_ids"]
    return _states(lm.split, torch.ones_like(ids, dtype=torch.bool), ids)


def answer_states(lm: LanguageModel, batch: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
    """Let the full model answer, then go over its answer."""
    answer = lm.generate(dict(batch), max_new_tokens=max_new_tokens, do_sample=False)
    lengths = torch.tensor([len(tokens) for tokens in answer.tokens], device=lm.split.device)[:, None]
    ids = answer.sequences[:, :-1]  # the last token is only an output
    begin = answer.sequences.shape[1] - int(lengths.max())
    slots = torch.arange(1, ids.shape[1] + 1, device=ids.device)  # slot of the token that a position gives
    where = (slots >= begin) & (slots < begin + lengths)  # [B, T]
    mask = batch.get("attention_mask")
    if lm.split.is_encoder_decoder:
        memory = lm.split.encode(batch.get("input_features", batch.get("input_ids")), mask)  # type: ignore[arg-type]
        return _states(lm.split, where, ids, memory=memory, memory_mask=mask)
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
    return _states(lm.split, where, ids, mask)


def _states(split: SplitModel, where: Tensor, ids: Tensor, mask: Tensor | None = None, **memory: Any) -> Tensor:
    """What is read out after layers 1..L at the positions `where` [B, T], [L, N, D]."""
    state, kept = split.start(ids, mask, **memory), []
    for layer in range(split.num_layers):
        state = split.run(state, layer, layer + 1)
        state = split.branched([state])[0] if state.depth in split.branches else state
        kept.append(state.read[where])
    return torch.stack(kept)


def read_layers(split: SplitModel, states: Tensor) -> Readings:
    """What each layer says, through its lens, of its states, [L, N, D]; a few positions at a time."""
    parts = []
    for chunk in torch.split(states, max(16, (1 << 22) // split.shape.vocabulary), dim=1):
        final, layers = None, []
        for layer in range(len(chunk), 0, -1):  # from layer L, which decides on the final tokens, down
            logits = split.readout(chunk[layer - 1], layer).float()  # [n, V]
            final = logits.argmax(-1, keepdim=True) if final is None else final
            top = logits.topk(2, dim=-1).values
            scratch = torch.gt(logits, logits.gather(-1, final), out=torch.empty_like(logits))
            rank = scratch.sum(-1)  # 0s and 1s: exact in float32 up to 2^24
            mass = torch.sub(logits, top[:, :1], out=scratch).exp_().sum(-1)
            layers.append((rank, 1 / mass, (1 - (top[:, 1] - top[:, 0]).exp()) / mass))
        parts.append([torch.stack(column).flip(0).cpu() for column in zip(*layers, strict=True)])
    found = Readings(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))
    for layer, peaks in enumerate(found.peak, 1):
        require_finite(peaks, name_of(split), f"in the readout after layer {layer} of {len(states)}", split.model.dtype)
    return found


# ---------------------------------------------------------------- reading


def probe(
    lm: LanguageModel,
    prompts: Sequence[Prompt] | Tensor | Mapping[str, Tensor] | None = None,
    *,
    max_new_tokens: int = 32,
    chat: bool | None = None,
    texts: Sequence[str] | None = None,
    min_layer: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Look at what every layer of a model would have said, and what leaving there would save.

    The "final token" of a position is the most probable one of the full model there, before any logits processor. With
    prompts, the positions are those of the tokens that the full model generates, greedily; with texts, all of theirs.

        print(lm.probe(["Why is the sky blue?"], max_new_tokens=8).table())

    Args:
        lm: The model.
        prompts: Texts or chats, token ids [B, T], or the inputs a tokenizer or speech processor made; None: the bundled
            prompts.
        max_new_tokens: Most tokens generated per prompt.
        chat: Whether texts are put into the chat template; None: if the tokenizer has one.
        texts: Plain texts to look at instead of generating, in windows of 512 tokens; decoder-only models.
        min_layer: First layer that exits are thought to be tested after; None: half the depth, as in `ExitPolicy`.
        progress: Called with the prompts (or windows) done and their number.
            None: a bar in a terminal or a notebook, unless TQDM_DISABLE is set.

    Returns:
        The probe.

    Raises:
        ValueError: No or empty prompts, both prompts and texts, texts for an encoder-decoder, `min_layer` out of range,
            or a model with a single layer.
    """
    progress = shown(progress, "probing")
    depth = lm.num_layers
    if depth < 2:
        raise ValueError(f"a model of {depth} layer has no earlier layer to exit from")
    if min_layer is not None and not 1 <= min_layer < depth:
        raise ValueError(f"min_layer is {min_layer}; a model of {depth} layers can exit after layers 1..{depth - 1}")
    if texts is not None:
        if prompts is not None:
            raise ValueError("both prompts and texts are given; give one of them")
        if chat:
            raise ValueError("chat puts prompts into a template, and texts are read as they stand; leave it out")
        batches, source = windows_of(lm, texts), "texts"
    else:
        source = "bundled prompts" if prompts is None else "prompts"
        chat = lm.has_chat_template if chat is None else chat
        batches = prompt_batches(lm, bundled_prompts() if prompts is None else prompts, chat)
    total, parts, done = sum(rows_in(batch) for batch in batches), [], 0
    with torch.no_grad():
        for batch in batches:
            states = text_states(lm, batch) if texts is not None else answer_states(lm, batch, max_new_tokens)
            parts.append(read_layers(lm.split, states))
            done += rows_in(batch)
            if progress is not None:
                progress(done, total)
    readings = Readings(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))
    first = max(1, depth // 2) if min_layer is None else min_layer
    name = f"{lm.name} with trained exits" if lm.exits is not None else lm.name
    return summarise(readings, lm.split.shape, first, model=name, source=source, examples=total)


# ---------------------------------------------------------------- summarising


def summarise(
    readings: Readings, shape: ModelShape, min_layer: int, *, model: str, source: str, examples: int
) -> Probe:
    """Make a probe of readings; no model is run."""
    agree = readings.rank == 0  # [L, N]
    depth, tokens = agree.shape
    numbers = torch.arange(1, depth + 1)[:, None]
    saturation = depth + 1 - agree.flip(0).long().cumprod(0).sum(0)  # [N]
    oracle = torch.where(agree & (numbers >= min_layer), numbers, depth).amin(0)  # [N]
    layers = tuple(_layer_report(readings, shape, layer, saturation) for layer in range(1, depth + 1))
    kept = layers[min_layer - 1].coverage_size
    usual = Pruning("fixed", shape.vocabulary, depth, min_layer).first_size()
    head, fill = ratios(shape)
    full = exit_flops(shape, depth, None)

    def share(counts: Sequence[int], first: int | None, kept: int | None = None) -> float:
        spent = sum(n * exit_flops(shape, layer, first, kept) for layer, n in enumerate(counts, 1))
        return spent / tokens / full

    def margin(counts: Sequence[int], first: int, kept: int | None = None) -> float:
        """Half of a 95 % interval, at its widest: the positions of an example may all be alike."""
        costs = [exit_flops(shape, layer, first, kept) / full for layer in range(1, depth + 1)]
        mean = share(counts, first, kept)
        variance = sum(n * (cost - mean) ** 2 for n, cost in zip(counts, costs, strict=True)) / tokens
        return 1.96 * math.sqrt(variance / (examples - 1)) if examples > 1 else math.inf

    sober, best = _depths(saturation, depth), _depths(oracle, depth)
    leave = _depths(saturation.clamp(min=min_layer), depth).counts
    flops = {"untested": share(leave, None), "tested": share(leave, min_layer), "pruned": share(leave, min_layer, kept)}
    margins = {"tested": margin(leave, min_layer), "pruned": margin(leave, min_layer, kept)}
    suitable = any(flops[name] + margins[name] < 1 for name in margins)
    return Probe(
        model=model,
        source=source,
        examples=examples,
        tokens=tokens,
        num_layers=depth,
        vocabulary=shape.vocabulary,
        min_layer=min_layer,
        layers=layers,
        saturation=sober,
        oracle=best,
        suggested_min_layer=_believable_from(layers),
        suggested_vocabulary_size=kept,
        head_ratio=head,
        fill_ratio=fill,
        break_even=break_even(shape, min_layer),
        break_even_pruned=break_even(shape, min_layer, kept),
        default_vocabulary_size=usual,
        default_coverage=(readings.rank[min_layer - 1] < usual).double().mean().item(),
        break_even_default=break_even(shape, min_layer, usual),
        ceiling=1 / share(best.counts, None),
        flops=flops,
        suitable=suitable,
        verdict=verdict(flops, margins, head, sober.mean, min_layer, depth, examples),
    )


def _quantiles(values: Tensor) -> dict[str, float]:
    ordered = values.double().sort().values  # torch.quantile refuses more than 16 million values
    places = torch.tensor(list(QUANTILES.values()), dtype=torch.double) * (len(ordered) - 1)
    low, high = ordered[places.floor().long()], ordered[places.ceil().long()]
    return dict(zip(QUANTILES, torch.lerp(low, high, places.frac()).tolist(), strict=True))


def _depths(layers: Tensor, depth: int) -> Depths:
    counts = torch.bincount(layers, minlength=depth + 1)[1:]
    return Depths(layers.double().mean().item(), _quantiles(layers), tuple(counts.tolist()))


def _layer_report(readings: Readings, shape: ModelShape, layer: int, saturation: Tensor) -> LayerReport:
    rank, peak, gap = (column[layer - 1].double() for column in readings)  # [N]
    covered = rank.sort().values[math.ceil(COVERAGE * len(rank)) - 1]
    size, early = int(covered) + 1, layer < len(readings.rank)
    agreement, sure = (rank == 0).double().mean().item(), peak.mean().item()
    return LayerReport(
        layer=layer,
        agreement=agreement,
        max_probability=sure,
        gap=gap.mean().item(),
        overconfidence=sure - agreement,
        rank=_quantiles(rank),
        coverage_size=size,
        settled=(saturation <= layer).double().mean().item(),
        break_even=break_even(shape, layer) if early else None,
        break_even_pruned=break_even(shape, layer, size) if early else None,
    )


def _believable_from(layers: Sequence[LayerReport]) -> int | None:
    """First layer from which on, up to L-1, the mean confidence is off by less than the tolerance."""
    found = None
    for report in reversed(layers[:-1]):
        if abs(report.overconfidence) >= TOLERANCE:
            break
        found = report.layer
    return found
