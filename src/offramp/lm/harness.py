"""A model with exits as lm-evaluation-harness sees it; `offramp.lm.harness_run` compares it with the full model.

Texts are encoded, cut to the context, batched and cut at stop strings as its own Hugging Face models do it (`HFLM`,
whose subclass this is); what the model says and thinks of texts comes from the generation loop of `offramp`.

* **generate_until** is `LanguageModel.generate`.
* **loglikelihood** and **loglikelihood_rolling** force the continuation on the loop (`offramp.evaluation.perplexity`):
  a token is scored by the readout of the exit at which the policy leaves it. The first token of a continuation is read
  off the prompt's pass, at full depth unless the policy is static, so that choices of one token score as the full
  model's. The loop goes token by token, also for the full model, so that seconds compare; `HFLM` scores in one pass.

lm-eval 0.4 finds models by name only in its own table, not by entry points of other packages. Importing this module
adds "offramp" to that table, so `lm_eval`'s command line is

    python -m offramp.lm.harness --model offramp --model_args pretrained=smollm2,exits=bundled,policy=FILE --tasks …
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm

from offramp.core.engine import Engines
from offramp.core.generation_inputs import SAMPLING
from offramp.core.language_model import LanguageModel
from offramp.core.policy import ExitPolicy
from offramp.evaluation.perplexity import force, require_scores
from offramp.evaluation.records import learner_of
from offramp.hub.models import load

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts, if they are to be remembered, and the token ids of context and continuation."""


@dataclass
class Spent:
    """What requests cost so far: `layers` is a sum over tokens, `full_flops` the full model's for as many."""

    tokens: int = 0
    layers: int = 0
    flops: int = 0
    full_flops: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """JSON values; with the mean layer and FLOPs over the full model's."""
        return {
            **vars(self),
            "mean_layer": self.layers / max(self.tokens, 1),
            "flops_over_full": self.flops / max(self.full_flops, 1),
        }


@register_model("offramp")
class HarnessModel(HFLM):  # type: ignore[misc]
    """A `LanguageModel` under an exit policy, for `lm_eval.simple_evaluate`.

    Args:
        pretrained: The model, or what `offramp.load` loads.
        policy: The exit policy, or a file of one; None: the full model.
        exits: As for `offramp.load`; likewise `dtype`, `engine`, `device` and `revision`.
        batch_size: Requests answered together.
        max_batch_size: lm-eval gives it; not used, since batches are as large as they were asked to be.
        **options: Of `HFLM`, about texts: `max_length`, `add_bos_token`, `prefix_token_id`, `think_end_token`,
            `enable_thinking`, `chat_template_args`.

    Raises:
        ValueError: The model has no tokenizer, is an encoder-decoder, or the batch size is not a number.
    """

    def __init__(
        self,
        pretrained: LanguageModel | str,
        policy: ExitPolicy | str | None = None,
        *,
        exits: str | None = None,
        dtype: str = "float32",
        engine: Engines = "auto",
        device: str | None = None,
        revision: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str):
            if device == "cuda:0":  # lm-eval's command line says so where nobody said anything
                device = None  # that GPU where there is one; its own models do likewise
            pretrained = load(pretrained, dtype=dtype, device=device, exits=exits, engine=engine, revision=revision)
        if pretrained.tokenizer is None:
            raise ValueError("the model was loaded without a tokenizer, which the tasks' texts need")
        if pretrained.split.is_encoder_decoder:
            raise ValueError("the harness needs a decoder-only model; offramp evaluate --task takes encoder-decoders")
        if not str(batch_size or 1).isdecimal():
            raise ValueError(f"batch_size is {batch_size!r}; give a number, such as 1")
        tokenizer = copy.deepcopy(pretrained.tokenizer)  # it may be given a token for padding
        super().__init__(pretrained.model, tokenizer=tokenizer, batch_size=int(batch_size or 1), **options)
        self.lm, self.policy, self.spent = pretrained, ExitPolicy.of(policy), Spent()

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the scores: the model, the policy, and what all requests cost."""
        return {
            "model_name": self.lm.name,
            "model_dtype": self.lm.number_format,
            "exit_policy": None if self.policy is None else self.policy.to_dict(),
            "exit_costs": self.spent.to_dict(),
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether it is what would have been said."""
        require_scores(self.lm, self.policy)
        learner = learner_of(self.lm, self.policy)
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]))  # alike ones together
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                texts = [requests[index][2] for index in batch]
                prompts = [self._shortened(requests[index]) for index in batch]
                forced = force(self.lm, prompts, texts, self.policy, learner)
                for row, index in enumerate(batch):
                    count, asked = len(texts[row]), requests[index][0]
                    same = forced.said[row, :count].tolist() == list(texts[row])
                    answers[index] = (float(forced.log_p[row, :count].sum()), same)
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, answers[index])
                self._spend(forced.layers, max(map(len, prompts)), forced.bills)
                bar.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _shortened(self, request: Request) -> list[int]:
        """The context, its beginning cut off where it does not fit before the continuation."""
        _, context, text = request
        if len(text) > self.max_length:
            raise ValueError(f"a continuation has {len(text)} tokens, but the model's context holds {self.max_length}")
        room = max(self.max_length + 1 - len(text), 1)
        return context[-room:]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Prompts and their continuations, [B, T]."""
        if not options.get("do_sample"):
            options = {name: value for name, value in options.items() if name not in SAMPLING} | {"do_sample": False}
        inputs = {"input_ids": context, "attention_mask": attention_mask}
        made = self.lm.generate(
            {name: value for name, value in inputs.items() if value is not None},
            policy=self.policy,
            max_length=max_length,
            stopping_criteria=[self._ends(stop, context.shape[1])],
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        costs = made.costs
        bill = {"flops": costs.flops, "bytes": costs.bytes, "seconds": costs.seconds}
        self._spend(made.exit_layers, context.shape[1], [bill])
        return made.sequences

    def _ends(self, stop: list[str], prompt: int) -> Any:
        """Whether a stop string stands in the last tokens of each row's continuation, [B, T] -> bool [B]."""
        sought = [text for text in stop if text]
        longest = max((len(self.tokenizer.encode(text, add_special_tokens=False)) for text in sought), default=0)

        def ended(ids: Tensor, scores: Any = None, **_: Any) -> Tensor:
            texts = self.tokenizer.batch_decode(ids[:, max(prompt, ids.shape[1] - longest - 2) :])  # as HFLM looks back
            return torch.tensor([any(end in text for end in sought) for text in texts], device=ids.device)

        return ended

    def _spend(self, layers: Sequence[Sequence[int]], prompt: int, bills: Sequence[dict[str, Any]]) -> None:
        """Add what a batch cost; its prompts are as long as the longest one."""
        spent, shape = self.spent, self.lm.split.shape
        for row in layers:
            spent.tokens += len(row)
            spent.layers += sum(row)
            spent.full_flops += shape.generation_flops(prompt, len(row))
        for bill in bills:
            spent.flops += bill["flops"]
            spent.bytes += bill["bytes"]
            spent.seconds += bill["seconds"]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
