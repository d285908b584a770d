"""Peers of the bench: their processes, packages and files, and their rows; no test looks at how long anything took."""

import copy
import itertools
import json
import os
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tiny
from offramp import ExitPolicy, LanguageModel
from offramp.cli import app
from offramp.lm.bench import run_bench
from offramp.lm.bench_arms import FULL, REFERENCE
from offramp.lm.bench_playing import endless
from offramp.lm.scripted import random_prompts
from offramp.peers import Answer, Peer, PeerError, answer, started, starting
from offramp.peers.starting import Package
from offramp.peers.weights import FORMATS, gguf_file, model_folder, write_gguf

FAKE = Path(__file__).with_name("fake_peer.py")
fake = partial(Peer, "fake", [sys.executable], script=FAKE)
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def llama():
    return LanguageModel(tiny.llama_of_blocks(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ticks(monkeypatch):
    """A clock that shows how often it was looked at."""
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(looks)))


# Processes


def test_a_peer_answers_until_it_is_closed():
    with fake({}) as peer:
        assert peer.versions["fake"] == "1.0"
        assert peer.generate([7, 1], 3) == ([2, 3, 4], 0.5, 0.125)
        assert peer.generate([4], 1).tokens == [5]
        assert peer._process.poll() is None
    assert peer._process.poll() is not None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", r"^it ended while generating: the engine broke \(with exit status 3\)$"),
        ("hang", r"^generating took more than 1 s$"),
        ("text", r"^it answered b'loading 99%\\n', which is no JSON object$"),
        ("short", r"^3 tokens were asked for and 2 came$"),
        ("other", r"^it answered \{\"token\": 1\}$"),
        ("error", r"^RuntimeError: no room$"),
    ],
)
def test_a_bad_peer_is_ended_and_says_one_line(fault, message):
    peer = fake({"fault": fault}, answer_limit=1)
    with pytest.raises(PeerError, match=message):
        peer.generate([1], 3)
    assert peer._process.poll() is not None


def test_a_peer_that_does_not_load_says_why():
    with pytest.raises(PeerError, match=r"^MemoryError: 9 GB$"):
        fake({"fault": "load"})
    with pytest.raises(PeerError, match="loading took more than 0 s"):
        fake({"fault": "slow"}, load_limit=0.3)
    with pytest.raises(PeerError, match="/nowhere/python cannot be run: .*No such file"):
        Peer("fake", ["/nowhere/python"], {}, script=FAKE)


def test_an_interrupt_ends_the_peer():
    """As Ctrl-C does while one is waited for."""
    began = []

    def use():
        with fake({"fault": "hang"}) as peer:
            began.append(peer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert began[0]._process.poll() is not None


def test_a_missing_package_is_named():
    with pytest.raises(PeerError, match=r"^ModuleNotFoundError: No module named 'llama_cpp'$"):
        Peer("x", [sys.executable], {"peer": "llama.cpp", "file": "", "context": 1, "threads": 1, "tiles": True})


def test_an_answer_is_timed_to_its_first_token(ticks):
    def generate(ids, new, known):
        known()
        known()
        return [*ids, new]

    assert answer.answer(generate, [5], 6) == {"tokens": [5, 6], "first": 1.0, "seconds": 2.0}


# Packages


def wheel(folder, body):
    """A wheel of the package "fake" 1.0 with one module."""
    info = "fake-1.0.dist-info"
    with zipfile.ZipFile(folder / "fake-1.0-py3-none-any.whl", "w") as file:
        file.writestr("fake.py", body)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_a_package_is_installed_once_and_comes_before_ours(tmp_path, cache, monkeypatch):
    wheel(tmp_path, "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setattr(starting, "PACKAGES", {"fake": Package(("fake==1.0",))})
    said = []
    command, environment = starting.python_of("fake", {}, said.append)
    folder, *rest = environment["PYTHONPATH"].split(os.pathsep)
    assert command == [sys.executable]
    assert rest == ["/ours"]
    assert (Path(folder) / "fake.py").exists()
    assert Path(folder).is_relative_to(cache)
    assert len(said) == 1
    assert starting.python_of("fake", {}, said.append)[1] == environment
    assert len(said) == 1
    command, environment = starting.python_of("fake", {"fake": "/a/python"}, said.append)
    assert command == ["/a/python"]
    assert "PYTHONPATH" not in environment


def test_a_package_that_cannot_be_installed_leaves_a_log_only(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(starting, "PACKAGES", {"fake": Package(("fake==1.0",))})
    with pytest.raises(
        PeerError, match=r"^pip could not install fake 1.0: ERROR: .*fake==1.0.*; all it said: .*\.log$"
    ):
        starting.python_of("fake", {}, lambda _: None)
    assert [path.suffix for path in (cache / "peers").iterdir() if path.suffix != ".lock"] == [".log"]


def test_progress_of_a_compilation_is_its_last_step(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("Collecting\n  [3/78] g++ a.cpp\n  [4/78] g++ b.cpp\nwarning: x\n")
    assert starting._step(log) == "[4/78]"
    log.write_text("  error: subprocess-exited-with-error\n CMake Error: no CMAKE_CXX_COMPILER\nlast\n")
    assert starting._reason(log) == "CMake Error: no CMAKE_CXX_COMPILER"


# Files of the same weights


def test_transformers_reads_a_file_back_as_the_same_model(llama, tmp_path):
    """Its own loader undoes the order of the rotated rows, of which it was not told by us."""
    write_gguf(llama.model, "f16", tmp_path / "a.gguf")
    again = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    ids = random_prompts(llama, 2, length=9)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, llama.model(ids).logits, rtol=0.02, atol=0.02)


def test_rotated_rows_are_neighbours(llama, tmp_path):
    """Of heads of 16, rows 0 and 8 are rotated together: in the file they are rows 0 and 1."""
    write_gguf(llama.model, "f16", tmp_path / "a.gguf")
    file = gguf.GGUFReader(tmp_path / "a.gguf")
    read = {tensor.name: tensor for tensor in file.tensors}
    own = llama.model.model.layers[1].self_attn.k_proj.weight.detach().half().numpy()
    for mine, theirs in ((0, 0), (1, 8), (2, 1), (15, 15), (16, 16), (17, 24)):
        assert (read["blk.1.attn_k.weight"].data[mine] == own[theirs]).all()
    assert file.fields["llama.rope.freq_base"].contents() == 5000
    assert "rope_freqs.weight" not in read


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_has_its_format_and_is_used_again(llama, format):
    path = gguf_file(llama.model, format)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ends = "Q8_0" if format == "q4_1" else format.upper()
    assert read["token_embd.weight"].tensor_type.name == ends
    assert read["blk.0.ffn_up.weight"].tensor_type.name == format.upper()
    assert read["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    made = path.stat().st_mtime_ns
    assert gguf_file(llama.model, format) == path
    assert path.stat().st_mtime_ns == made
    with torch.no_grad():
        llama.model.model.norm.weight[0] += 1
    try:
        assert gguf_file(llama.model, format) != path
    finally:
        with torch.no_grad():
            llama.model.model.norm.weight[0] -= 1


def test_stretched_frequencies_are_written():
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        rope_parameters=rope,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(gguf_file(model, "f16")).tensors}
    plain = 5000.0 ** -(torch.arange(0, 32, 2) / 32)
    own = plain / torch.tensor(read["rope_freqs.weight"])
    torch.testing.assert_close(own, model.model.rotary_emb.inv_freq)
    assert "output.weight" in read


def test_other_families_are_refused():
    with pytest.raises(PeerError, match="written for Llama only, and the model is of the family qwen2"):
        gguf_file(tiny.tiny("qwen2"), "f16")


def test_a_folder_is_loaded_as_it_was(llama):
    folder = model_folder(llama.model)
    again = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, llama.model.model.layers[1].mlp.up_proj.weight)
    assert model_folder(llama.model) == folder


# Starting


def test_all_formats_start_and_one_that_fails_is_said_once(llama, monkeypatch):
    monkeypatch.setattr(starting, "Peer", partial(Peer, script=FAKE))
    said = []
    pythons = {"llama.cpp": sys.executable, "economize": "/nowhere/python"}
    with started(llama, ["llama.cpp", "economize"], context=8, pythons=pythons, say=said.append) as peers:
        assert list(peers) == ["llama.cpp f16", "llama.cpp q8_0", "llama.cpp q4_1", "economize"]
        assert isinstance(peers["economize"], PeerError)
        assert peers["llama.cpp q4_1"].generate([3], 1).tokens == [4]
    assert peers["llama.cpp f16"]._process.poll() is not None
    assert [line for line in said if "left out" in line] == [f"economize is left out: {peers['economize']}"]


def test_a_peer_goes_on_without_instructions_that_are_not_allowed(monkeypatch):
    monkeypatch.setattr(starting, "Peer", partial(Peer, script=FAKE))
    said = []
    asked = {"fault": "tiles", "tiles": True}
    with starting._tried("llama.cpp q8_0", [sys.executable], asked, dict(os.environ), said.append) as peer:
        assert peer.versions["tiles"] == "False"
    assert "not allowed here" in said[0]


def test_names_are_checked(llama):
    with (
        pytest.raises(ValueError, match="peer is 'lama.cpp'; allowed are .*; did you mean 'llama.cpp'"),
        started(llama, ["lama.cpp"], context=8),
    ):
        pass


# Rows of the bench


STATIC = {"static 1": ExitPolicy("static", min_layer=1)}


def test_peers_take_turns_and_have_rows(llama, ticks):
    prompts = random_prompts(llama, 2, length=4)
    with fake({}) as peer, fake({"fault": "crash", "after": 5}) as weak:
        peers = {"llama.cpp f16": peer, "weak": weak, "absent": PeerError("there is no compiler")}
        result = run_bench(
            llama, prompts, STATIC, max_new_tokens=3, repeats=3, warmup=1, peers=peers, probe=lambda: 2e9
        )
    assert [sorted(batch) for batch in result.order[0]] == [
        sorted([REFERENCE, FULL, *STATIC, "llama.cpp f16", "weak"])
    ] * 2
    (row,) = result.peers
    assert row.name == result.fastest_llama_cpp.name == "llama.cpp f16"
    assert row.seconds == (1.0,) * 3
    assert row.first_token.median == 0.125
    assert row.tokens_per_second.median == 6.0
    assert row.versions["fake"] == "1.0"
    assert result.left_out["absent"] == "there is no compiler"
    assert "the engine broke" in result.left_out["weak"]
    assert result.bandwidth == (2e9,) * 3
    full = result.arm(FULL)
    assert len({*full.seconds}) == 1  # by a clock that counts
    assert 0 < full.first_token.low == full.first_token.high < full.seconds[0]
    assert result.of_the_probe(full).median == pytest.approx(
        sorted(full.bytes * 6 / seconds / 2e9 for seconds in full.seconds)[1]
    )
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["fastest_llama_cpp"] == "llama.cpp f16"
    assert values["peers"][0]["over_llama_cpp"]["median"] == 1
    assert values["arms"][1]["over_llama_cpp"]["median"] == pytest.approx(sorted(1 / s for s in full.seconds)[1])
    table = result.table()
    assert "× llama.cpp f16" in table
    assert "weak is left out" in table
    assert "llama.cpp f16: fake 1.0" in table
    assert "2.00 (2.00–2.00) GB/s" in table


def test_agreement_of_a_peer_is_counted_in_tokens(llama):
    """One that continues as the model does but for the second token."""
    prompt = random_prompts(llama, 1, length=4)
    own = llama.generate(prompt, max_new_tokens=4, min_new_tokens=4).tokens[0]

    class Nearly(Peer):
        def __init__(self):
            self.versions = {}

        def generate(self, ids, new):
            assert list(ids) == prompt[0].tolist()
            return Answer([own[0], own[1] ^ 1, *own[2:]], 1.0, 0.5)

    (row,) = run_bench(llama, prompt, {}, max_new_tokens=4, repeats=1, warmup=0, peers={"x": Nearly()}).peers
    assert (row.agreement, row.identical, row.common_prefix) == (0.75, 0, 1)
    assert (row.exact_agreement, row.exact_prefix) == (0.75, 1)


def test_agreement_is_also_with_the_model_in_float32(llama):
    """Rounded to bfloat16, the model says something else; a peer that says what the exact one does is told."""
    prompt = random_prompts(llama, 1, length=4)
    rounded = LanguageModel(copy.deepcopy(llama.model).bfloat16())
    exact = LlamaForCausalLM(llama.model.config)
    exact.load_state_dict({name: weight.float() for name, weight in rounded.model.state_dict().items()})
    tokens = exact.eval().generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 4:].tolist()

    class Exact(Peer):
        def __init__(self):
            self.versions = {}

        def generate(self, ids, new):
            return Answer(tokens, 1.0, 0.5)

    result = run_bench(rounded, prompt, {}, max_new_tokens=4, repeats=1, warmup=0, peers={"x": Exact()})
    assert (result.peers[0].exact_agreement, result.peers[0].exact_prefix) == (1, 4)
    assert result.arm(REFERENCE).agreement == 1


def test_kept_rounds_go_on_with_the_same_peers_only(llama, tmp_path):
    prompts = random_prompts(llama, 1, length=4)
    options = {"max_new_tokens": 2, "warmup": 0, "folder": tmp_path / "run"}
    with fake({}) as peer:
        run_bench(llama, prompts, {}, repeats=1, peers={"fake": peer}, **options)
        result = run_bench(llama, prompts, {}, repeats=2, peers={"fake": peer}, **options)
        assert result.peers[0].seconds == (0.5, 0.5)
        with pytest.raises(ValueError, match="peers was"):
            run_bench(llama, prompts, {}, repeats=2, **options)
    with fake({"fault": "crash"}) as peer:
        result = run_bench(llama, prompts, {}, repeats=3, peers={"fake": peer}, **options)
        assert result.peers == []
        assert "the engine broke" in result.left_out["fake"]
    with fake({}) as peer:
        result = run_bench(llama, prompts, {}, repeats=3, peers={"fake": peer}, **options)
        assert result.left_out["fake"].startswith("it failed in 1 of 3 rounds")


def test_peers_are_given_one_prompt_at_a_time(llama):
    with fake({}) as peer, pytest.raises(ValueError, match="batch_size is 2, but peers are given one prompt"):
        run_bench(llama, random_prompts(llama, 2), {}, batch_size=2, peers={"fake": peer})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer-python", "llama.cpp=/a"], "given for llama.cpp, which --peers does not name"),
        (["--peers", "llama.cpp", "--peer-python", "llama.cpp"], "give PEER=PATH"),
        (["--peers", "vllm"], "peer is 'vllm'; allowed are 'compiled', 'llama.cpp', 'economize'"),
    ],
)
def test_the_command_checks_its_peers(arguments, message):
    done = CliRunner().invoke(app, ["bench", "--random", "t5-small", "--limit", "1", *arguments])
    assert done.exit_code != 0
    assert message in " ".join(done.output.replace("│", " ").split()) + str(done.exception)


# The real thing, where it is


@pytest.fixture
def llama_cpp_python(monkeypatch):
    monkeypatch.delenv("OFFRAMP_CACHE")
    folder = starting.folder_of("llama.cpp")
    if not folder.is_dir():
        pytest.skip("llama.cpp is not in the cache: offramp bench --peers llama.cpp puts it there")


def test_llama_cpp_continues_as_the_model_does(llama, llama_cpp_python, tmp_path, monkeypatch):
    prompt = random_prompts(llama, 1, length=9)
    with endless(llama):
        own = llama.generate(prompt, max_new_tokens=8).tokens[0]
    with started(llama, ["llama.cpp"], context=32) as peers:
        assert peers["llama.cpp f16"].generate(prompt[0].tolist(), 8).tokens == own
        assert peers["llama.cpp q8_0"].generate(prompt[0].tolist(), 1).tokens == own[:1]
