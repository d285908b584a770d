"""Texts forced on the generation loop: each of their tokens is scored by the exit that the policy takes for it.

This is what a log-likelihood and a perplexity with exits mean everywhere: the loop itself runs, token by token, with
the keys and values that exits leave behind; only the choice of the token is taken from it. As in generation, the prompt
runs at full depth (a static policy: at its own), so the first token is scored there; exits begin with the second. Each
passage begins with the tokenizer's start token (or with the last token of the passage before it, which is not scored
again), and nothing before that is seen.

A token's probability is always that of the whole vocabulary at its exit. Where a policy judges on a pruned vocabulary,
all other tokens would have probability 0, so their distribution is read out once more, in full, at the same layer; this
is not billed, since generating needs no probabilities, but its time is measured. How many of the text lay outside a
pruned vocabulary, and could not have been generated, is counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.core.batch import Step
from offramp.core.costs import Ledger
from offramp.core.decoding import decode
from offramp.core.generation import by_row, pieces
from offramp.core.generation_inputs import padded
from offramp.core.readout import require_fit
from offramp.core.sampling import Sampler, ends_of
from offramp.evaluation.record_file import Record, header_of
from offramp.evaluation.records import Arm, compared, prefill_parts, settle, shares, sure
from offramp.families.finite import broken_at, not_finite
from offramp.training.data import read_texts

if TYPE_CHECKING:
    from offramp.core.adaptive_threshold import AdaptiveThreshold
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Forced:
    """What was found about B texts of at most T tokens; behind the end of a row its tensors mean nothing.

    Attributes:
        log_p: Log-probability of each token, in nats, float64 [B, T].
        said: The token that would have been said instead, [B, T].
        outside: Tokens that a pruned vocabulary had excluded, [B].
        layers: One list per row, the layer in 1..L that each token was scored at.
        confidences: Likewise, as `Record.confidences` has them.
        bills: What each row bears of the costs, see `offramp.evaluation.records.shares`.
    """

    log_p: Tensor
    said: Tensor
    outside: Tensor
    layers: list[list[int]]
    confidences: list[list[float | None]]
    bills: list[dict[str, Any]]


def require_scores(lm: LanguageModel, policy: ExitPolicy | None) -> None:
    """Raise a ValueError unless a policy fits the model, and its tokens are those of its exits' logits."""
    if policy is None:
        return
    require_fit(lm.split, policy)
    if policy.skipped == "verify":
        raise ValueError("under skipped='verify' the full model scores; evaluate 'propagate' or 'defer'")
    if (source := policy.decode_from) != "logits":
        raise ValueError(f"perplexity is that of an exit's logits; decode_from={source!r} has others")


def force(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    policy: ExitPolicy | None,
    learner: AdaptiveThreshold | None = None,
) -> Forced:
    """Score texts behind prompts, which are only read, by a decoder-only model; token ids of each row, at least one."""
    began = time.perf_counter()
    device = lm.split.device
    read = padded([list(prompt) for prompt in prompts], lm.vocabulary, right=False)
    ids, mask = read["input_ids"].to(device), read["attention_mask"].to(device)
    longest = max(map(len, texts))
    targets = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    ends = torch.tensor([ids.shape[1] + len(text) for text in texts], device=device)
    noted = _Noting(targets, ids.shape[1])
    sampler = _Unending(
        processors=noted, stopping=lambda ids: ends <= ids.shape[1], eos=ends_of(lm.model.generation_config)
    )
    ledger = Ledger(lm.split.shape, device)
    seen, first, begun = list[Step](), dict[str, int](), 0.0
    steps = decode(
        lm.decoder, ids, policy, max_new_tokens=longest, sampler=sampler, mask=None if bool(mask.all()) else mask,
        ledger=ledger, adaptive=learner,
    )  # fmt: skip
    for step in steps:
        first = prefill_parts(ledger.costs) if step.prefill else first
        begun = time.perf_counter() - began if step.prefill else begun
        seen.append(step)
    settle(lm)
    seconds = (begun, time.perf_counter() - began)
    costs, shape = ledger.settle(), lm.split.shape
    readout = costs.parts["readout"]
    readout.flops -= noted.rereads * len(texts) * shape.readout_flops()
    readout.bytes -= noted.rereads * shape.readout_weights() * shape.element_size
    bills = shares(costs, first, seconds, len(texts))
    _, layers, confidences = by_row(seen, len(texts))
    return Forced(noted.log_p, noted.said, noted.outside, layers, sure(confidences), bills)


class _Noting:
    """Makes the loop write the targets [B, T] behind so many tokens of a prompt, and notes what it thought of them."""

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
