"""One place lets transformers load, and it never runs code that comes with a model, nor asks whether it may."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import transformers

import offramp
from offramp.classifiers.loading import load as load_classifier
from offramp.classifiers.saving import ENCODER, load_encoder
from offramp.hub.messages import ModelError
from sealing import without_digests
from tiny import tiny, tokenizer
from tiny_encoders import build

SOURCE = Path(offramp.__file__).parent


def test_nothing_else_lets_transformers_load():
    loads = re.compile(r"\.from_(pretrained|config)\(|pipeline\(|torch\.load\(|trust_remote_code=True")
    elsewhere = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "pretrained.py" and path.parent.name != "peers"  # these load in other processes
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if loads.search(line)
    ]
    assert not elsewhere


@pytest.fixture
def no_terminal(monkeypatch):
    """A question on the terminal is an error."""

    def asked(*_):
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", None)


@pytest.fixture
def model(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def brings_code(folder, *, model_type=None, tokenizer_class=None):
    """Let a folder's files ask for code beside them, which leaves a mark when it is run."""
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    code = {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    change(folder / "config.json", auto_map=code, **({} if model_type is None else {"model_type": model_type}))
    if tokenizer_class is not None and (folder / "tokenizer_config.json").exists():
        change(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class=tokenizer_class,
        )  # fmt: skip


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_known_architecture_is_built_of_transformers_own_code(model, no_terminal):
    brings_code(model)
    assert offramp.load(model).num_layers == 4
    assert not (model / "ran").exists()


@pytest.mark.parametrize("change", [{"model_type": "own-model"}, {"tokenizer_class": "OwnTokenizer"}])
def test_what_needs_code_is_refused_in_one_line(model, no_terminal, change, capfd):
    brings_code(model, **change)
    if "tokenizer_class" in change:
        (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="needs code of its own .*which offramp never runs") as caught:
        offramp.load(model)
    assert "\n" not in str(caught.value)
    assert not (model / "ran").exists()
    assert capfd.readouterr() == ("", "")


def test_an_encoder_that_needs_code_is_refused(tmp_path, no_terminal):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path)
    brings_code(tmp_path, model_type="own-model")
    with pytest.raises(ModelError, match="which offramp never runs"):
        load_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()
    brings_code(tmp_path, model_type="bert")
    load_encoder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_type", ["own-model", None])
def test_a_classifier_runs_no_code(tmp_path, no_terminal, model_type):
    build("bert").save(tmp_path / "saved")
    folder = Path(shutil.copytree(tmp_path / "saved", tmp_path / "changed"))
    brings_code(folder / ENCODER, model_type=model_type)
    without_digests(folder)  # whoever changes a folder can do that, too
    if model_type is None:
        with pytest.warns(UserWarning, match="digest"):
            load_classifier(folder)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ModelError, match="which offramp never runs"):
                load_classifier(folder)
    assert not (folder / ENCODER / "ran").exists()
