"""What generates: the kernels where they can, else torch, and who says why."""

import copy

import pytest
import torch

import offramp
from offramp import ExitPolicy, LanguageModel
from offramp.core import engine
from offramp.cuda.model import CudaError
from offramp.native import kernels
from offramp.native.kernels import NativeError
from tiny import greedy, inputs_for, tiny

NEW = 12


@pytest.fixture(autouse=True)
def nothing_said_yet():
    engine._explain.cache_clear()


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "offramp"]


def test_the_kernels_generate_where_they_can(caplog):
    lm, inputs = LanguageModel(tiny("llama")), inputs_for("llama", 2, padded=True)
    out = lm.generate(inputs, max_new_tokens=NEW)
    assert out.sequences.tolist() == greedy(tiny("llama"), inputs, NEW).tolist()
    assert (lm.engine, lm.number_format, out.costs.engine) == ("native", "float32, native", "native")
    assert out.costs.to_dict()["engine"] == "native"
    assert said(caplog) == []


def test_torch_when_it_is_asked_for(caplog):
    lm = LanguageModel(tiny("llama"), engine="torch")
    assert lm.generate(inputs_for("llama"), max_new_tokens=NEW).costs.engine == "torch"
    assert (lm.engine, lm.number_format, said(caplog)) == ("torch", "float32", [])


def test_what_the_kernels_refuse_is_said_once(caplog):
    inputs = inputs_for("mixtral", 2, padded=True)
    for _ in range(2):
        lm = LanguageModel(tiny("mixtral"), name="my model")
        for _ in range(2):
            out = lm.generate(inputs, max_new_tokens=NEW)
            assert out.sequences.tolist() == greedy(tiny("mixtral"), inputs, NEW).tolist()
    assert (lm.engine, lm.number_format) == ("torch", "float32")
    (line,) = said(caplog)
    assert line.startswith("my model generates on torch, not with the native engine: models of type 'mixtral' have no")


def test_without_a_compiler(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels.library.cache_clear()
    try:
        assert LanguageModel(tiny("llama")).engine == "torch"
        with pytest.raises(NativeError, match=r"no C\+\+ compiler was found"):
            LanguageModel(tiny("llama"), engine="native")
    finally:
        kernels.library.cache_clear()
    assert "no C++ compiler was found; install one" in said(caplog)[0]


def test_on_a_gpu_torch_generates_unless_segments_are_asked_for(caplog, monkeypatch):
    model = copy.deepcopy(tiny("llama"))
    lm = LanguageModel(model)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert (lm.engine, lm.number_format) == ("torch", "float32")
    assert LanguageModel(model, engine="cuda").engine == "cuda"
    monkeypatch.undo()
    assert lm.engine == "native"  # it has come back
    assert not [line for line in said(caplog) if "Triton" not in line]  # which only CUDA's torch brings


def test_what_segments_cannot_run_is_refused(monkeypatch):
    model = copy.deepcopy(tiny("mixtral"))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(CudaError, match="models of type 'mixtral' are not among gemma"):
        LanguageModel(model, engine="cuda")


def test_a_hook_leads_back_to_torch(caplog):
    model, called = copy.deepcopy(tiny("llama")), []
    lm, inputs = LanguageModel(model), inputs_for("llama")
    before = lm.generate(inputs, max_new_tokens=NEW)
    model.model.layers[2].register_forward_hook(lambda *_: called.append(1))
    after = lm.generate(inputs, max_new_tokens=NEW)
    assert (before.costs.engine, after.costs.engine) == ("native", "torch")
    assert called
    assert after.tokens == before.tokens
    assert "layers.2 has a hook" in said(caplog)[0]


def test_training_has_gradients_whatever_generates():
    lm = LanguageModel(copy.deepcopy(tiny("llama")))
    lm.generate(inputs_for("llama"), max_new_tokens=2)
    assert lm.engine == "native"
    state = lm.split.states(inputs_for("llama")["input_ids"], [2])[0]
    lm.split.readout(state).sum().backward()
    assert lm.model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_copies_of_a_language_model():
    lm, policy = LanguageModel(copy.deepcopy(tiny("llama"))), ExitPolicy(threshold=0.15, min_layer=1)
    out = lm.generate(inputs_for("llama"), policy=policy, max_new_tokens=NEW)
    again = copy.deepcopy(lm)
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()
    assert again.generate(inputs_for("llama"), policy=policy, max_new_tokens=NEW).tokens == out.tokens


def test_the_engine_is_chosen_by_name(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    assert offramp.load(tmp_path).engine == "native"
    assert offramp.load(tmp_path, engine="torch").engine == "torch"
    assert offramp.load(tmp_path, engine="native").number_format == "float32, native"
    assert offramp.load(tmp_path, dtype="int8").number_format == "int8, native"
    assert offramp.load(tmp_path, dtype="float16").number_format == "float16"
    with pytest.raises(ValueError, match="engine is 'nativ'.*did you mean 'native'"):
        offramp.load(tmp_path, engine="nativ")
    with pytest.raises(ValueError, match="dtype 'int8' is not available on torch; .* or give engine='native'"):
        offramp.load(tmp_path, dtype="int8", engine="torch")
    with pytest.raises(NativeError, match="float16"):
        offramp.load(tmp_path, engine="native", dtype="float16")


def test_eight_bits_are_the_kernels_alone():
    with pytest.raises(NativeError, match="'mixtral' have no native description"):
        LanguageModel(tiny("mixtral"), rounded="int8")
