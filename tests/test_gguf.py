"""GGUF files by their path: converted once, the same numbers as transformers reads, four bits as they are."""

import os
from pathlib import Path

import pytest
import torch
from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM

from offramp import ExitPolicy, ModelError, load
from offramp.hub import model_sources
from offramp.peers.weights import write_gguf

gguf = pytest.importorskip("gguf")
IDS = torch.arange(3, 12)[None]


def llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3, tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A tiny Llama in q4_1, without a vocabulary, and an empty cache."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    write_gguf(llama(0), "q4_1", tmp_path / "tiny.Q4_1.gguf")
    return tmp_path / "tiny.Q4_1.gguf"


def kept():
    return [path.name for path in Path(os.environ["OFFRAMP_CACHE"]).glob("models/*") if path.suffix != ".lock"]


def test_a_file_gives_what_transformers_reads_in_it(file):
    lm = load(file, engine="torch")
    unpacked = GgufConfig(dequantize=True)
    theirs = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=unpacked)
    own = dict(lm.model.named_parameters())
    assert own.keys() == dict(theirs.named_parameters()).keys()
    for name, weight in theirs.named_parameters():
        assert torch.equal(own[name], weight.bfloat16().float())
    assert lm.tokenizer is None
    assert lm.name.startswith("tiny.Q4_1-")


def test_it_is_converted_once_and_again_when_it_changes(file, monkeypatch, capfd):
    load(str(file))
    assert "converting tiny.Q4_1.gguf once into" in capfd.readouterr().err
    (first,) = kept()
    with monkeypatch.context() as patched:
        patched.setattr(model_sources, "_convert", None)
        load(file)
    write_gguf(llama(1), "q4_1", file)
    load(file)
    assert len(kept()) == 2
    assert first in kept()


def test_four_bits_are_read_as_they_are(file):
    lm = load(file, dtype="int4")
    assert lm.decoder.share_in_four_bits > 0.5
    whole = load(file, dtype="float32", engine="torch")
    policy = ExitPolicy(threshold=None)
    answers = [each.generate(IDS, policy=policy, max_new_tokens=8).sequences for each in (lm, whole)]
    assert torch.equal(*answers)


def test_a_part_is_refused(file):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="is one of 3 parts; make one file of them"):
        load(file)
    assert kept() == []


def test_a_damaged_file_is_refused_and_nothing_kept(file):
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load(file)
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load(file)
    assert kept() == []


def test_a_kind_of_model_that_transformers_does_not_read_is_named(file):
    writer = gguf.GGUFWriter(file, "megalith")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="could not be converted .*megalith.*nothing was kept"):
        load(file)
    assert kept() == []


def test_other_files_and_files_that_are_not_there_are_told(file):
    with pytest.raises(ModelError, match="name the folder .* or a .gguf file"):
        load(file.rename(file.with_suffix(".bin")))
    with pytest.raises(ModelError, match="does not exist"):
        load(file)
