"""GGUF files by their path: converted once, the same numbers as transformers reads, four bits as they are."""

import os
from pathlib import Path

import pytest
import torch
from transformers import GgufConfig, LlamaForCausalLM

from offramp import ExitPolicy, ModelError, load
from offramp.hub import model_sources
from offramp.peers.weights import write_gguf
from tiny import llama_of_blocks

gguf = pytest.importorskip("gguf")
IDS = torch.arange(3, 12)[None]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A tiny Llama in q4_1, without a vocabulary, and an empty cache."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    write_gguf(llama_of_blocks(0), "q4_1", tmp_path / "tiny.Q4_1.gguf")
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
    write_gguf(llama_of_blocks(1), "q4_1", file)
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


def without_weights(file, kind, say):
    writer = gguf.GGUFWriter(file, kind)
    say(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_part_is_refused(file):
    without_weights(file, "llama", lambda writer: writer.add_uint16("split.count", 3))
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
    without_weights(file, "megalith", lambda writer: writer.add_block_count(1))
    with pytest.raises(ModelError, match="could not be converted .*megalith.*nothing was kept"):
        load(file)
    assert kept() == []


def test_other_files_and_files_that_are_not_there_are_told(file):
    with pytest.raises(ModelError, match="name the folder .* or a .gguf file"):
        load(file.rename(file.with_suffix(".bin")))
    with pytest.raises(ModelError, match="does not exist"):
        load(file)
