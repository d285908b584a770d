"""One round of a bench: everything that generates, in turns; `transformers` compiled, and a plain read, among them.

A plain read bounds every engine that reads all weights for each token. `transformers` is compiled as its documentation
makes it fast: a static cache, and `torch.compile` of the step of one token.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CompileConfig, EncoderDecoderCache, StaticCache

from offramp.core.language_model import LanguageModel
from offramp.core.policy import ExitPolicy
from offramp.evaluation.records import settle
from offramp.hub.messages import first_line
from offramp.lm.bench_arms import COMPILED, FULL, REFERENCE, Arms
from offramp.lm.bench_rounds import Round, Turn
from offramp.native.kernels import library
from offramp.peers import Peer, PeerError
from offramp.runs.machine import forget_peak, is_shortage, peak, release

_PASSES = 3
_WORD = 8  # bytes
BACKEND = "inductor"
Batches = Sequence[Mapping[str, Tensor]]


def read_probe(size: int) -> Callable[[], float]:
    """A function that reads a buffer several times, with as many threads as torch has.

    Args:
        size: Size of the buffer in bytes; rounded up to whole words.

    Returns:
        The function; it returns bytes per second.

    Raises:
        NativeError: The kernels, of which the read is one, cannot be had.
    """
    kernels, words = library(), -(-size // _WORD)
    buffer = torch.ones(words, dtype=torch.int64)  # written, so that it has pages of its own

    def read() -> float:
        began = time.perf_counter()
        for _ in range(_PASSES):
            kernels.offramp_read(buffer.data_ptr(), words, torch.get_num_threads())
        return _PASSES * _WORD * words / (time.perf_counter() - began)

    return read


class Compiled:
    """A model's own `generate`, compiled for each batch size; nothing stays on the model.

    Caches are kept, one for each batch size (and length of an encoder's input), as addresses that change would have
    CUDA graphs recorded anew. The prompt's pass is not compiled, as in `transformers`.

    Args:
        lm: The model; its weights are shared.
        length: Most tokens of a prompt and its continuation.
    """

    def __init__(self, lm: LanguageModel, length: int) -> None:
        self._model: Any = copy.copy(lm.model)
        self._cache_name, self._length, self._decoder = lm.split.cache_name, length, lm.split.config
        self._caches: dict[tuple[int, ...], Any] = {}
        self._config = CompileConfig(dynamic=False, backend=BACKEND)
        self._config._compile_all_devices = True  # also on a CPU, where it would be left out in silence

    def generate(self, *, input_ids: Tensor, **options: Any) -> Tensor:
        """As the model's own `generate`."""
        shape = tuple(input_ids.shape) if self._model.config.is_encoder_decoder else (len(input_ids),)
        if shape not in self._caches:
            self._caches[shape] = self._new_cache(*shape)
        cache = self._caches[shape]
        cache.reset()
        made: Tensor = self._model.generate(
            input_ids=input_ids, compile_config=self._config, **{self._cache_name: cache}, **options
        )
        return made

    def _new_cache(self, batch: int, heard: int | None = None) -> Any:
        own = StaticCache(config=self._decoder, max_cache_len=self._length)
        if heard is None:
            return own
        return EncoderDecoderCache(own, StaticCache(config=self._decoder, max_cache_len=heard))


class MemoryShortage(ValueError):
    """There is too little memory for one of the full models, which everything is compared with."""


@dataclass
class Players:
    """All that generates in a round.

    Attributes:
        arms: Policies by name.
        models: The model of each arm.
        peers: Other engines by name; one that fails is replaced by its error.
        probe: What measures a plain read, in bytes per second.
        tokens: Tokens generated per prompt.
        compiled: What runs as `COMPILED`, if that is among the arms.
        lost: Why arms could not go on, by name: memory was too little, or a model cannot be compiled.
        held: Bytes that an engine keeps between turns, by the number of its model.
    """

    arms: Arms
    models: Mapping[str, LanguageModel]
    peers: dict[str, Peer | PeerError]
    probe: Callable[[], float] | None
    tokens: int
    compiled: Compiled | None = None
    lost: dict[str, str] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    def play(self, batches: Batches, shuffle: random.Random, said: Callable[[int, str], None]) -> Round:
        """Generate every batch with every arm and peer, in an order that is shuffled for each batch.

        Args:
            batches: Inputs.
            shuffle: Random numbers of the order.
            said: Gets the number of generations done and the next one's name.

        Returns:
            The round, without arms and peers that failed in it.

        Raises:
            MemoryShortage: One of the full models does not fit.
        """
        names = [*self._alive, *(name for name, peer in self.peers.items() if isinstance(peer, Peer))]
        played = Round([], {name: Turn() for name in names})
        for inputs in batches:
            if self.probe is not None:
                played.bandwidth.append(self.probe())
            played.order.append(shuffle.sample(names, len(names)))
            for place, name in enumerate(played.order[-1]):
                said(len(names) * (len(played.order) - 1) + place, name)
                if name in self._alive:
                    self._run(name, inputs, played.arms[name])
                elif name in self.peers:
                    self._ask(name, inputs, played.arms[name])
        for name in (*self.lost, *(name for name, peer in self.peers.items() if isinstance(peer, PeerError))):
            played.arms.pop(name, None)
        return played

    @property
    def _alive(self) -> list[str]:
        return [name for name in self.arms if name not in self.lost]

    def _run(self, name: str, inputs: Mapping[str, Tensor], turn: Turn) -> None:
        """A generation by an arm, which is lost if there is too little memory for it."""
        device = self.models[name].split.device
        try:
            self._measured(name, inputs, turn)
            return
        except Exception as error:
            if not is_shortage(error) and name != COMPILED:
                raise
            rows = len(inputs["input_ids"])
            why = "memory is too little" if is_shortage(error) else f"it cannot be compiled here ({first_line(error)})"
            self.lost[name] = f"{why}, with {rows} {'prompts' if rows > 1 else 'prompt'} together"
        if name == COMPILED:
            self.compiled = None
        release(device)
        if name in (REFERENCE, FULL):
            raise MemoryShortage(
                f"of {name}, {self.lost[name]}; everything is compared with it, so take fewer or shorter "
                "prompts, a smaller model, or dtype='bfloat16'"
            )

    def _measured(self, name: str, inputs: Mapping[str, Tensor], turn: Turn) -> None:
        lm, generate = self.models[name], None
        if name == REFERENCE:
            generate = lm.model.generate
        elif name == COMPILED:
            assert self.compiled is not None
            generate = self.compiled.generate
        device = lm.split.device
        if device.type != "cuda":
            run(lm, self.arms[name], inputs, self.tokens, turn, generate)
            return
        # rows of one engine share what it keeps; of the others' caches none is counted
        key = id(lm) if generate is None else hash(name)
        began = torch.cuda.memory_allocated(device)
        forget_peak(device)
        run(lm, self.arms[name], inputs, self.tokens, turn, generate)
        held, weights = self.held.get(key, 0), sum(part.nbytes for part in lm.model.parameters())
        turn.memory = max(turn.memory or 0, weights + held + (peak(device) or 0) - began)
        self.held[key] = held + max(0, torch.cuda.memory_allocated(device) - began)

    def _ask(self, name: str, inputs: Mapping[str, Tensor], turn: Turn) -> None:
        peer = self.peers[name]
        if isinstance(peer, Peer):
            try:
                turn.add_answer(peer.generate(inputs["input_ids"][0].tolist(), self.tokens))
            except PeerError as error:
                self.peers[name] = error


def run(
    lm: LanguageModel, policy: ExitPolicy | None, inputs: Mapping[str, Tensor], tokens: int, turn: Turn,
    generate: Callable[..., Tensor] | None = None,
) -> None:  # fmt: skip
    """One timed generation, `tokens` per row, added to the turn.

    Args:
        lm: The model.
        policy: The exit policy; None: the full model.
        inputs: Of a batch.
        tokens: Tokens generated per row.
        turn: What is added to.
        generate: The model's own `generate`, or one that is called like it; None: our loop.
    """
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
    with endless(lm), lm.decoder.at_work() if generate is None else nullcontext():
        if generate is not None:
            criteria = transformers.StoppingCriteriaList([known])
            output = generate(**inputs, **greedy(tokens), stopping_criteria=criteria)
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
    if generate is not None:
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
