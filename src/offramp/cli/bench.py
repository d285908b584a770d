"""`offramp bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli import options as o


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
    json: o.JsonPath = None,
) -> None:
    """Time every way to exit next to `transformers` generate: same prompts, in turns, one run.

    With --out, an interrupted bench started again with the same options goes on behind its last finished round; with
    more --repeats, further rounds are added. Another folder, or none, times everything anew.
    """
    import offramp
    from offramp.bench import default_arms, run_bench
    from offramp.devices import named_device
    from offramp.models import named_dtype
    from offramp.report.plots import save_bench
    from offramp.scripted import random_prompts, random_t5, scripted_arms

    _check_one(model, random, exits)
    if random is not None:
        o.note(f"building a random {random}")
        lm = random_t5(random, dtype=named_dtype(dtype), seed=seed)
        lm.model.to(named_device(device))
        texts: object = random_prompts(lm, limit, seed=seed)
        arms = scripted_arms(lm, tokens=max_new_tokens, min_layer=min_layer, seed=seed)
    else:
        assert model is not None
        lm = offramp.load(model, dtype=dtype, device=device, exits=exits, engine=engine)
        texts = o.prompts_from(prompts, limit)
        arms = default_arms(lm, threshold=threshold, min_layer=min_layer)
    with o.progress("timing") as progress:
        result = run_bench(
            lm, texts, arms, max_new_tokens=max_new_tokens, repeats=repeats, batch_size=batch_size, seed=seed,
            chat=random is None and lm.has_chat_template, name=random or model, folder=out,
            progress=progress,
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
