"""`offramp train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.language_model import LanguageModel
    from offramp.training import AnswerConfig
    from offramp.training.data import Document

BUNDLED = "bundled"


def train(
    model: o.Model,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Train on this text: .json (a list of objects), .jsonl, or plain text, one document per file; may be "
            "given several times.",
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Key of the text in JSON objects, several are joined; default: text."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|bundled",
            help="Train on the model's own answers to these prompts, one per line; default without --text: bundled.",
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(help="Use only the first prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    answers: Annotated[int, typer.Option(help="Answers to each prompt; several need --answer-temperature.")] = 1,
    answer_temperature: Annotated[
        float | None, typer.Option(help="Sample the answers at this temperature; default: greedy.")
    ] = None,
    with_prompts: Annotated[
        bool, typer.Option("--with-prompts", help="Train on the words of the prompts too, not only of the answers.")
    ] = False,
    chat: o.Chat = None,
    layers: Annotated[
        str | None, typer.Option(help="Exits after these layers, for example 15,20,25; default: chosen by the depth.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of each exit's matrix; default: full.")] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="What an exit learns. forward-kl: the last layer's whole distribution; reverse-kl: its main mode; "
            "teacher-argmax: the last layer's choice; labels: the next word of the text, whatever the last layer says."
        ),
    ] = "forward-kl",
    temperature: Annotated[float, typer.Option(help="Softens both distributions of a divergence.")] = 1.0,
    weights: Annotated[
        str, typer.Option(help="Of the exits' losses: uniform, or layer (later ones more).")
    ] = "uniform",
    steps: Annotated[int | None, typer.Option(help="Updates; default: 500.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Train on this many positions instead of --steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    window: Annotated[int, typer.Option(help="Longest piece of a document, in tokens.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after the warm-up.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 10,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: cosine or constant.")] = "cosine",
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient.")] = 1.0,
    held_out: Annotated[float, typer.Option(help="Share of the documents to judge by, never trained on.")] = 0.1,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between judgements; default: before and after.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the data's order and division, of first values and of samples.")] = 0,
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the run is written; default: runs/train-MODEL.")
    ] = None,
    json: o.JsonPath = None,
) -> None:
    """Train early exits: a small adapter after some layers learns to say what the last layer will say.

    The model itself is not changed, its full output stays the same bit for bit. Started again with the same options, an
    interrupted run goes on from its last checkpoint.
    """
    import offramp
    from offramp.training import AnswerConfig, TrainConfig, prepare
    from offramp.training import train as run

    config = TrainConfig(
        layers=_layers(layers), rank=rank, objective=objective, temperature=temperature, weights=weights,
        learning_rate=learning_rate, steps=500 if steps is None and tokens is None else steps, tokens=tokens,
        batch_size=batch_size, warmup=warmup, schedule=schedule, clip=clip, seed=seed, validate_every=validate_every,
        save_every=save_every,
    )  # fmt: skip
    folder = out or Path("runs") / f"train-{Path(model).name}"
    lm = offramp.load(model, dtype=dtype, device=device)
    answering = AnswerConfig(
        max_new_tokens=max_new_tokens, temperature=answer_temperature, per_prompt=answers, prompts_too=with_prompts,
        chat=lm.has_chat_template if chat is None else chat, seed=seed,
    )  # fmt: skip
    documents = _from_texts(lm, text or [], field or ["text"])
    if prompts is not None or not text:
        documents += _from_prompts(lm, prompts, count, answering, folder)
    data = prepare(lm, documents, window=window, share=held_out, seed=seed)
    o.note(
        f"{len(documents)} documents: {data.train.positions} positions to train on, "
        f"{data.held_out.positions} held out"
    )  # fmt: skip
    with o.progress("training") as progress:
        result = run(lm, data, config, folder, progress=progress)
    if str(json) != "-":
        typer.echo(result.table())
    o.note(f"wrote {result.exits}; use them with: offramp generate {model} --exits {result.exits} --threshold 0.9")
    o.write_result({**result.to_dict(), "model": model, "dtype": dtype}, json)


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--layers {text}: give numbers with commas between them, such as 15,20,25") from None


def _from_texts(lm: LanguageModel, files: list[Path], fields: list[str]) -> list[Document]:
    from offramp.training import read_texts, text_documents

    texts = [text for file in files for text in read_texts(file, fields)]
    documents = text_documents(lm, texts)
    if dropped := len(texts) - len(documents):
        o.note(f"left out {dropped} of {len(texts)} texts, which are shorter than two tokens")
    return documents


def _from_prompts(
    lm: LanguageModel, source: str | None, count: int | None, config: AnswerConfig, folder: Path
) -> list[Document]:  # fmt: skip
    from offramp.training import answer_documents

    file = None if source is None or source == BUNDLED else Path(source)
    prompts = o.prompts_from(file, count)
    with o.progress("answering") as progress:
        return answer_documents(lm, prompts, config, folder / "answers.jsonl", progress)
