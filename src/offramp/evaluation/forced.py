"""Texts forced on the generation loop: each of their tokens is scored by the exit that the policy takes for it.

This is what a log-likelihood with exits means everywhere: the loop itself runs, token by token, with the keys and
values that exits leave behind; only the choice of the token is taken from it. As in generation, the prompt runs at full
depth (a static policy: at its own), so the first token is scored there; exits begin with the second.

A token's probability is always that of the whole vocabulary at its exit. Where a policy judges on a pruned vocabulary,
all other tokens would have probability 0, so their distribution is read out once more, in full, at the same layer; this
is not billed, since generating needs no probabilities, but its time is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.core.costs import Ledger
from offramp.core.decoding import Step, decode
from offramp.core.generation import by_row
from offramp.core.prompt_inputs import padded
from offramp.core.readout import require_fit
from offramp.core.sampling import Sampler, ends_of
from offramp.evaluation.records import prefill_parts, settle, shares, sure

if TYPE_CHECKING:
    from offramp.core.adaptive_threshold import AdaptiveThreshold
    from offramp.core.language_model import LanguageModel
    from offramp.core.policy import ExitPolicy


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
