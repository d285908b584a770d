"""Readouts of every layer at once, teacher-forced: what each layer would have said at a position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from offramp.families import SplitModel
from offramp.families.finite import name_of, require_finite

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

ROWS = 8
"""Prompts decoded together."""
WINDOW = 512
"""Longest piece of a given text, in tokens."""


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
