"""`offramp probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli import options as o


def probe(
    model: o.Model,
    prompts: o.PromptFile = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Look at this text instead of at answers; may be given several times."),
    ] = None,
    limit: o.Limit = None,
    max_new_tokens: o.MaxNewTokens = 32,
    min_layer: o.MinLayer = None,
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    exits: o.Exits = None,
    chat: o.Chat = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where pictures go; default: runs/probe-MODEL[-exits].")
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Would this model gain from early exits? Ranks, agreement and confidence by layer, and where leaving pays."""
    import offramp
    from offramp.lm.given import first, prompts_of, run_folder
    from offramp.report import plots
    from offramp.tasks.rows import read_text

    if text is not None and prompts is not None:
        raise typer.BadParameter("give --prompts or --text, not both")
    texts = None if text is None else first([read_text(path) for path in text], limit)
    given = prompts_of(prompts, limit) if texts is None and (prompts or limit is not None) else None
    lm = offramp.load(model, dtype=dtype, device=device, exits=exits)
    with o.progress("probing") as progress:
        result = lm.probe(
            given, texts=texts, max_new_tokens=max_new_tokens, min_layer=min_layer, chat=chat, progress=progress
        )
    o.say(result.table(), json)
    folder = out or run_folder("probe", lm)
    for path in [*result.save(folder), *plots.save_probe(result, folder)]:
        o.note(f"wrote {path}")
    o.next_steps({"look at it with": ["report", str(folder)]})
    o.write_result(result.to_dict(), json)
