"""`offramp bench`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.core.language_model import LanguageModel
    from offramp.peers import Peer, PeerError


def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Packaged name (smollm2), local folder or hub id.")
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE", help="Time a random model of this shape with scripted exits: t5-small, -base, -large."
        ),
    ] = None,
    prompts: o.PromptFile = None,
    limit: Annotated[int, typer.Option(help="Prompts per round.")] = 4,
    max_new_tokens: o.MaxNewTokens = 32,
    repeats: Annotated[int, typer.Option(help="Rounds; each runs every arm on the same prompts.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 1,
    threshold: Annotated[float, typer.Option(help="Of all tests.")] = 0.9,
    min_layer: o.MinLayer = None,
    dtype: o.Dtype = "float32",
    engine: o.Engine = "torch",
    device: o.Device = None,
    exits: o.Exits = None,
    seed: Annotated[int, typer.Option(help="Of the order of the arms and of random models.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep finished rounds there, and draw the table.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Other engines, each in its own process, with commas: llama.cpp (f16, q8_0, q4_1), economize."
        ),
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER=PATH",
            help="A Python that has this peer's package; default: it is installed into the cache. May be given again.",
        ),
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Time every way to exit next to `transformers` generate: same prompts, in turns, one run.

    With --out, an interrupted bench started again with the same options goes on behind its last finished round; with
    more --repeats, further rounds are added. Another folder, or none, times everything anew.

    With --peers, other engines take turns with our arms: they get the same token ids and threads, and files of the same
    weights, which are kept in the cache. A plain read of as many bytes is timed beside them.
    """
    import offramp
    import offramp.peers
    from offramp.bench import default_arms, run_bench
    from offramp.devices import named_device
    from offramp.models import named_dtype
    from offramp.report.plots import save_bench
    from offramp.scripted import random_prompts, random_t5, scripted_arms

    _check_one(model, random, exits)
    names, pythons = _named_peers(peers, peer_python)
    if random is not None:
        o.note(f"building a random {random}")
        lm = random_t5(random, dtype=named_dtype(dtype), seed=seed)
        lm.model.to(named_device(device))
        texts: Any = random_prompts(lm, limit, seed=seed)
        arms = scripted_arms(lm, tokens=max_new_tokens, min_layer=min_layer, seed=seed)
    else:
        assert model is not None
        lm = offramp.load(model, dtype=dtype, device=device, exits=exits, engine=engine)
        texts = o.prompts_from(prompts, limit)
        arms = default_arms(lm, threshold=threshold, min_layer=min_layer)
    chat = random is None and lm.has_chat_template
    with contextlib.ExitStack() as running:
        others: dict[str, Peer | PeerError] = {}
        if names:
            longest = max(lm.encode(texts[i : i + 1], chat=chat)["input_ids"].shape[1] for i in range(len(texts)))
            started = offramp.peers.started(
                lm, names, context=longest + max_new_tokens, threshold=threshold, min_layer=min_layer, pythons=pythons,
                say=o.note,
            )  # fmt: skip
            others = running.enter_context(started)
        probe = _probe(lm) if others or engine == "native" else None
        progress = running.enter_context(o.progress("timing"))
        result = run_bench(
            lm, texts, arms, max_new_tokens=max_new_tokens, repeats=repeats, batch_size=batch_size, seed=seed,
            chat=chat, name=random or model, folder=out, progress=progress, peers=others, probe=probe,
        )  # fmt: skip
    if str(json) != "-":
        o.say(result.table())
    if out is not None:
        for path in save_bench(result, out):
            o.note(f"wrote {path}")
    o.write_result(result.to_dict(), json)


def _check_one(model: str | None, random: str | None, exits: str | None) -> None:
    if (model is None) == (random is None):
        raise typer.BadParameter("give a MODEL or --random SHAPE, one of them")
    if random is not None and exits is not None:
        raise typer.BadParameter("a --random model has no trained exits; leave --exits away")


def _named_peers(names: str | None, pythons: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of peers, and Pythons by name."""
    from offramp.peers import NAMES
    from offramp.values import choice

    by_name = dict(entry.partition("=")[::2] for entry in pythons or [])
    listed = [] if names is None else names.split(",")
    for name in (*listed, *by_name):
        choice("peer", name, NAMES)
    for name, path in by_name.items():
        if name not in listed:
            raise typer.BadParameter(f"--peer-python is given for {name}, which --peers does not name")
        if not path:
            raise typer.BadParameter(f"--peer-python is {name!r}; give PEER=PATH, such as {name}=/opt/its/bin/python")
    return listed, by_name


def _probe(lm: LanguageModel) -> Callable[[], float] | None:
    """A read of as many bytes as the weights are; None: there is no compiler for it."""
    from offramp.bandwidth import read_probe
    from offramp.native.build import NativeError

    try:
        return read_probe(sum(weight.nbytes for weight in lm.model.parameters()))
    except NativeError as error:
        o.note(f"the plain read is left out: {error}")
        return None
