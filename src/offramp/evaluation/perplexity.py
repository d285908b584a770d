"""Perplexity with exits: the text is forced, and each token is scored by the exit that the policy takes for it.

This is the generation loop itself, token by token, with the keys and values that exits leave behind; only the choice of
the token is taken from it. Each passage begins with the tokenizer's start token (or with the last token of the passage
before it, which is not scored again), and nothing before that is seen.

How tokens are forced and what their probability is: `offramp.evaluation.forced`. How many of the text lay outside a
pruned vocabulary, and could not have been generated, is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offramp.core.generation import pieces
from offramp.evaluation.forced import force, require_scores
from offramp.evaluation.record_file import Record, header_of
from offramp.evaluation.records import compared
from offramp.evaluation.rounds import Arm
from offramp.families.finite import broken_at, not_finite
from offramp.training.data import read_texts

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Passage:
    """A piece of a text: token ids, the first of which is only read, all others predicted."""

    id: str
    group: str
    ids: tuple[int, ...]


def read_passages(lm: LanguageModel, paths: Sequence[Path], *, window: int = 256) -> list[Passage]:
    """Texts of files cut into passages of at most `window` predicted tokens; of several texts each is a group."""
    if lm.split.is_encoder_decoder:
        raise ValueError("perplexity needs a decoder-only model; give an encoder-decoder another task")
    if lm.tokenizer is None:
        raise ValueError("the model was loaded without a tokenizer, which a text needs")
    longest = lm.split.max_positions
    if window < 1 or (longest is not None and window >= longest):
        raise ValueError(f"window is {window}; allowed are 1..{'any' if longest is None else longest - 1} tokens")
    texts = [text for path in paths for text in read_texts(path)]
    bos = lm.tokenizer.bos_token_id
    passages = []
    for number, text in enumerate(texts):
        ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = [] if bos is None else [bos]
        for at in range(0 if start else 1, len(ids), window):
            piece = tuple([*(start or ids[at - 1 : at]), *ids[at : at + window]])
            group = f"{number}" if len(texts) > 1 else f"{number}:{at}"
            passages.append(Passage(f"{number}:{at}", group, piece))
    if not passages:
        raise ValueError("the text is too short; give at least two tokens")
    return passages


@dataclass(frozen=True)
class PassageArm(Arm):
    """Scores passages, by a decoder-only model.

    Of its records, `tokens` are those it would have said, each after the text so far; `scores` are "probability", the
    geometric mean over the text's tokens (the inverse of the passage's perplexity), and "accuracy", how often what it
    would have said is the text's token; `sums` are "nats", minus the sum of the logarithms, and "outside", the tokens
    that pruning had excluded.
    """

    def check(self) -> None:
        """Raise a ValueError if the policy does not fit the model, or its tokens cannot be forced."""
        require_scores(self.lm, self.policy)

    def header(self, passages: Sequence[Passage], batch_size: int) -> dict[str, Any]:
        """How records come about."""
        learns = {} if self.learner is None else {"learning": "over all passages"}  # an earlier version's did not
        return header_of(self.lm, {"name": PERPLEXITY}, passages, self.policy, learns, batch_size)

    def answer(self, batch: Sequence[Passage]) -> list[Record]:
        """Records that are not compared with the full model's yet."""
        texts = [passage.ids[1:] for passage in batch]
        forced = force(self.lm, [passage.ids[:1] for passage in batch], texts, self.policy, self.learner)
        records = []
        for row, passage in enumerate(batch):
            count = len(passage.ids) - 1
            said = forced.said[row, :count].tolist()
            nats = -math.fsum(forced.log_p[row, :count].tolist())
            if not math.isfinite(nats):
                lm, where = self.lm, "in the readout of an exit"
                ids = torch.tensor([passage.ids[:-1]], device=lm.split.device)
                raise broken_at(lm.split, ids) or not_finite(lm.name, where, lm.model.dtype)
            right = sum(a == b for a, b in zip(said, passage.ids[1:], strict=True)) / count
            records.append(
                Record(
                    passage.id, passage.group, self.name, self.lm.decode([said])[0], said, forced.layers[row],
                    {"probability": math.exp(-nats / count), "accuracy": right}, agreement=1.0, same=True,
                    **forced.bills[row], sums={"nats": nats, "outside": int(forced.outside[row])},
                    pieces=pieces(self.lm.tokenizer, said), confidences=forced.confidences[row],
                )
            )  # fmt: skip
        return records

    def judged(self, passage: Passage, record: Record, full: Record) -> Record:
        """A record beside the full model's."""
        return replace(record, **compared(record, full))
