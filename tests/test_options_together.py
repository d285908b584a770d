"""Options that each work alone: together they work too, or are refused in words, before anything is done or written."""

import json

import pytest
from typer.testing import CliRunner

from offramp import LanguageModel, cli
from offramp.core.exits import Exits
from offramp.core.policy import DRAFTS
from offramp.hub.messages import ModelError
from tiny import tiny, tokenizer

WORDS = "the sky is blue . why ?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, prompts and texts, by the names that commands below call them."""
    place = tmp_path_factory.mktemp("together")
    for name in ("llama", "t5", "whisper"):
        tiny(name).save_pretrained(place / name)
        tokenizer(chat=False).save_pretrained(place / name)
    lm = LanguageModel(tiny("llama"))
    lm.attach_exits(Exits.fresh(lm.split, (1, 3), rank=0))
    lm.save_exits(place / "exits")
    DRAFTS.save(place / "drafts.json")
    (place / "prompts.txt").write_text("the sky is\nwhy is the sky\nblue ?\nis it blue\n")
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": f"{WORDS} w{i}"}) + "\n" for i in range(20, 32)))
    asked = [{"prompt": f"why w{i} ?"} for i in range(20, 60)]
    (place / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return place


def offramp(place, monkeypatch, command):
    """What a command gives in that folder; its result goes to out/."""
    monkeypatch.chdir(place)
    return CliRunner().invoke(cli.app, command.split())


def said(run):
    """What the user reads of a refusal."""
    return " ".join((run.output if run.exit_code == 2 else str(run.exception)).split())


REFUSED = {
    # what would have no effect
    "train llama --text texts.jsonl --with-prompts": "the words of prompts are asked for as well, and texts have none",
    "train llama --text texts.jsonl --answers 2 --answer-temperature 1": "for the model's own answers",
    "train llama --text texts.jsonl --chat": "--chat puts --prompts into a template, and none are given",
    "train llama --text texts.jsonl --prompt-layer 2": "nothing that is trained on has a prompt",
    "train llama --prompts prompts.txt --with-prompts --max-new-tokens 2 --prompt-layer 2": "has a prompt",
    "train t5 --prompts prompts.txt --with-prompts": "an encoder-decoder reads prompts and never predicts their words",
    "train llama --prompts prompts.txt --text-column words": "--text-column is of --text",
    "train llama --task question-answering --data x --languages English,German": "has one language",
    "train llama --unroll 2": "unroll is 2, which trainable 'exits' does not use; leave it out, or give trainable",
    "train llama --trainable lora --prompt-weight 1": "prompt_weight is 1.0, which trainable 'lora' does not use",
    "train llama --trainable all --lora-rank 8": "lora_rank is 8, which trainable 'all' does not use",
    "train llama --objective consistency --rank 2": "objective 'consistency' trains no lenses",
    "probe llama --text texts.jsonl --chat": "chat puts prompts into a template",
    "generate llama why --confidence static --min-layer 2 --threshold 0.5": "leave --threshold out",
    "generate llama why --draft-length 2": "add --skipped verify, or leave --draft-length out",
    "calibrate llama --task prompts --data x --alpha 0.1": "--alpha: only for --posterior",
    "calibrate llama --task prompts --data x --posterior avcs --tolerance 0.1 --engine torch": "--tolerance, --engine:",
    "calibrate llama --task text --data x --posterior avcs --own-answers": "--own-answers: a text asks nothing",
    "bench llama --prompt-length 8": "--prompt-length: only for a --random model",
    "bench --random t5-small --prompts prompts.txt": "--prompts: a --random model has no words",
    "distill llama --task language-modelling --teacher llama --text texts.jsonl --chat": "--chat: only for",
    "distill llama --task language-modelling --teacher llama --text texts.jsonl --layer 2": "--layer: only for methods",
    "train x --task image-classification --data x --longest 8": "--longest: only of texts",
    "train x --task text-classification --data x --augment flip": "--augment: only of images",
    "train x --task text-classification --data x --optimiser adamw --nesterov": "momentum and nesterov are of SGD",
    "calibrate x --task image-classification --data x --loss gap": "--loss: only of a threshold that is certified",
    "calibrate x --task image-classification --data x --posterior mie --draws 5": "--draws: only of Laplace",
    "calibrate x --task image-classification --data x --tolerance 0.1 --loss brier --bound binomial": "of 0 or 1",
    "evaluate x --task image-classification --data x --severity 5": "--severity: only of corrupted images",
    # what a model or its exits cannot do, said before the full model answers
    "evaluate llama --task prompts --data asked.jsonl --confidence avcs --exits exits": "needs a posterior",
    "evaluate llama --task prompts --data asked.jsonl --policy drafts.json --exits exits": "exits have no drafter",
    "evaluate llama --task prompts --data asked.jsonl --confidence classifier": "needs trained classifiers",
    "evaluate t5 --task prompts --data asked.jsonl --prompt-layer 2": "an encoder-decoder has no prompt to shorten",
    "evaluate llama --task perplexity --data texts.jsonl --skipped verify": "the full model scores",
    "calibrate llama --task prompts --data asked.jsonl --tolerance 0.9 --confidence laplace": "a posterior",
    "bench llama --policy drafts.json --prompts prompts.txt": "exits have no drafter",
    # what cannot be trained, said before prompts are answered
    "train llama --dtype float16 --blocks 1": "are trained on float32 or bfloat16, not torch.float16",
    "train t5 --trainable drafter --prompts prompts.txt": "no drafters for encoder-decoders",
    "train t5 --prompts prompts.txt --text texts.jsonl": "not plain text; give a task or prompts",
    "train llama --layers 4": "can have exits after layers 1..3",
    "train llama --place 9": "9 exits are to be placed; a model of 4 layers can have 1..3",
    "train llama --trainable all --hidden-loss 1": "hidden_loss is for one exit",
    "train llama --prompt-layer 4": "a prompt can stop after layers 1..3",
    "train llama --held-out 1": "the held-out share is 1.0",
    "train llama --window 1": "a window of 1 tokens is outside",
    "train llama --coverage 2": "coverage is 2.0",
    "train whisper": "whisper listens and does not read; exits are trained on texts",
    "generate whisper why": "whisper listens and does not read; give the input_features",
    "generate llama why --exits exits --dtype float16": "float16 changes small weights, load it in float32 or bfloat16",
    "train llama --chat": "--chat: the tokenizer has no chat template",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_does_not_go_together_is_refused_in_words(command, place, monkeypatch, tmp_path):
    out = tmp_path / "out"
    run = offramp(place, monkeypatch, f"{command} --out {out}" if "generate" not in command else command)
    assert run.exit_code != 0
    assert REFUSED[command] in said(run)
    assert run.exit_code == 2 or isinstance(run.exception, (ValueError, ModelError))
    if "--max-new-tokens" not in command:  # only whose answers have prompts is known when they are there
        assert {file.name for file in out.rglob("*")} <= {".lock"}


def test_a_limit_is_of_texts_as_well(place, monkeypatch, tmp_path):
    trained = offramp(
        place, monkeypatch, f"train llama --text texts.jsonl --limit 5 --steps 1 --out {tmp_path / 'run'}"
    )
    assert trained.exit_code == 0, trained.output
    assert "5 documents" in trained.stderr
    fitted = offramp(
        place,
        monkeypatch,
        "calibrate llama --task text --data texts.jsonl --posterior avcs --limit 0",
    )
    assert "the first 0 are asked for" in said(fitted)
    texts = " ".join(["--text texts.jsonl"] * 3)
    probed = offramp(place, monkeypatch, f"probe llama {texts} --limit 1 --out {tmp_path / 'probe'}")
    whole = offramp(place, monkeypatch, f"probe llama --text texts.jsonl --out {tmp_path / 'whole'}")
    assert probed.stdout == whole.stdout
