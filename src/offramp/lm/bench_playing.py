"""One round of a bench: everything that generates, in turns."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from offramp.core.language_model import LanguageModel
from offramp.core.policy import ExitPolicy
from offramp.evaluation.records import settle
from offramp.lm.bench_arms import REFERENCE, Arms
from offramp.lm.bench_rounds import Round, Turn
from offramp.peers import Peer, PeerError

Batches = Sequence[Mapping[str, Tensor]]


@dataclass
class Players:
    """All that generates in a round.

    Attributes:
        arms: Policies by name.
        models: The model of each arm.
        peers: Other engines by name; one that fails is replaced by its error.
        probe: What measures a plain read, in bytes per second.
        tokens: Tokens generated per prompt.
    """

    arms: Arms
    models: Mapping[str, LanguageModel]
    peers: dict[str, Peer | PeerError]
    probe: Callable[[], float] | None
    tokens: int

    def play(self, batches: Batches, shuffle: random.Random, said: Callable[[int, str], None]) -> Round:
        """Generate every batch with every arm and peer, in an order that is shuffled for each batch.

        Args:
            batches: Inputs.
            shuffle: Random numbers of the order.
            said: Gets the number of generations done and the next one's name.

        Returns:
            The round, without peers that failed in it.
        """
        names = [*self.arms, *(name for name, peer in self.peers.items() if isinstance(peer, Peer))]
        played = Round([], {name: Turn() for name in names})
        for inputs in batches:
            if self.probe is not None:
                played.bandwidth.append(self.probe())
            played.order.append(shuffle.sample(names, len(names)))
            for place, name in enumerate(played.order[-1]):
                said(len(names) * (len(played.order) - 1) + place, name)
                if name in self.arms:
                    run(self.models[name], name, self.arms[name], inputs, self.tokens, played.arms[name])
                else:
                    self._ask(name, inputs, played.arms[name])
        for name, peer in self.peers.items():
            if isinstance(peer, PeerError):
                played.arms.pop(name, None)
        return played

    def _ask(self, name: str, inputs: Mapping[str, Tensor], turn: Turn) -> None:
        peer = self.peers[name]
        if isinstance(peer, Peer):
            try:
                turn.add_answer(peer.generate(inputs["input_ids"][0].tolist(), self.tokens))
            except PeerError as error:
                self.peers[name] = error


def run(
    lm: LanguageModel, arm: str, policy: ExitPolicy | None, inputs: Mapping[str, Tensor], tokens: int, turn: Turn
) -> None:
    """One timed generation by an arm (`REFERENCE`: the model's own `generate`), `tokens` per row, added to the turn."""
    seen: list[float] = []

    def note() -> None:
        """When the first token is known."""
        if not seen:
            settle(lm)
            seen.append(time.perf_counter())

    def known(ids: Tensor, _scores: Any, **_options: Any) -> Tensor:
        """As a criterion of transformers, by which nothing stops."""
        note()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    settle(lm)
    began = time.perf_counter()
    with endless(lm), lm.decoder.at_work() if arm != REFERENCE else nullcontext():
        if arm == REFERENCE:
            criteria = transformers.StoppingCriteriaList([known])
            output = lm.model.generate(**inputs, **greedy(tokens), stopping_criteria=criteria)
        else:  # a stream: criteria would be asked in Python after each token
            stream = lm.stream(dict(inputs), policy=policy, **greedy(tokens))
            steps = []
            for step in stream:
                note()
                steps.append(step)
    settle(lm)
    ended = time.perf_counter()
    turn.seconds += ended - began
    turn.first.append((seen or [ended])[0] - began)
    if arm == REFERENCE:
        turn.tokens += output[:, -tokens:].tolist()
        turn.layers += [[lm.num_layers] * tokens for _ in output]
        return
    turn.add(stream.costs)
    turn.tokens += torch.stack([step.token for step in steps], dim=1).tolist()
    turn.layers += torch.stack([step.exit_layer for step in steps], dim=1).tolist()


@contextmanager
def endless(lm: LanguageModel) -> Iterator[None]:
    """Let no token end a text in the block, so that all generate as many without anybody holding one back."""
    settings = lm.model.generation_config
    eos, settings.eos_token_id = settings.eos_token_id, None
    try:
        yield
    finally:
        settings.eos_token_id = eos


def greedy(tokens: int) -> dict[str, Any]:
    """Options of `generate` for so many tokens, chosen greedily."""
    return {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1}


def exact_tokens(lm: LanguageModel, batches: Batches, tokens: int) -> list[list[int]]:
    """What the full model generates in float32, of each prompt: what number formats and engines round away from."""
    model = copy.deepcopy(lm.model).float()
    model.generation_config.eos_token_id = None
    made = [model.generate(**inputs, **greedy(tokens)) for inputs in batches]
    return [row for output in made for row in output[:, -tokens:].tolist()]
