"""Perplexity with exits: the text is forced, and each token is scored by the exit that the policy takes for it.

This is the generation loop itself, token by token, with the keys and values that exits leave behind; only the choice of
the token is taken from it. Each passage begins with the tokenizer's start token (or with the last token of the passage
before it, which is not scored again), and nothing before that is seen.

A token's probability is always that of the whole vocabulary at its exit. Where a policy judges on a pruned vocabulary,
all other tokens would have probability 0, so their distribution is read out once more, in full, at the same layer; this
is not billed, since generating needs no probabilities, but its time is measured. How many tokens of the text lay
outside the pruned vocabulary, and could not have been generated, is counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.core.costs import Ledger
from offramp.core.decoding import Step, decode
from offramp.core.generation import by_row
from offramp.core.plan import resolve
from offramp.core.sampling import Sampler
from offramp.core.token_text import pieces
from offramp.core.vocabulary import require_frequent
from offramp.evaluation.record_file import Progress, Record, header_of
from offramp.evaluation.records import compared, learner_of, prefill_parts, settle, shares, sure
from offramp.evaluation.rounds import take_turns
from offramp.families.finite import broken_at, not_finite
from offramp.training.data import read_texts

if TYPE_CHECKING:
    from offramp.core.adaptive_threshold import AdaptiveThreshold
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Passage:
    """A piece of a text: token ids, the first of which is only read, all others predicted."""

    id: str
    group: str
    ids: tuple[int, ...]


def read_passages(
    lm: LanguageModel, paths: Sequence[Path], *, window: int = 256, fields: Sequence[str] = ("text",)
) -> list[Passage]:
    """Cut texts into passages.

    Args:
        lm: The model.
        paths: Files as `offramp.training.data.read_texts` reads them.
        window: Most predicted tokens of a passage.
        fields: Keys of the texts in JSON objects.

    Returns:
        Passages; those of one document form a group, if there are several documents.

    Raises:
        ValueError: A file is not of that layout, nothing to predict, a window outside the model's context, no
            tokenizer, or an encoder-decoder.
    """
    if lm.split.is_encoder_decoder:
        raise ValueError("perplexity needs a decoder-only model; give an encoder-decoder another task")
    if lm.tokenizer is None:
        raise ValueError("the model was loaded without a tokenizer, which a text needs")
    longest = lm.split.max_positions
    if window < 1 or (longest is not None and window >= longest):
        raise ValueError(f"window is {window}; allowed are 1..{'any' if longest is None else longest - 1} tokens")
    texts = [text for path in paths for text in read_texts(path, fields)]
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


def perplexity_records(
    lm: LanguageModel,
    passages: Sequence[Passage],
    arm: str,
    policy: ExitPolicy | None,
    path: Path,
    *,
    full: Mapping[str, Record] | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[Record]:
    """Score passages under one policy; every finished batch is appended to `path`, from which a repeated call goes on.

    Args:
        lm: The model.
        passages: With ids of their own.
        arm: What the records call the policy.
        policy: The exit policy; None: the full model.
        path: JSON Lines file of these records and no others.
        full: Records of the full model by passage id, to compare with; needed unless `policy` is None.
        batch_size: Passages scored together.
        progress: Called with the passages done and asked for.

    Returns:
        One record per passage. `tokens` are those it would have said, each after the text so far; `scores` are
        "probability", the geometric mean over the text's tokens (the inverse of the passage's perplexity), and
        "accuracy", how often what it would have said is the text's token; `sums` are "nats", minus the sum of the
        logarithms, and "outside", the tokens that pruning had excluded.

    Raises:
        ValueError: As for `decode_records`, or a policy whose tokens cannot be forced.
    """
    one = PassageArm(lm, arm, policy)
    return take_turns([one], {arm: path}, passages, batch_size, full=full, progress=progress)[arm]


@dataclass(frozen=True)
class PassageArm:
    """An `offramp.evaluation.rounds.Arm` that scores passages.

    Attributes:
        lm: The model, decoder-only.
        name: Of the arm.
        policy: The exit policy; None: the full model.
    """

    lm: LanguageModel
    name: str
    policy: ExitPolicy | None

    @property
    def learner(self) -> AdaptiveThreshold | None:
        """The policy's threshold, if it learns."""
        return learner_of(self.lm, self.policy)

    def check(self) -> None:
        """Raise a ValueError if the policy does not fit the model, or its tokens cannot be forced."""
        if self.policy is None:
            return
        resolve(self.policy, self.lm.num_layers, self.lm.vocabulary, self.lm.split.exit_layers)
        require_frequent(self.lm.exits, self.policy.vocabulary)
        if self.policy.skipped == "verify":
            raise ValueError("under skipped='verify' the full model scores; evaluate 'propagate' or 'defer'")
        if (source := self.policy.decode_from) != "logits":
            raise ValueError(f"perplexity is that of an exit's logits; decode_from={source!r} has others")

    def header(self, passages: Sequence[Passage], batch_size: int) -> dict[str, Any]:
        """How records come about."""
        learns = {} if self.learner is None else {"learning": "over all passages"}  # an earlier version's did not
        return header_of(self.lm, {"name": PERPLEXITY}, passages, self.policy, learns, batch_size)

    def answer(self, batch: Sequence[Passage]) -> list[Record]:
        """Records that are not compared with the full model's yet."""
        forced, layers, confidences, bills = _score(self.lm, batch, self.policy, self.learner)
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
                    passage.id, passage.group, self.name, self.lm.decode([said])[0], said, layers[row],
                    {"probability": math.exp(-nats / count), "accuracy": right}, agreement=1.0, same=True,
                    **bills[row], sums={"nats": nats, "outside": int(forced.outside[row])},
                    pieces=pieces(self.lm.tokenizer, said), confidences=confidences[row],
                )
            )  # fmt: skip
        return records

    def judged(self, passage: Passage, record: Record, full: Record) -> Record:
        """A record beside the full model's."""
        return replace(record, **compared(record, full))


class _Forced:
    """Makes the generation loop write given tokens, and notes what it thought of them.

    Args:
        targets: The tokens, [B, T], padded at the end.
        prompt: Tokens before the first of them.
    """

    def __init__(self, targets: Tensor, prompt: int) -> None:
        self.targets, self.prompt = targets, prompt
        self.log_p = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        self.said = torch.full_like(targets, -1)
        self.outside = torch.zeros(len(targets), dtype=torch.long, device=targets.device)
        self.rereads = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """As a logits processor: scores [B, V] in which only the next token of the text is possible.

        Nothing at all is possible in rows that were read on a pruned vocabulary, upon which the loop reads these out in
        full and comes back.

        Returns:
            Scores [B, V].
        """
        at = ids.shape[1] - self.prompt
        pruned = (scores == -torch.inf).any(-1)  # [B, V] -> [B]
        again = self.said[:, at] >= 0
        target = self.targets[:, at, None]
        log_p = scores.log_softmax(-1).gather(1, target)[:, 0]
        self.rereads += int(again.any())
        self.outside += pruned & (log_p == -torch.inf)
        self.said[:, at] = torch.where(again, self.said[:, at], scores.argmax(-1))
        self.log_p[:, at] = log_p.double()
        only = torch.full_like(scores, -torch.inf).scatter(1, target, 0.0)
        return only.masked_fill(pruned[:, None], -torch.inf)


class _Unending(Sampler):
    """Ends at no token: a text may go on behind an end of sequence, which is never pruned, as in generation."""

    def is_end(self, token: int) -> bool:
        """No token does."""
        return False


def _score(
    lm: LanguageModel, batch: Sequence[Passage], policy: ExitPolicy | None, learner: AdaptiveThreshold | None
) -> tuple[_Forced, list[list[int]], list[list[float | None]], list[dict[str, Any]]]:
    """What was noted; exit layers, confidences and costs of each row."""
    began = time.perf_counter()
    device = lm.split.device
    longest = max(len(passage.ids) for passage in batch) - 1
    padded = torch.tensor([[*p.ids, *[0] * (longest + 1 - len(p.ids))] for p in batch], device=device)
    lengths = torch.tensor([len(passage.ids) for passage in batch], device=device)
    forced = _Forced(padded[:, 1:], prompt=1)
    eos = lm.model.generation_config.eos_token_id
    sampler = _Unending(
        processors=forced,
        stopping=lambda ids: lengths <= ids.shape[1],
        eos=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )
    ledger = Ledger(lm.split.shape, device)
    seen, first, begun = list[Step](), dict[str, int](), 0.0
    steps = decode(
        lm.decoder, padded[:, :1], policy, max_new_tokens=longest, sampler=sampler, ledger=ledger, adaptive=learner
    )
    for step in steps:
        first = prefill_parts(ledger.costs) if step.prefill else first
        begun = time.perf_counter() - began if step.prefill else begun
        seen.append(step)
    settle(lm)
    seconds = (begun, time.perf_counter() - began)
    costs, shape = ledger.settle(), lm.split.shape
    readout = costs.parts["readout"]
    readout.flops -= forced.rereads * len(batch) * shape.readout_flops()
    readout.bytes -= forced.rereads * shape.readout_weights() * shape.element_size
    _, layers, confidences = by_row(seen, len(batch))
    return forced, layers, sure(confidences), shares(costs, first, seconds, len(batch))
