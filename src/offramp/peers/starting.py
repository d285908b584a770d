"""Starting the peers of a bench, and ending them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from offramp.core.language_model import LanguageModel
from offramp.peers.packages import PACKAGES, python_of
from offramp.peers.process import Peer, PeerError
from offramp.peers.weights import FORMATS, gguf_file, model_folder, require_llama
from offramp.values import choice

NAMES = tuple(PACKAGES)
LLAMA_CPP = "llama.cpp"
"""What the names of its arms begin with."""


@contextmanager
def started(
    lm: LanguageModel,
    names: Sequence[str],
    *,
    context: int,
    threshold: float = 0.9,
    min_layer: int | None = None,
    pythons: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Peer | PeerError]]:
    """Peers that have loaded the model's weights; they end with the block.

    Args:
        lm: The model, on the CPU.
        names: Some of `NAMES`: "llama.cpp" is three arms, one for each number format; "economize" decodes as CALM does.
        context: Most tokens of a prompt and its continuation.
        threshold: Of economize's tests.
        min_layer: First layer that economize tests; None: half the depth.
        pythons: Pythons that have a peer's package, by name; for the others it is installed into the cache.
        say: Gets lines on what takes long, and on peers that cannot be had.

    Yields:
        Peers by the name of their arm, and in place of one that cannot be had, why.

    Raises:
        ValueError: A name is unknown, or the model is not on the CPU, where peers run.
    """
    pythons = dict(pythons or {})
    for name in (*names, *pythons):
        choice("peer", name, NAMES)
    if lm.split.device.type != "cpu":
        raise ValueError(f"the model is on {lm.split.device}, but peers run on the CPU; use device='cpu'")
    calm = {"threshold": threshold, "min_layer": lm.num_layers // 2 if min_layer is None else min_layer}
    plans: dict[str, Callable[[], Iterator[tuple[str, dict[str, Any]]]]] = {
        LLAMA_CPP: lambda: _llama_cpp(lm, context),
        "economize": lambda: _economize(lm, calm),
    }
    peers: dict[str, Peer | PeerError] = {}
    with ExitStack() as running:
        for name in dict.fromkeys(names):
            try:
                settings = list(plans[name]())
                command, environment = python_of(name, pythons, say)
                for arm, values in settings:
                    say(f"starting {arm}")
                    asked = {"peer": name, "threads": torch.get_num_threads(), **values}
                    peers[arm] = running.enter_context(_tried(arm, command, asked, environment, say))
            except PeerError as error:
                say(f"{name} is left out: {error}")
                peers = {arm: peer for arm, peer in peers.items() if not arm.startswith(name)} | {name: error}
        yield peers


def _tried(
    arm: str, command: Sequence[str], asked: Mapping[str, Any], environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Peer:  # fmt: skip
    """A peer that has generated something, without matrix instructions where it dies of them.

    Virtual machines may show AMX and not allow it: llama.cpp then meets an illegal instruction.

    Returns:
        The peer.

    Raises:
        PeerError: It fails anyhow.
    """
    peer = Peer(arm, command, asked, environment=environment)
    try:
        peer.generate([0] * 16, 2)
    except PeerError as error:
        if not (asked.get("tiles") and f"signal {signal.SIGILL.value}" in str(error)):
            raise
        say(f"{arm} meets an instruction that is not allowed here; it goes on without packing weights for AMX")
        return _tried(arm, command, {**asked, "tiles": False}, environment, say)
    return peer


def _llama_cpp(lm: LanguageModel, context: int) -> Iterator[tuple[str, dict[str, Any]]]:
    require_llama(lm.model)
    for format in FORMATS:
        file = str(gguf_file(lm.model, format))
        yield f"{LLAMA_CPP} {format}", {"file": file, "context": context, "tiles": True}


def _economize(lm: LanguageModel, calm: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if lm.split.is_encoder_decoder:
        raise PeerError("it runs decoder-only models, and this one has an encoder")
    dtype = str(lm.model.dtype).removeprefix("torch.")
    yield "economize calm", {"folder": str(model_folder(lm.model)), "dtype": dtype, **calm}
