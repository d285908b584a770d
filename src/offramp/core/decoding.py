"""The one generation loop: it knows token ids, no text, and yields one `Step` per generated position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.core.adaptive_threshold import AdaptiveThreshold
from offramp.core.batch import Batch
from offramp.core.batch import Step as Step
from offramp.core.costs import Ledger
from offramp.core.plan import resolve
from offramp.core.policy import DRAFTER, ExitPolicy
from offramp.core.sampling import NoProbabilitiesError, Sampler
from offramp.core.verifying import VerifyingBatch
from offramp.families import SplitModel


@torch.no_grad()
def decode(
    model: SplitModel,
    ids: Tensor,
    policy: ExitPolicy | None,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
    ledger: Ledger | None = None,
    adaptive: AdaptiveThreshold | None = None,
) -> Iterator[Step]:
    """Generate, leaving the network where the policy says so.

    A prompt runs at full depth (a static policy: at its own depth; with `prompt_layer`, only its last position goes
    deeper) and its token is marked `prefill`; the single start token of an encoder-decoder is an ordinary step. Rows
    stop at EOS, by `sampler.stopping` or at the length limit.

    Args:
        model: The model.
        ids: Prompt, or decoder start tokens, [B, T].
        policy: The exit policy; None: the full model.
        max_new_tokens: Most tokens generated per row.
        sampler: Processors, draws and stopping; None: plain greedy without EOS.
        mask: 1 for tokens, 0 for left padding, [B, T]; None without padding.
        positions: Positions of the prompt's tokens, [B, T]; new ones go on from its last. None: counted from the mask.
        memory: Encoder output, [B, X, D], for encoder-decoders.
        memory_mask: Mask of the encoder's input, [B, X].
        ledger: Where costs are written down.
        adaptive: What an adaptive policy has learnt so far, refitted here and learning on; None: nothing yet.

    Yields:
        One `Step` per position, in order. Nothing unverified is yielded under "verify".

    Raises:
        ValueError: The policy does not fit the model.
        NotFiniteError: The model computes NaN or infinity for a token, or for one it was to be drawn from.
    """
    batch = batch_of(model, ids, policy, sampler or Sampler(), max_new_tokens, ledger, adaptive)
    verifying = isinstance(batch, VerifyingBatch)
    read = batch.first(mask=mask, positions=positions, memory=memory, memory_mask=memory_mask)
    while True:
        try:
            if isinstance(batch, VerifyingBatch):
                yield from batch.verified(read)
            else:
                yield batch.settle(read)
        except NoProbabilitiesError as error:
            raise batch.broken() or error from None
        if not batch.rows:
            return
        if model.fused and not verifying and (stretch := _stretch_of(batch)) is not None:
            yield from stretch.steps()
            return
        read = batch.read()


def batch_of(
    model: SplitModel,
    ids: Tensor,
    policy: ExitPolicy | None,
    sampler: Sampler,
    max_new_tokens: int,
    ledger: Ledger | None = None,
    adaptive: AdaptiveThreshold | None = None,
) -> Batch:
    """The batch that a policy is for; arguments as for `decode`."""
    plan = resolve(policy or ExitPolicy(threshold=None), model.num_layers, model.shape.vocabulary, model.exit_layers)
    adaptive = (adaptive or AdaptiveThreshold.of(plan.policy)) if plan.policy.adaptive else None
    if adaptive is not None:
        plan = replace(plan, thresholds=dict.fromkeys(plan.thresholds, adaptive.refit()))
    ledger = ledger or Ledger(model.shape, ids.device)
    ledger.costs.engine = model.engine
    kind: type[Batch] = VerifyingBatch if plan.policy.skipped == "verify" and plan.thresholds else Batch
    if DRAFTER in plan.thresholds:
        from offramp.core.drafting import DraftingBatch  # only models with a drafter have a use for it

        kind = DraftingBatch
    return kind(model, ids, plan, sampler, max_new_tokens, ledger, adaptive)


def _stretch_of(batch: Batch) -> Any:
    from offramp.core.stretch import stretch_of  # only some engines have a use for it

    return stretch_of(batch)
