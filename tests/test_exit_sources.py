"""Exits by folder, by "bundled" and by hub id, with a stand-in for the hub."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from typer.testing import CliRunner

import offramp
from offramp import Exits, LanguageModel, ModelError, cli
from offramp.hub.exit_files import exits_folder, load_exits, model_card, push, save_exits
from test_exits import same
from tiny import inputs_for, tiny, tokenizer

OWNER = "someone/tiny-exits"


class Hub:
    """Repositories as folders; what was asked of it."""

    def __init__(self, place):
        self.place, self.calls, self.broken = place, [], None

    def _check(self, *call):
        self.calls.append(call)
        if self.broken:
            raise self.broken

    def create_repo(self, repository, *, private=None, exist_ok=False):
        self._check("create", repository, private)
        (self.place / repository).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repository}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns=None):
        self._check("upload", repo_id)
        for name in allow_patterns or [path.name for path in Path(folder_path).iterdir()]:
            shutil.copy(Path(folder_path) / name, self.place / repo_id)

    def file_exists(self, repository, name):
        return (self.place / repository / name).exists()

    def snapshot_download(self, repository, *, allow_patterns):
        self._check("download", repository)
        if not (self.place / repository).is_dir():
            raise FileNotFoundError(f"404: no {repository}\nask for another")
        assert allow_patterns == ["exits.json", "exits.safetensors"]
        return str(self.place / repository)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


@pytest.fixture
def saved(tmp_path):
    """A model and exits for it, each in a folder."""
    lm = LanguageModel(tiny("llama"), tokenizer(), name="tiny")
    exits = Exits.fresh(lm.split, (1, 3))
    exits.lenses["1"].up.bias.data += 1.0
    save_exits(exits, tmp_path / "exits")
    lm.model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model", tmp_path / "exits"


def test_there_and_back(hub, saved):
    model, exits = saved
    (exits / "notes.txt").write_text("mine")
    assert push(exits, OWNER, private=True) == f"https://hub/{OWNER}"
    assert hub.calls == [("create", OWNER, True), ("upload", OWNER)]
    assert {path.name for path in (hub.place / OWNER).iterdir()} == {"exits.json", "exits.safetensors", "README.md"}
    lm, other = offramp.load(model, exits=OWNER), offramp.load(model, exits=exits)
    assert hub.calls[-1] == ("download", OWNER)
    policy = offramp.ExitPolicy(threshold=0.1)
    same(*(each.generate(inputs_for("llama"), policy=policy, max_new_tokens=5) for each in (lm, other)))
    push(exits, OWNER)  # once more, into what is there


def test_the_card_says_what_the_exits_are_and_is_the_users_once_it_is_there(hub, saved):
    push(saved[1], OWNER, figures="| arm | rougeL |", license="apache-2.0")
    card = hub.place / OWNER / "README.md"
    _, metadata, text = card.read_text().split("---\n", 2)
    found = yaml.safe_load(metadata)
    assert found["library_name"] == "offramp"
    assert "early-exit" in found["tags"]
    assert found["license"] == "apache-2.0"
    assert "base_model" not in found  # the model is a folder, which the hub does not know
    assert "| arm | rougeL |" in text
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert f'exits="{OWNER}"' in code
    compile(code, "card", "exec")
    card.write_text("mine")
    push(saved[1], OWNER)
    assert card.read_text() == "mine"
    exits = load_exits(saved[1])
    exits.model = "someone/base"
    assert 'base_model: "someone/base"' in model_card(exits, OWNER)
    assert "The terms of someone/base hold" in model_card(exits, OWNER)
    assert "Nothing is claimed here" in model_card(exits, OWNER)


@pytest.mark.parametrize("damage", ["nothing", "half"])
def test_nothing_half_written_goes_out(hub, saved, tmp_path, damage):
    folder = tmp_path / "nowhere"
    if damage == "half":
        folder = saved[1]
        (folder / "exits.safetensors").write_bytes((folder / "exits.safetensors").read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"holds no exits|missing or damaged|not what was written"):
        push(folder, OWNER)
    assert hub.calls == []


def test_a_hub_that_refuses(hub, saved):
    hub.broken = PermissionError("403: you may not\nread more")
    with pytest.raises(ModelError) as caught:
        push(saved[1], OWNER)
    text = str(caught.value)
    assert f"does not take the exits as {OWNER} (403: you may not" in text
    assert f"they are kept in {saved[1]}" in text
    assert "\n" not in text
    hub.broken = ConnectionError("no network")
    with pytest.raises(ModelError, match=rf"{OWNER} is no folder, and the hub does not give it \(no network\)"):
        exits_folder(OWNER, "tiny")


def test_an_id_nobody_has(hub, saved):
    with pytest.raises(
        ModelError, match=r"someone/else is no folder, and the hub .*\(404: .*; name a folder of exits, or"
    ):
        offramp.load(saved[0], exits="someone/else")


def test_a_folder_wins_over_a_hub_id_of_its_name(hub, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[1], tmp_path / OWNER)
    assert exits_folder(OWNER, "tiny") == Path(OWNER)
    assert hub.calls == []


@pytest.mark.parametrize("source", ["exits", "./runs/exits", "runs/a/exits", "/a/b", "~/a", "../a", Path("runs/exits")])
def test_what_is_no_hub_id_is_a_folder(hub, saved, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path / "model")
    assert exits_folder(source, "tiny") == Path(source).expanduser()
    with pytest.raises(ModelError, match="holds no exits"):
        offramp.load(saved[0], exits=source)
    assert hub.calls == []


def test_bundled_exits(hub, saved, tmp_path, monkeypatch):
    with pytest.raises(
        ModelError, match=r"no exits for 'tiny' come with offramp, only for .*; train some with offramp"
    ):
        exits_folder("bundled", "tiny")
    with pytest.raises(ModelError, match="come with offramp, only for"):
        offramp.load(saved[0], exits="bundled")
    monkeypatch.setattr("offramp.hub.exit_files.__file__", str(tmp_path / "package" / "hub" / "exit_files.py"))
    with pytest.raises(ModelError, match="only for no model"):
        exits_folder("bundled", "tiny")
    home = tmp_path / "package" / "data" / "exits"
    shutil.copytree(saved[1], home / "tiny")
    assert exits_folder("bundled", "tiny") == home / "tiny"
    with pytest.raises(ModelError, match="no exits for 'other' come with offramp, only for tiny"):
        exits_folder("bundled", "other")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[1], tmp_path / "bundled")
    assert exits_folder("bundled", "tiny") == Path("bundled")  # one's own folder of that name
    assert hub.calls == []


@pytest.mark.parametrize("trainable", ["exits", "lora", "all"])
def test_the_command_pushes_what_it_trained(hub, saved, tmp_path, trainable):
    text = tmp_path / "a.txt"
    text.write_text("the sky is blue . " * 20)
    arguments = ["train", saved[0], "--text", text, "--window", 8, "--steps", 1, "--layers", 2, "--warmup", 0]
    arguments += ["--trainable", trainable, "--learning-rate", 0.1, "--out", tmp_path / "run", "--push-to-hub", OWNER]
    run = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert run.exit_code == 0, run.output
    pushed = hub.place / OWNER
    exits = load_exits(pushed)
    assert exits.layers == (2,)
    assert exits.settings["config"]["trainable"] == trainable
    assert exits_folder(OWNER, "tiny") == pushed
    card = (pushed / "README.md").read_text()
    assert f"| trainable | {trainable} |" in card
    assert ("were trained together" in card) == (trainable != "exits")
    if trainable == "exits":
        assert f"pushed the exits to https://hub/{OWNER}" in run.stderr
        assert {path.name for path in pushed.iterdir()} == {"exits.json", "exits.safetensors", "README.md"}
        assert offramp.load(saved[0], exits=OWNER).exits.layers == (2,)
        return
    assert f"offramp generate {OWNER} --exits {OWNER}" in run.stderr
    assert (exits.model, load_exits(tmp_path / "run" / "exits").model) == (OWNER, str(tmp_path / "run" / "model"))
    lm = offramp.load(pushed, exits=OWNER)  # the stand-in gives models by their folders only
    assert lm.exits.layers == (2,)
    with pytest.raises(ModelError, match=f"were made for {OWNER} with weights"):
        offramp.load(saved[0], exits=OWNER)
