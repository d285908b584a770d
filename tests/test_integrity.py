"""What is saved comes back equal or is refused with one line, whatever happened to its files in between."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import training_runs
from offramp.classifiers.loading import load as load_classifier
from offramp.hub.exit_files import load_exits
from offramp.hub.messages import ModelError
from offramp.runs import artefact, digests
from offramp.runs.bounded import read_json
from offramp.runs.tensor_files import read_tensors, write_tensors
from offramp.uncertainty import nested_conformal
from offramp.uncertainty.nested_conformal import NestedConformal, NestedConformalConfig
from posteriors import with_posterior
from sealing import digest_of, rewrite, without_digests
from tiny_encoders import build

KINDS = {
    "exits": ("exits.json", "exits.safetensors", ModelError),
    "state": ("state.json", "state.safetensors", ValueError),
    "classifier": ("config.json", "model.safetensors", ModelError),
}


def loaded(kind, folder):
    """All that a saved thing holds, in a form that can be compared."""
    if kind == "exits":
        exits = load_exits(folder)
        described = (exits.layers, exits.rank, exits.model, exits.fingerprint, exits.settings, exits.posterior.settings)
        return described, exits.state_dict()
    if kind == "classifier":
        made = load_classifier(folder, device="cpu")
        return (made.layers, made.labels, made.head_config), made.state_dict()
    state = artefact.load(NestedConformal, folder)
    return (state.config,), {"quantiles": state.quantiles}


def same(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][name], tensor) for name, tensor in other[1].items())
    )


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    with_posterior("llama", lens=0.1).save_exits(folder / "exits")
    scores = torch.rand(2, 60, generator=torch.Generator().manual_seed(0))
    artefact.save(nested_conformal.fit(scores, NestedConformalConfig(equalise=False)), folder / "state")
    build("msdnet").save(folder / "classifier")
    return folder


@pytest.fixture(params=KINDS)
def saved(request, originals, tmp_path):
    """Kind and a copy of what was saved."""
    return request.param, shutil.copytree(originals / request.param, tmp_path / "copy")


def comes_back_or_is_refused(kind, folder, whole):
    """Whether it came back, which only an equal one may."""
    try:
        found = loaded(kind, folder)
    except KINDS[kind][2] as error:
        text = str(error)
        assert "copy" in text or "none" in text  # the file or folder is named
        assert "\n" not in text
        return False
    assert same(found, whole)
    return True


def places(value, path=()):
    """Where JSON values stand in one another."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def edited(values, path, new):
    made = copy.deepcopy(values)
    at = made
    for key in path[:-1]:
        at = at[key]
    if new is DELETED:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return made


DELETED = object()
STRANGE = (DELETED, None, "x", [], {}, -1, 10**12, 1e300)


@pytest.mark.parametrize("knowing", [False, True])
def test_any_node_of_a_description_deleted_or_replaced(saved, knowing):
    """With the digest as it was, and by an editor who knows how to make the right one: that one is no damage to be
    seen, but what cannot be is told all the same."""
    kind, folder = saved
    whole, (name, _, error) = loaded(kind, folder), KINDS[kind]
    file = folder / name
    values = json.loads(file.read_text())
    for number, path in enumerate(places(values)):
        for new in STRANGE if kind != "classifier" else STRANGE[number % 2 :: 3]:
            made = edited(values, path, new)
            if made == values:
                continue
            file.write_text(json.dumps({**made, "digest": digest_of(made)} if knowing else made))
            if not knowing:
                assert not comes_back_or_is_refused(kind, folder, whole)
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    loaded(kind, folder)
                except error as told:
                    assert "\n" not in str(told)  # noqa: PT017


def test_any_bytes_flipped(saved):
    kind, folder = saved
    whole = loaded(kind, folder)
    for name in KINDS[kind][:2]:
        data = (folder / name).read_bytes()
        for number in range(60):
            at = number if number < 20 else len(data) * (number - 20) // 40
            (folder / name).write_bytes(data[:at] + bytes([data[at] ^ (1 << number % 8)]) + data[at + 1 :])
            comes_back_or_is_refused(kind, folder, whole)
        (folder / name).write_bytes(data)
    assert comes_back_or_is_refused(kind, folder, whole)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["empty", "half", "short", "long", "a folder", "missing", "of another"])
def test_any_file_missing_cut_off_or_of_another(saved, originals, which, damage):
    kind, folder = saved
    whole, file = loaded(kind, folder), folder / KINDS[kind][which]
    data = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage == "of another":
        other = next(other for other in KINDS if other != kind)
        shutil.copy(originals / other / KINDS[other][which], file)
    elif damage != "missing":
        cut = {"empty": b"", "half": data[: len(data) // 2], "short": data[:-3], "long": data + b"\0"}
        file.write_bytes(cut[damage])
    assert not comes_back_or_is_refused(kind, folder, whole)


def change_tensors(file, change, keep=True):
    """What another program would make of a file: the header's texts are kept, and not worked out again."""
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() if keep else None
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors, min(tensors))
    save_file(tensors, file, header)


TENSOR_CHANGES = [
    lambda tensors, name: tensors.pop(name),
    lambda tensors, name: tensors.update(extra=torch.zeros(2)),
    lambda tensors, name: tensors.update({name: torch.zeros(3, 7)}),
    lambda tensors, name: tensors.update({name: tensors[name].double()}),
    lambda tensors, name: tensors.update({"renamed": tensors.pop(name)}),
    lambda tensors, name: tensors.update({name: tensors[name] + 1}),
]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_tensors_missing_extra_or_other(saved, change, keep):
    kind, folder = saved
    whole = loaded(kind, folder)
    change_tensors(folder / KINDS[kind][1], change, keep)
    assert not comes_back_or_is_refused(kind, folder, whole)


def test_what_earlier_versions_wrote_is_read_with_a_note(saved):
    kind, folder = saved
    whole = loaded(kind, folder)
    without_digests(folder)
    with pytest.warns(UserWarning, match="has no digest, as earlier versions wrote none"):
        assert same(loaded(kind, folder), whole)


def test_a_digest_that_was_taken_out_of_one_file_alone_is_missed(saved):
    """The tensors still say that there was one."""
    kind, folder = saved
    rewritten = folder / KINDS[kind][0]
    values = json.loads(rewritten.read_text())
    rewritten.write_text(json.dumps({k: v for k, v in values.items() if k not in ("digest", "files")}))
    with pytest.raises(KINDS[kind][2], match="is not what was saved"):
        loaded(kind, folder)


# ---------------------------------------------------------------- files of tensors


def test_tensors_of_every_format_come_back_and_others_can_read_them(tmp_path):
    random = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=random), "b": torch.randn(4, generator=random).bfloat16(),
        "c": torch.arange(7), "d": torch.tensor(3.5).double(), "e": torch.zeros(0, 4), "f": torch.tensor([True, False]),
        "g": torch.randn(4, 6, generator=random).t(), "h": torch.arange(3, dtype=torch.uint8),
        "i": torch.randn(2, 3, 4, 4, generator=random).contiguous(memory_format=torch.channels_last),
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors, {"what": "τ"})
    header, found = read_tensors(tmp_path / "x.safetensors", "")
    assert header == {"what": "τ"}
    for other in (found, load_file(tmp_path / "x.safetensors")):
        assert other.keys() == tensors.keys()
        assert all(torch.equal(other[n], t) and other[n].dtype == t.dtype for n, t in tensors.items())
    before = (tmp_path / "x.safetensors").read_bytes()
    write_tensors(tmp_path / "x.safetensors", tensors, {"what": "τ"})
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.filterwarnings("ignore:.* has no digest")
def test_headers_that_lie_ask_for_no_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (0, 1, 2**20, 2**40, 2**63):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match=r"x\.safetensors is missing or damaged"):
            read_tensors(path, "")
    for header in (
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b"[" * 5000,
        b"3",
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match="missing or damaged"):
            read_tensors(path, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than"), ('{"a": ' * 200 + "1" + "}" * 200, "nested more than"),
        ("1" * 5000, "more than 4,300 digits"), ("[NaN]", "NaN, which is no JSON number"),
        ("[-Infinity]", "-Infinity, which is no JSON number"), ("[1e999]", "1e999, which is no JSON number"),
        ("[-1e999]", "-1e999, which is no JSON number"), ('{"a": 1, "a": 2}', "twice"), ("", "not JSON"),
        ("{", "not JSON"), ("\udcff", "not UTF-8"),
    ],
)  # fmt: skip
def test_json_that_is_none_or_too_much_is_refused_with_one_line(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path, "write it again")
    assert str(caught.value).startswith(f"{path} is damaged: ")
    assert str(caught.value).endswith("; write it again")
    assert len(str(caught.value)) < 400


def test_a_folder_or_a_huge_file_is_no_json(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path, "")
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(ValueError, match="holds more than"):
        read_json(tmp_path / "big.json", "")


def test_sealed_objects():
    values = {"a": [1, 2.5], "b": {"c": (1, 2), 3: None}}
    sealed = digests.sealed(values)
    assert sealed["digest"] == digest_of(sealed)
    assert digests.unsealed(sealed, "x", "") == {"a": [1, 2.5], "b": {"c": [1, 2], "3": None}}
    with pytest.raises(ValueError, match="x is not what was written.*; write it again"):
        digests.unsealed({**sealed, "a": []}, "x", "write it again")


# ---------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    training_runs.run(folder, steps=4, save_every=2)
    return folder


@pytest.mark.filterwarnings("ignore:.* has no digest")
@pytest.mark.parametrize("change", TENSOR_CHANGES[:-1])  # the last one is seen only by the digest
@pytest.mark.parametrize("keep", [False, True])
def test_a_damaged_checkpoint_is_named(run, tmp_path, change, keep):
    folder = shutil.copytree(run, tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    change_tensors(folder / "checkpoint.safetensors", change, keep)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is .*; remove the run"):
        training_runs.run(folder, steps=4, save_every=2)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_without_a_tensor_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    without_digests(folder)
    change_tensors(folder / "checkpoint.safetensors", lambda tensors, _: tensors.pop("optimizer.0.exp_avg"))
    with pytest.warns(UserWarning, match="no digest"), pytest.raises(ValueError, match="states are not complete"):
        training_runs.run(folder, steps=4, save_every=2)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_run_whose_files_were_edited_is_refused(run, tmp_path, name):
    folder = shutil.copytree(run, tmp_path / "run")
    text = (folder / name).read_text()
    at = text.index("0.01") if "0.01" in text else text.index("0.")
    (folder / name).write_text(text[:at] + text[at:].replace("0.0", "0.1", 1).replace("0.5", "0.6", 1))
    assert (folder / name).read_text() != text
    with pytest.raises(ValueError, match=f"{name}.* is not what was written"):
        training_runs.run(folder, steps=4, save_every=2)


def test_a_knowing_edit_of_the_options_is_another_run(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")

    def faster(values):
        values["config"]["learning_rate"] = 7.0

    rewrite(folder / "config.json", faster)
    with pytest.raises(ValueError, match="holds another run"):
        training_runs.run(folder, steps=4, save_every=2)
