"""A loaded model, its tokenizer, and generation with early exits: text in, text out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from offramp.core.adaptive_threshold import AdaptiveThreshold
from offramp.core.batch import Step
from offramp.core.costs import Costs, Ledger
from offramp.core.custom_generate import Prepared, prepare
from offramp.core.engine import Engine, Engines
from offramp.core.exits import Exits
from offramp.core.generation import Generation, Stream, by_row
from offramp.core.generation_inputs import (
    GenerationOptions,
    Prompts,
    checked,
    has_template,
    most_new_tokens,
    padded,
    token_ids,
    tokenised,
)
from offramp.core.generation_inputs import Prompt as Prompt
from offramp.core.policy import ExitPolicy
from offramp.core.sampling import Sampler
from offramp.families import SplitModel
from offramp.hub.messages import quiet
from offramp.hub.pretrained import Rounded, inside_peft
from offramp.runs.digests import fingerprint
from offramp.values import flag

if TYPE_CHECKING:
    import offramp


class Verb:
    """The function of `offramp` that has the attribute's name; its room is imported when it is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, one: Any, owner: type) -> Callable[..., Any]:
        import offramp

        function = getattr(offramp, self._name)
        return function if one is None else MethodType(function, one)


class LanguageModel:
    """A Hugging Face model with early exits; made by `offramp.load`.

    `probe`, `train`, `evaluate` and `calibrate` are the functions of these names in `offramp`, for this model.

    Args:
        model: The untouched Hugging Face model; or a `PeftModel`, whose base model it then is, adapters at work.
        tokenizer: Its tokenizer; None if only token ids will be used.
        name: What reports call it; None: its class.
        engine: What generates: "torch"; "native", our own kernels on the CPU (see `offramp.native`); "cuda", captured
            segments on a CUDA device (see `offramp.cuda`); or "auto": native on a CPU where it can be, else
            torch, decided when something is first generated.
        rounded: "int8" or "int4": matrices in so many bits per weight, with the native engine (see `offramp.load`).

    Raises:
        UnsupportedModelError: The architecture is not supported.
        NativeError: "native" or `rounded` is asked for, and the kernels cannot run the model, or cannot be had here.
        CudaError: "cuda" is asked for, and cannot run the model, or the model is not on a CUDA device.
    """

    if TYPE_CHECKING:
        probe, train, evaluate, calibrate = offramp.probe, offramp.train, offramp.evaluate, offramp.calibrate
    else:
        probe, train, evaluate, calibrate = Verb(), Verb(), Verb(), Verb()

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        name: str | None = None,
        *,
        engine: Engines = "auto",
        rounded: Rounded | None = None,
    ) -> None:
        model = inside_peft(model)
        self.model, self.tokenizer, self.name = model, tokenizer, name or type(model).__name__
        self._split = SplitModel(model)
        self._engine = Engine(model, self.name, engine, rounded=rounded)
        self._exits: Exits | None = None
        self._adaptive: dict[ExitPolicy, AdaptiveThreshold] = {}

    def __repr__(self) -> str:
        dtype = self.rounded or str(self.model.dtype).removeprefix("torch.")
        layers = self._split.exit_layers if self._exits is not None else ()
        exits = f"exits after {', '.join(map(str, layers))}" if layers else "no trained exits"
        if self._exits is not None and self._exits.drafter is not None:
            exits = f"{exits}, a drafter" if layers else "a drafter"
        return f"LanguageModel({self.name!r}, {self.num_layers} layers, {dtype}, {self._split.device}, {exits})"

    @property
    def decoder(self) -> SplitModel:
        """What generates: `split` itself, a `NativeModel` or a `CudaModel`, made anew if the model has changed."""
        own = self._engine.own()
        return self.split if own is None else own

    @property
    def engine(self) -> str:
        """What generates: "torch", "native" or "cuda"."""
        return self.decoder.engine

    @property
    def rounded(self) -> Rounded | None:
        """What matrices are rounded to: "int8", "int4" or nothing."""
        return self._engine.rounded

    @property
    def number_format(self) -> str:
        """Of the weights, and the engine if it is not torch, whose results differ by rounding: for records."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return dtype if self.engine == "torch" else f"{self.rounded or dtype}, {self.engine}"

    @property
    def split(self) -> SplitModel:
        """The model, layer by layer; made anew if its head was exchanged or resized."""
        if not self._split.is_current:
            self._split = SplitModel(self.model)
            self._split.exits = self._exits
        return self._split

    @property
    def exits(self) -> Exits | None:
        """The trained exits as they were attached, in float32; None: every layer reads out with norm and head alone."""
        return self._exits

    def attach_exits(self, exits: Exits | None) -> None:
        """Read out through trained exits from now on; None: without any.

        A policy that names neither `min_layer` nor `exit_layers` then tests at their layers. A model that is not in
        float32 works with a copy: attach them again after training them further. What adaptive policies have learnt is
        forgotten.

        Raises:
            ValueError: They are for another number of layers or another width. (Whether they were made for these very
                weights is checked by `offramp.load`.)
        """
        self.split.exits = exits
        self._engine.attach(exits)
        self._exits = exits
        self._adaptive.clear()

    def save_exits(self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> None:
        """Write the attached exits to a folder for `offramp.load(name, exits=path)`, as exits for this model as it is.

        Args:
            path: A new or empty folder, or one with nothing but exits, which are replaced.
            settings: How they were trained, as JSON values; None: those they have.

        Raises:
            ValueError: No exits are attached.
            FileExistsError: There is something else of that name; it is left alone.
        """
        if self._exits is None:
            raise ValueError("the model has no trained exits to save; train some and attach them with attach_exits")
        from offramp.hub.exit_files import save_exits  # it knows posteriors, which decoding does not

        save_exits(self._exits, path, settings=settings, model=self.name, fingerprint=fingerprint(self.model))

    @property
    def num_layers(self) -> int:
        """Depth L of the decoder."""
        return self.split.num_layers

    @property
    def vocabulary(self) -> int:
        """V, the rows of the head."""
        return self.split.shape.vocabulary

    def generate(
        self,
        prompts: Prompts,
        *,
        policy: ExitPolicy | str | os.PathLike[str] | None = None,
        chat: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Continue prompts, leaving the network where the policy says so.

        Args:
            prompts: Texts, chats (lists of messages), or token ids (a tensor or array [B, T], or lists of numbers, one
                per row); also a single one of them, or the inputs a tokenizer or a speech processor made (a mapping
                with `input_ids` or `input_features`).
            policy: The exit policy, or the file of one; None: the full model.
            chat: Whether a text is a user's message in the tokenizer's chat template; None: where it has one. False
                continues the text as it stands.
            **options: See `GenerationOptions`: `max_new_tokens`, `temperature`, `seed`, `stop_strings`, … What is left
                out is as the model's generation config says.

        Returns:
            Sequences, texts, exit layers and costs.

        Raises:
            ValueError: Empty or too long prompts, options that are unknown, contradictory or out of range, or a policy
                that does not fit the model.
        """
        began = time.perf_counter()
        policy = ExitPolicy.of(policy)
        prepared, ledger = self._prepare(prompts, chat, options)
        with prepared.model.at_work():
            steps = list(prepared.steps(policy, ledger, self._learnt(policy)))
        if prepared.ids.is_cuda:
            torch.cuda.synchronize()
        ledger.costs.seconds = time.perf_counter() - began
        return self._collect(prepared.ids, steps, ledger.settle())

    def stream(
        self,
        prompts: Prompts,
        *,
        policy: ExitPolicy | str | os.PathLike[str] | None = None,
        chat: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Stream:
        """Generate and yield one `Step` per position as soon as it is certain.

        Args:
            prompts: As for `generate`.
            policy: As for `generate`.
            chat: As for `generate`.
            **options: As for `generate`.

        Returns:
            An iterator of steps, which also has the bill.

        Raises:
            ValueError: As for `generate`.
        """
        policy = ExitPolicy.of(policy)
        prepared, ledger = self._prepare(prompts, chat, options)
        return Stream(prepared, prepared.steps(policy, ledger, self._learnt(policy)), ledger)

    def sampler(self, ids: Sequence[int], **options: Unpack[GenerationOptions]) -> Sampler:
        """How `generate` would choose the tokens behind a prompt, for a row of a `RunningBatch`.

        Args:
            ids: The prompt's tokens.
            **options: As for `generate`; stop strings are left to the caller.

        Returns:
            The sampler, with a generator of its own if a seed is given.

        Raises:
            ValueError: As for `generate`.
        """
        return self._prepare([list(ids)], False, options)[0].sampler

    def adaptive_threshold(self, policy: ExitPolicy) -> AdaptiveThreshold:
        """What an adaptive policy has learnt on this model so far; each policy learns for itself.

        Args:
            policy: The policy, or an equal one.

        Returns:
            The threshold that `generate` and `stream` work with: `value` is where it stands, `reset()` forgets.

        Raises:
            ValueError: The policy's threshold is fixed.
        """
        if policy not in self._adaptive:
            self._adaptive[policy] = AdaptiveThreshold.of(policy)
        return self._adaptive[policy]

    def _learnt(self, policy: ExitPolicy | None) -> AdaptiveThreshold | None:
        return self.adaptive_threshold(policy) if policy is not None and policy.adaptive else None

    # ------------------------------------------------------------ inputs

    def encode(self, prompts: Prompts, *, chat: bool = False) -> dict[str, Tensor]:
        """Token ids and mask of prompts, left-padded for a decoder-only model, on the model's device.

        Args:
            prompts: As for `generate`.
            chat: Whether a text is a user's message in the tokenizer's chat template.

        Returns:
            `input_ids` and `attention_mask`, [B, T] both; a mapping of tensors is passed through.

        Raises:
            ValueError: No prompt, an empty prompt, texts and chats in one batch, or no tokenizer for a text.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if (ids := token_ids(prompts)) is not None:
            prompts = padded(ids, self.vocabulary, right=self.split.is_encoder_decoder)
        if isinstance(prompts, list | tuple):
            prompts = tokenised(prompts, self.tokenizer, chat=chat, right=self.split.is_encoder_decoder)
        inputs = {key: value.to(self.split.device) for key, value in dict(prompts).items()}
        if not any(value.numel() for value in inputs.values()):
            raise ValueError("the prompt is empty; give at least one token")
        if not {"input_ids", "input_features"} & set(inputs):
            raise ValueError(f"the inputs hold {', '.join(inputs)}; give input_ids, or a speech model's input_features")
        if self.split.family.listens and "input_features" not in inputs:
            raise ValueError(f"{self.name} listens and does not read; give the input_features that its processor makes")
        return inputs

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was made for chats."""
        return has_template(self.tokenizer)

    def _prepare(self, prompts: Prompts, chat: bool | None, asked: Mapping[str, Any]) -> tuple[Prepared, Ledger]:
        """Let `transformers` prepare a generation, and take over; a timed encoder pass included."""
        own = self.model.generation_config
        options = checked(asked, own)
        chat = None if chat is None else flag("chat", chat)
        options.setdefault("num_beams", 1)
        seed, stop_strings = options.pop("seed", None), options.pop("stop_strings", None)
        inputs = self.encode(prompts, chat=self._in_template(prompts) if chat is None else chat)
        self._check_length(inputs, partial(most_new_tokens, options, own))
        ledger = Ledger(self.split.shape, self.split.device)
        if self.split.is_encoder_decoder:
            inputs = self._with_memory(inputs, ledger)
        if stop_strings is not None and self.tokenizer is None:
            raise ValueError("the model was loaded without a tokenizer, which stop_strings need")
        if stop_strings is not None:
            options["stopping_criteria"] = StoppingCriteriaList(
                [*options.get("stopping_criteria", []), StopStringCriteria(self.tokenizer, stop_strings)]
            )
        generator = None
        if seed is not None:
            generator = torch.Generator(self.split.device).manual_seed(seed)

        def take_over(model: Any, input_ids: Tensor, **kwargs: Any) -> Prepared:
            return prepare(self.decoder, input_ids, generator=generator, **kwargs)

        if options.get("pad_token_id") is None and self.model.generation_config.pad_token_id is None:
            eos = options.get("eos_token_id", self.model.generation_config.eos_token_id)
            options["pad_token_id"] = eos[0] if isinstance(eos, list) else eos  # as generate does, without its notice
        with quiet(bars=True):  # what a caller can contradict was checked: more would be about options nobody gave
            prepared: Prepared = GenerationMixin.generate(self.model, **inputs, custom_generate=take_over, **options)
        return prepared, ledger

    def _in_template(self, prompts: Any) -> bool:
        """Whether texts are messages of a user unless the caller says otherwise: where there is a chat template."""
        texts = isinstance(prompts, str) or (isinstance(prompts, list | tuple) and bool(prompts))
        return texts and self.has_chat_template

    def _check_length(self, inputs: dict[str, Tensor], room: Callable[[int], int]) -> None:
        """Refuse prompts that do not fit the model's context, or leave nothing of the length that was asked for."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        new = 0 if self.split.is_encoder_decoder else room(length)
        if new < 1 and not self.split.is_encoder_decoder:
            raise ValueError(
                f"max_length is {length + new}, but the longest prompt has {length} tokens already; give max_new_tokens"
            )
        if limit is not None and length + new > limit:
            ask = f" and {new} new ones are asked for" if new else ""
            raise ValueError(
                f"the longest prompt has {length} tokens{ask}, but the model's context holds {limit}; "
                f"shorten the prompt{' or lower max_new_tokens' if length < limit and new else ''}"
            )

    def _with_memory(self, inputs: dict[str, Tensor], ledger: Ledger) -> dict[str, Any]:
        """Run the encoder, timed, so that `generate` finds its output."""
        from transformers.modeling_outputs import BaseModelOutput

        source = inputs.get("input_features", inputs.get("input_ids"))
        assert source is not None
        with torch.no_grad(), ledger.time("encoder"):
            memory = self.split.encode(source, inputs.get("attention_mask"))
        ledger.encoder(*memory.shape[:2])
        return {**inputs, "encoder_outputs": BaseModelOutput(last_hidden_state=memory)}

    # ------------------------------------------------------------ outputs

    def _collect(self, ids: Tensor, steps: list[Step], costs: Costs) -> Generation:
        sequences = torch.cat([ids, *(step.token[:, None] for step in steps)], dim=1)
        tokens, layers, confidences = by_row(steps, len(ids))
        texts = self.decode(tokens)
        return Generation(sequences, texts, layers, confidences, tokens, costs, self.num_layers, self.tokenizer)

    def decode(self, tokens: list[list[int]]) -> list[str]:
        """Texts of token ids, special tokens left out; empty without a tokenizer."""
        if self.tokenizer is None:
            return [""] * len(tokens)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
