"""Options that each work alone: together they work too, or are refused in words, before anything is done or written."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from classifier_data import save_bert, write_idx, write_texts
from offramp import ExitPolicy, LanguageModel, cli
from offramp.core.exits import Exits
from offramp.core.policy import DRAFTS
from offramp.hub.messages import ModelError
from tiny import tiny, tokenizer
from tiny_encoders import encoder

WORDS = "the sky is blue . why ?"
IMAGES = "--task image-classification --data bars"
TEXTS = "--task text-classification --data train.tsv"
STUDENTS = "distill small-cnn:4 --data stand-in:digits-on-colour"
STUDENT = "distill llama --task language-modelling --teacher llama"


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
    ExitPolicy().save(place / "softmax.json")
    (place / "prompts.txt").write_text("the sky is\nwhy is the sky\nblue ?\nis it blue\n")
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": f"{WORDS} w{i}"}) + "\n" for i in range(20, 32)))
    asked = [{"prompt": f"why w{i} ?"} for i in range(20, 60)]
    (place / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    kinds = ["common"] * 11 + ["rare"]
    rows = [{"prompt": f"why w{i} ?", "kind": kind} for i, kind in enumerate(kinds, 20)]
    (place / "grouped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_bert(place / "bert")
    encoder("vit").save_pretrained(place / "vit")
    write_idx(place / "bars", train=60, test=20)
    write_texts(place / "train.tsv", 120)
    (place / "cifar").mkdir()
    (place / "cifar" / "data_batch_1.bin").touch()
    return place


def offramp(place, monkeypatch, command):
    """What a command gives in that folder; its result goes to out/."""
    monkeypatch.chdir(place)
    return CliRunner().invoke(cli.app, shlex.split(command))


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
    # of classifiers: what would have no effect, what their networks and data do not go together with
    f"train bert {TEXTS} --layout sst2 --text-column words": "--text-column: only of --layout columns, since sst2",
    f"train bert {TEXTS} --layout snli --classes no,yes": "--classes: only of --layout columns, since snli",
    f"train resnet {IMAGES} --image-size 16": "--image-size: only of --layout folder, since images of idx have a size",
    "train resnet --task image-classification --data cifar --classes a,b": "--classes: only of other layouts, since ci",
    f"train msdnet-small {IMAGES} --pooling first": "which is of states of tokens or patches; msdnet-small has maps",
    f"train resnet {IMAGES} --pooling mean": "resnet has maps of images, so leave it out",
    f"train resnet {IMAGES} --weights 1,2": "weights are (1.0, 2.0); give 4, one per exit",
    f"train vit {IMAGES}": "has images of 8 x 8 pixels, and the network takes 16; bring them to that",
    f"calibrate x {IMAGES} --tolerance 0.1 --bound crc --failure 0.1": "--failure: only of bounds that may fail",
    f"calibrate x {IMAGES} --posterior laplace --predictive probit --draws 5": "--draws: only of --predictive mc",
    f"calibrate x {IMAGES} --posterior mie --grid meronen": "--grid: only of temperatures, which mie has not",
    f"evaluate x {IMAGES} --methods vanilla,mie --grid meronen": "which are not in vanilla, mie; name other --methods",
    f"evaluate x {IMAGES} --bins 0": "bins is 0, resamples 1000 and seed 0; they count from",
    f"calibrate x {IMAGES} --seed -1": "bins is 15 and seed -1; they count from 1 and 0",
    f"train resnet {IMAGES} --seed -1": "seed is -1; it counts from 0",
    f"evaluate x {IMAGES} --severity 4": "--severity: only of corrupted images; give --corruption, or leave it out",
    # of grids of students
    f"{STUDENTS} --task multinli": "--task: only of files, and a stand-in has a layout of its own",
    f"{STUDENTS} --backend ray --processes 2": "--processes: only of --backend processes",
    f"{STUDENTS} --teacher logits:x --teacher-method erm": "--teacher-method: only of teachers that are trained here",
    f"{STUDENTS} --method erm --teacher-method dfr": "--teacher-method: only of methods that have a teacher",
    f"{STUDENTS} --method erm --teacher logits:x": "--teacher: only of methods that have a teacher",
    f"{STUDENTS} --method erm+temperature=2": "temperature is of the loss kd, and erm learns by labels; leave it out",
    # of language models that are distilled
    f"{STUDENT} --text texts.jsonl --method dedier --fit forward-kl": "--fit: only for --readout lens",
    f"{STUDENT} --text texts.jsonl --method dedier --readout lens --exits exits": "--exits: only for --readout head",
    f"{STUDENT} --text texts.jsonl --method dedier --exits exits": "no lens is after layer 1, which is read (they are",
    f"{STUDENT} --text texts.jsonl --method dedier --steps 9": "weighted after 100 steps, and training ends after 9",
    f"{STUDENT} --text texts.jsonl --trainable drafter": "trainable is 'drafter', but a student is trained",
    f"{STUDENT} --text prompts.txt --text-column q": "--text-column is of --text in .json or .jsonl",
    "train llama --text prompts.txt --text-column q": "--text-column is of --text in .json or .jsonl",
    f"{STUDENT} --prompts prompts.txt --prompt-column q": "a prompt per line, and has no key 'q'",
    f"{STUDENT} --prompts prompts.txt --chat": "--chat: the tokenizer has no chat template",
    f"{STUDENT} --prompts prompts.txt --window 9999": "a window of 9999 tokens is outside 2..",
    f"{STUDENT} --prompts prompts.txt --held-out 1": "the held-out share is 1.0",
    f"{STUDENT} --prompts grouped.jsonl --group-column kind": "group 'rare' has no row in split",
    # of servers, before the model is read
    "serve llama --exits exits": "--exits: only of a --policy; without one all answers are at full depth",
    "serve llama --check 0.5": "--check: only of a --policy; without one all answers are at full depth",
    "serve llama --policy drafts.json --on-drift full": "--on-drift full: only of a --policy with a certificate",
    # of timings
    "bench llama --batch-sizes 1,2 --limit 1": "--limit: a batch takes as many prompts as its size says",
    "bench llama --batch-size 2 --limit 1": "--limit: a batch takes as many prompts as its size says",
    "bench llama --batch-size 8 --prompts prompts.txt": "a batch of 8 is asked for, but there are 4 prompts",
    "bench llama --mean-layer 2 --threshold 0.5": "--threshold: exits by script, as those of a --random model, have",
    "bench llama --mean-layer 1 --min-layer 2": "--mean-layer 1 lies before --min-layer 2; leave one out",
    "bench llama --arms 'static 2' --min-layer 1 --threshold 1": "--threshold, --min-layer: no row of --arms tests any",
    "bench llama --policy softmax.json": "there is another arm 'softmax'; rename the file",
    "bench llama --peers llama.cpp --batch-sizes 2,4": "--peers llama.cpp take one prompt at a time",
    "bench llama --peers llama.cpp --repeats 0": "repeats is 0; it must be at least 1",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_does_not_go_together_is_refused_in_words(command, place, monkeypatch, tmp_path):
    out = tmp_path / "out"
    run = offramp(
        place, monkeypatch, command if command.startswith(("generate", "serve")) else f"{command} --out {out}"
    )
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


def test_what_a_classifier_is_not_for_is_said_before_any_pass(place, monkeypatch, tmp_path):
    trained = offramp(
        place, monkeypatch, f"train bert {TEXTS} --layout sst2 --epochs 1 --layers 1 --out {tmp_path / 'run'}"
    )
    assert trained.exit_code == 0, trained.output
    (tmp_path / "note").touch()
    for options, words in {
        "--corruption noise": "--corruption: only of images, and these are texts",
        f"--cache {tmp_path / 'note'}": "note is a file; name a folder for what exits say",
        f"--out {tmp_path / 'note'}": "note is no folder; name another file",
    }.items():
        assert words in said(offramp(place, monkeypatch, f"evaluate {tmp_path}/run/model {TEXTS} {options}"))
    calibrated = offramp(place, monkeypatch, f"calibrate {tmp_path}/run/model {TEXTS} --out {tmp_path / 'note'}")
    assert "note is no folder; name another file" in said(calibrated)
    assert not (tmp_path / "run" / "model-outputs").exists()


def test_a_batch_has_as_many_prompts_as_it_says(place, monkeypatch):
    done = offramp(
        place, monkeypatch, "bench llama --batch-size 5 --repeats 1 --max-new-tokens 2 --arms 'static 2' --json -"
    )
    assert done.exit_code == 0, done.output
    conditions = json.loads(done.stdout)["conditions"]
    assert (conditions["batch_size"], conditions["prompts"]) == (5, 5)
