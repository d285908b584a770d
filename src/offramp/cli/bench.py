"""`offramp probe` and `offramp bench`: whether a model would gain from exits, and what it gains in seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp import ExitPolicy, LanguageModel
    from offramp.core.engine import Engines
    from offramp.hub.pretrained import Rounded
    from offramp.lm.bench_arms import Arms
    from offramp.lm.bench_results import Bench


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
    from offramp.report.probe import save_probe
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
    for path in [*result.save(folder), *save_probe(result, folder)]:
        o.note(f"wrote {path}")
    o.next_steps({"look at it with": ["report", str(folder)]})
    o.write_result(result.to_dict(), json)


_COMPILED = "compiled"
"""What --peers calls `transformers` with a static cache; it runs in this process."""


def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Packaged name (smollm2), local folder, .gguf file or hub id."),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            "--random",
            "--shape",
            metavar="SHAPE",
            help="Time a random model of this shape with scripted exits: t5-small, -base, -large, smollm2, "
            "llama-3.2-1b, llama-3.1-8b.",
        ),
    ] = None,
    prompts: o.PromptFile = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of a random model's prompts, drawn at random.")] = 64,
    limit: Annotated[int, typer.Option(help="Prompts per round.")] = 4,
    max_new_tokens: o.MaxNewTokens = 32,
    repeats: Annotated[int, typer.Option(help="Rounds; each runs every arm on the same prompts.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 1,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            help="Several sizes in turns, with commas: each takes the first so many prompts as its one batch."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Threshold of all tests.")] = 0.9,
    min_layer: o.MinLayer = None,
    mean_layer: Annotated[
        float | None,
        typer.Option(
            help="Script the exits around this mean layer; default: only a random model's, at 3/4 of the depth."
        ),
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Run only these rows, with commas, and the two full models; default: all.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="One more row: a saved policy, under the name of its file; may be given again."
        ),
    ] = None,
    dtype: o.Dtype = "float32",
    engine: o.Engine = "auto",
    with_int8: Annotated[
        bool,
        typer.Option("--with-int8", help="Run our rows on eight-bit weights as well, by --engine native."),
    ] = False,
    with_int4: Annotated[
        bool,
        typer.Option("--with-int4", help="Run our rows on four-bit weights as well, by --engine native."),
    ] = False,
    with_engines: Annotated[
        str | None, typer.Option(help="Run our rows on these engines as well, with commas: torch, cuda, native.")
    ] = None,
    device: o.Device = None,
    exits: o.Exits = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the arms and of random models.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep finished rounds there, and draw the table.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Other engines, with commas: compiled (transformers with a static cache and torch.compile); each in "
            "its own process on a CPU: llama.cpp (f16, q8_0, q4_1), economize."
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

    With --peers, other engines take turns with our arms: they get the same token ids and threads, and (but for
    "compiled") files of the same weights, which are kept in the cache. On a CPU a plain read of as many bytes is timed
    beside them. What cannot run here, or needs more memory than there is, is left out, with the reason.

    With --mean-layer, every token leaves at a prescribed layer while every test is paid for: that shows what exits are
    worth in seconds, whatever the confidences say.
    """
    import offramp
    from offramp.lm.bench import require_runnable, run_batch_sizes, run_bench
    from offramp.lm.bench_arms import COMPILED, FULL, REFERENCE
    from offramp.lm.given import prompts_of
    from offramp.lm.scripted import random_prompts
    from offramp.peers import started

    _check_one(model, random, exits)
    if random is None:
        o.refuse(context, ["prompt_length"], "only for a --random model, whose prompts are drawn; leave it out")
    else:
        o.refuse(context, ["prompts"], "a --random model has no words; give --prompt-length")
    names, pythons = _named_peers(peers, peer_python)
    others = {COMPILED: None} if _COMPILED in names else {}
    names = [name for name in names if name != _COMPILED]
    sizes = _sizes(batch_sizes, batch_size)
    _check_batches(context, limit, batch_size, sizes, names)
    _check_script(mean_layer, min_layer)
    lm = _random(random, dtype, engine, device, seed) if random is not None else offramp.load(
        model or "", dtype=dtype, device=device, exits=exits, engine=engine
    )  # fmt: skip
    count = max(limit, batch_size, *sizes)
    texts: Any = (
        prompts_of(prompts, count) if random is None else random_prompts(lm, count, length=prompt_length, seed=seed)
    )
    chat = random is None and lm.has_chat_template
    mean = lm.num_layers * 0.75 if mean_layer is None and random is not None else mean_layer

    ours = _arms(lm, arms, 1, max_new_tokens, mean, threshold, min_layer, seed)
    saved = o.policies_of(policy, taken=(REFERENCE, FULL, COMPILED, *ours))
    if "economize" not in names:  # which tests by them whatever our rows do
        _require_tested(context, ours, scripted=mean is not None)

    def chosen(rows: int) -> Arms:
        return {**others, **_arms(lm, arms, rows, max_new_tokens, mean, threshold, min_layer, seed), **saved}

    require_runnable(lm, chosen(1), max_new_tokens=max_new_tokens, repeats=repeats, batch_size=batch_size)
    variants, refused = _variants(lm, {"int8": with_int8, "int4": with_int4}, with_engines)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "repeats": repeats, "seed": seed, "chat": chat,
        "folder": out, "variants": variants, "peers": refused, "warmup": 3 if others else 1,
    }  # fmt: skip
    with contextlib.ExitStack() as running:
        if names:
            longest = max(lm.encode(texts[i : i + 1], chat=chat)["input_ids"].shape[1] for i in range(len(texts)))
            options["peers"] = refused | running.enter_context(
                started(
                    lm, names, context=longest + max_new_tokens, threshold=threshold, min_layer=min_layer,
                    pythons=pythons, say=o.note,
                )
            )  # fmt: skip
        options["probe"] = _probe(lm) if names or lm.engine == "native" else None
        options["progress"] = running.enter_context(o.progress("timing"))
        if sizes:
            _report_sizes(run_batch_sizes(lm, texts, chosen, sizes, **options), out, json)
        else:
            _report(run_bench(lm, texts, chosen(batch_size), batch_size=batch_size, **options), out, json)


def _report(result: Bench, out: Path | None, json: Path | None) -> None:
    from offramp.report.plots import save_bench

    o.say(result.table(), json)
    if out is not None:
        for path in save_bench(result, out):
            o.note(f"wrote {path}")
    o.write_result(result.to_dict(), json)


def _report_sizes(results: list[Bench], out: Path | None, json: Path | None) -> None:
    from offramp.lm.bench_results import sizes_table
    from offramp.report.plots import save_bench

    o.say(sizes_table(results), json)
    if out is not None:
        for result in results:
            for path in save_bench(result, out / f"batch-{result.conditions['batch_size']}"):
                o.note(f"wrote {path}")
    values = [result.to_dict() for result in results]
    o.write_result({"schema": "offramp/bench-sizes/1", "benches": values}, json)


def _random(shape: str, dtype: str, engine: Engines, device: str | None, seed: int) -> LanguageModel:
    """A model with random weights."""
    from offramp.hub.pretrained import named_device, named_dtype, rounded_dtype
    from offramp.lm.scripted import random_model

    o.note(f"building a random {shape}")
    loaded, rounded = (dtype, None) if engine == "torch" else rounded_dtype(dtype)
    numbers = named_dtype(loaded)
    place = named_device("cpu" if device is None and (engine == "native" or rounded) else device)
    return random_model(shape, dtype=numbers, device=place, engine=engine, rounded=rounded, seed=seed)


def _arms(
    lm: LanguageModel, names: str | None, rows: int, tokens: int, mean: float | None, threshold: float,
    min_layer: int | None, seed: int,
) -> Arms:  # fmt: skip
    """The rows of the table that are asked for."""
    from offramp.lm.bench import default_arms
    from offramp.lm.scripted import scripted_arms
    from offramp.values import choice

    if mean is None:
        arms = default_arms(lm, threshold=threshold, min_layer=min_layer)
    else:
        arms = scripted_arms(lm, tokens=tokens, rows=rows, mean=mean, min_layer=min_layer, seed=seed)
    if names is None:
        return arms
    asked = [name.strip() for name in names.split(",")]
    arms = {**arms, **{name: static for name in asked if (static := _static(name)) is not None}}
    for name in asked:
        choice("row", name, tuple(arms))
    return {name: arms[name] for name in asked}


def _require_tested(context: typer.Context, rows: Arms, *, scripted: bool) -> None:
    """Refuse what is of tests where there are none, or such that a script answers."""
    if scripted:
        o.refuse(context, ["threshold"], "exits by script, as those of a --random model, have none; leave it out")
    if all(policy is None or policy.confidence == "static" for policy in rows.values()):
        o.refuse(context, ["threshold", "min_layer"], "no row of --arms tests any confidence; leave it out")


def _static(name: str) -> ExitPolicy | None:
    """The policy "static 20", which any layer can have."""
    from offramp import ExitPolicy

    kind, _, layer = name.partition(" ")
    return ExitPolicy("static", min_layer=int(layer)) if kind == "static" and layer.isdecimal() else None


def _variants(
    lm: LanguageModel, with_rounded: dict[Rounded, bool], with_engines: str | None
) -> tuple[dict[str, LanguageModel], dict[str, Any]]:
    """The same weights on other engines and in fewer bits, where they are asked for, and why some cannot be had."""
    from offramp import LanguageModel
    from offramp.cuda.model import CudaError
    from offramp.hub.messages import first_line
    from offramp.native.kernels import NativeError
    from offramp.peers import PeerError
    from offramp.values import choice

    made: dict[str, LanguageModel] = {}
    refused: dict[str, Any] = {}
    for name in [] if with_engines is None else with_engines.split(","):
        choice("engine", name, ("torch", "cuda", "native"))
        if name == lm.engine:
            raise typer.BadParameter(f"--with-engines names {name}, on which all rows run already; leave it out")
        try:
            made[name] = LanguageModel(lm.model, lm.tokenizer, lm.name, engine=cast("Engines", name))
        except (CudaError, NativeError) as error:
            refused[name] = PeerError(first_line(error))
    for form in (form for form, asked in with_rounded.items() if asked):
        if lm.engine != "native" or lm.rounded == form:
            raise typer.BadParameter(
                f"--with-{form} needs what --engine native can run, and a --dtype other than {form}"
            )
        made[form] = LanguageModel(lm.model, lm.tokenizer, lm.name, engine="native", rounded=form)
    for other in made.values():
        other.attach_exits(lm.exits)
    return made, refused


def _sizes(several: str | None, one: int) -> list[int]:
    """Batch sizes; empty: they are not asked for."""
    if several is None:
        return []
    parts = several.split(",")
    if one != 1 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"--batch-sizes is {several!r}; give counts such as 1,4,8, and no --batch-size")
    return list(dict.fromkeys(map(int, parts)))


def _check_batches(context: typer.Context, limit: int, one: int, several: list[int], peers: list[str]) -> None:
    """Refuse another number of prompts than batches have, and peers, which take one at a time, without such batches."""
    if several or 1 <= limit < one:
        o.refuse(context, ["limit"], "a batch takes as many prompts as its size says; give as many, or leave it out")
    if peers and 1 not in (several or [one]):
        raise typer.BadParameter(f"--peers {', '.join(peers)} take one prompt at a time; bench them with a batch of 1")


def _check_script(mean: float | None, first: int | None) -> None:
    if mean is not None and first is not None and mean < first:
        raise typer.BadParameter(f"--mean-layer {mean:g} lies before --min-layer {first}; leave one out")


def _check_one(model: str | None, random: str | None, exits: str | None) -> None:
    if (model is None) == (random is None):
        raise typer.BadParameter("give a MODEL or --random SHAPE, one of them")
    if random is not None and exits is not None:
        raise typer.BadParameter("a --random model has no trained exits; leave --exits out")


def _named_peers(names: str | None, pythons: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of peers, and Pythons by name."""
    from offramp.peers import NAMES
    from offramp.values import choice

    by_name = dict(entry.partition("=")[::2] for entry in pythons or [])
    listed = [] if names is None else names.split(",")
    for name in listed:
        choice("peer", name, (_COMPILED, *NAMES))
    for name in by_name:
        choice("peer", name, NAMES)
    for name, path in by_name.items():
        if name not in listed:
            raise typer.BadParameter(f"--peer-python is given for {name}, which --peers does not name")
        if not path:
            raise typer.BadParameter(f"--peer-python is {name!r}; give PEER=PATH, such as {name}=/opt/its/bin/python")
    return listed, by_name


def _probe(lm: LanguageModel) -> Callable[[], float] | None:
    """A read of as many bytes as the weights are; None: there is no compiler for it."""
    from offramp.lm.bench_playing import read_probe
    from offramp.native.kernels import NativeError

    try:
        return read_probe(sum(weight.nbytes for weight in lm.model.parameters()))
    except NativeError as error:
        o.note(f"the plain read is left out: {error}")
        return None
