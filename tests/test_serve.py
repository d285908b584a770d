"""The server through OpenAI's own client and through bare sockets, over a batch that returns what it is told."""

import contextlib
import json
import threading

import pytest

openai = pytest.importorskip("openai")

from offramp import ExitPolicy, LanguageModel  # noqa: E402
from offramp.serve.promise import Standing  # noqa: E402
from serving import EOS, Limits, ScriptedBatch, Serving, connected, model, posted, raw, served, spelt, until  # noqa: E402
from tiny import tiny  # noqa: E402

LM = model()
POLICY = ExitPolicy(threshold=0.5, min_layer=2)
DRAFTS = ExitPolicy(confidence="static", min_layer=2, skipped="verify", draft_length=2)
PROMPT = "ab"


def server(batch=None, policy=POLICY, **options):
    batch = batch or ScriptedBatch()
    limits = options.pop("limits", Limits(rows=4, longest=200))
    serving = Serving(LM, policy, limits=limits, batch=lambda: batch, **options)
    serving.batch = batch
    return serving


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def running():
    """A server that answers "ab" with "Hello, you."."""
    batch = ScriptedBatch({tuple(spelt(PROMPT)): [*spelt("Hello, you."), EOS]})
    with served(server(batch)) as address, client(address) as ask:
        yield address, ask, batch


def answered(address, path, body, **headers):
    """Status and JSON of an answer to a request."""
    head, _, content = raw(address, posted(path, body, **headers)).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


# ---------------------------------------------------------------- answers


def test_completions(running):
    _, ask, _ = running
    answer = ask.completions.create(model="tiny", prompt=PROMPT)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello, you.", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 12, 14)
    told = answer.offramp
    assert (told["num_layers"], told["exit_layers"], told["confidences"]) == (4, [[2] * 12], [[0.5] * 12])
    assert told["cost"]["mean_depth"] == 0.5
    assert told["cost"]["flops"] == 12_000
    assert told["cost"]["full_flops"] == LM.split.shape.generation_flops(2, 12)
    assert told["policy"] == POLICY.to_dict()
    assert not told["certificate"]["holds_for_this_request"]
    assert "No certificate is on file" in told["certificate"]["statement"]


@pytest.mark.parametrize(("accept", "words"), [(1.0, "answers are the full model's own"), (0.5, "nothing is promised")])
def test_only_drafts_that_are_checked_strictly_need_no_certificate(accept, words):
    policy = ExitPolicy(confidence="max", threshold=0.5, min_layer=1, skipped="verify", accept=accept)
    assert words in Standing(LM, policy, None).statement


def test_chat(running):
    _, ask, _ = running
    answer = ask.chat.completions.create(model="tiny", messages=[{"role": "user", "content": PROMPT}])
    assert answer.choices[0].message.content == "Hello, you."
    assert answer.object == "chat.completion"


def test_a_stream_of_a_chat_brings_the_same_in_pieces(running):
    _, ask, _ = running
    chunks = list(ask.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], stream=True,
        stream_options={"include_usage": True},
    ))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, you."
    pieces = [chunk for chunk in chunks[1:-2] if chunk.choices[0].delta.content]
    assert [chunk.offramp["tokens"] for chunk in pieces[:3]] == [["H"], ["e"], ["l"]]
    assert sum((chunk.offramp["exit_layers"] for chunk in chunks[1:-2]), []) == [2] * 12
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].offramp["cost"]["flops"] == 12_000
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_a_stream_of_completions_ends_with_done(running):
    address, ask, _ = running
    text = "".join(chunk.choices[0].text for chunk in ask.completions.create(model="tiny", prompt=PROMPT, stream=True))
    assert text == "Hello, you."
    sent = raw(address, posted("/v1/completions", {"prompt": PROMPT, "stream": True}))
    assert b"text/event-stream" in sent
    assert b"data: [DONE]\n\n" in sent


def test_several_prompts_and_several_answers(running):
    _, ask, _ = running
    answer = ask.completions.create(model="tiny", prompt=["xy", "z"], n=2)
    assert [choice.text for choice in answer.choices] == ["xy", "xy", "z", "z"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 3
    tokens = ask.completions.create(model="tiny", prompt=[spelt("pq"), spelt("r")])
    assert [choice.text for choice in tokens.choices] == ["pq", "r"]


@pytest.mark.parametrize(
    ("stop", "text"), [("lo", "Hel"), ([", y", "zzz"], "Hello"), ("you.", "Hello, "), ("H", ""), ("x", "Hello, you.")]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_ends_before_a_stop_string(running, stop, text, stream):
    _, ask, batch = running
    if stream:
        chunks = list(ask.completions.create(model="tiny", prompt=PROMPT, stop=stop, stream=True))
        got, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = ask.completions.create(model="tiny", prompt=PROMPT, stop=stop).choices[0]
        got, reason = choice.text, choice.finish_reason
    assert (got, reason) == (text, "stop")
    until(lambda: not batch.active)


def test_an_answer_has_at_most_so_many_tokens(running):
    _, ask, _ = running
    choice = ask.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0]
    assert (choice.text, choice.finish_reason) == ("Hell", "length")


def test_log_probabilities(running):
    _, ask, _ = running
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2}
    chat = ask.chat.completions.create(model="tiny", **asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [(one.token, one.logprob, one.bytes) for one in chat] == [("H", -0.25, [72]), ("e", -0.25, [101])]
    assert [(top.token, top.logprob) for top in chat[0].top_logprobs] == [("H", -0.25), ("!", -2.0)]
    plain = ask.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, logprobs=1).choices[0].logprobs
    assert (plain.tokens, plain.token_logprobs, plain.text_offset) == (["H", "e"], [-0.25, -0.25], [0, 1])
    assert plain.top_logprobs == [{"H": -0.25}, {"e": -0.25}]


@pytest.mark.parametrize(("asked", "layers"), [({"policy": "full"}, [4]), ({"threshold": 0.9}, [2])], ids=str)
def test_a_request_may_go_its_own_way(running, asked, layers):
    _, ask, _ = running
    told = ask.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body={"offramp": asked}).offramp
    assert told["exit_layers"] == [layers]
    assert told["policy"] == (None if "policy" in asked else {**POLICY.to_dict(), "threshold": 0.9})
    assert told["confidences"] == [[None] if "policy" in asked else [0.5]]


def test_what_a_request_asks_for_comes_to_the_batch():
    batch = ScriptedBatch(pause=0.05)
    with served(server(batch)) as address, client(address) as ask:
        stream = ask.completions.create(
            model="tiny", prompt="abc", max_tokens=9, temperature=0.5, top_p=0.7, seed=3, presence_penalty=0.5,
            logit_bias={"7": -5}, stream=True,
        )  # fmt: skip
        with stream:
            next(iter(stream))
            (asked,) = batch.asked.values()
    assert (list(asked.ids), asked.max_new_tokens, asked.sampler.eos) == (spelt("abc"), 9, (EOS,))
    assert asked.sampler.sample
    assert asked.sampler.generator.initial_seed() == 3
    own = LM.sampler(spelt("abc"), temperature=0.5, top_p=0.7, seed=3)
    names = [type(processor).__name__ for processor in asked.sampler.processors]
    assert {type(processor).__name__ for processor in own.processors} < set(names)
    assert {"Penalties", "SequenceBiasLogitsProcessor"} < set(names)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("status", "code", "path", "body"),
    [
        (400, "unknown_parameter", "/v1/completions", {"prompt": "x", "best": 1}),
        (400, "unknown_parameter", "/v1/completions", {"prompt": "x", "\ud800": 1}),
        (400, "invalid_value", "/v1/completions", {"prompt": "x", "n": "1"}),
        (400, "invalid_value", "/v1/completions", {"prompt": ""}),
        (400, "invalid_value", "/v1/completions", {"prompt": [100_000]}),
        (400, "invalid_value", "/v1/completions", {"prompt": "x", "logit_bias": {"100000": 1}}),
        (400, "invalid_value", "/v1/completions", {"prompt": "x", "stop": ["x"] * 5000}),
        (400, "invalid_json", "/v1/completions", b'{"prompt": "\xff"}'),
        (400, "invalid_json", "/v1/chat/completions", b"{"),
        (400, "context_length_exceeded", "/v1/completions", {"prompt": "x" * 200}),
        (400, "context_length_exceeded", "/v1/completions", {"prompt": "x" * 100, "max_tokens": 101}),
        (400, "context_length_exceeded", "/v1/completions", {"prompt": "x", "max_tokens": 2**31 - 1}),
        (404, "model_not_found", "/v1/completions", {"prompt": "x", "model": "other"}),
        (404, None, "/v1/nothing", {}),
        (405, None, "/v1/models", {}),
    ],
)  # fmt: skip
def test_errors_are_openais(running, status, code, path, body):
    got, told = answered(running[0], path, body)
    assert (got, told["error"]["code"]) == (status, code)
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert told["error"]["type"] == "invalid_request_error"
    assert running[1].completions.create(model="tiny", prompt="still here").choices[0].text == "still here"


def test_the_client_knows_the_errors(running):
    _, ask, _ = running
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask.completions.create(model="tiny", prompt="x", temperature=7)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(running):
    address = running[0]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sent = raw(address, head + b"Content-Length: 10485760\r\n\r\n{")  # nothing more ever comes
    assert sent.startswith(b"HTTP/1.1 413")
    assert json.loads(sent.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"
    with pytest.raises(openai.APIStatusError) as refused:
        running[1].completions.create(model="tiny", prompt="x" * 10_485_760)
    assert refused.value.status_code == 413


def test_a_body_without_a_length_is_counted_as_it_comes():
    with served(server(limits=Limits(rows=4, longest=200, body=1000))) as address:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        piece = b"258\r\n" + b"x" * 600 + b"\r\n"
        assert raw(address, head + b"Transfer-Encoding: chunked\r\n\r\n" + piece + piece).startswith(b"HTTP/1.1 413")


def test_half_a_request_is_given_up():
    with served(server(limits=Limits(rows=4, longest=200, reading=0.2))) as address:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert raw(address, head + b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")
        with connected(address, head + b"Content-Length: 100\r\n\r\n{"):
            pass  # and one that hangs up
        assert answered(address, "/v1/completions", {"prompt": "x"})[0] == 200


def test_what_a_page_of_another_site_can_send_is_refused(running):
    status, told = answered(running[0], "/v1/completions", {"prompt": "x"}, Content_Type="text/plain")
    assert (status, told["error"]["code"]) == (415, "unsupported_media_type")
    status, told = answered(running[0], "/v1/completions", {"prompt": "x"}, Host="evil.example:8000")
    assert (status, told["error"]["code"]) == (403, "unknown_host")


def test_a_key():
    with served(server(limits=Limits(rows=4, longest=200, key="secret"))) as address:
        with client(address, "wrong") as ask, pytest.raises(openai.AuthenticationError):
            ask.models.list()
        with client(address, "secret") as ask:
            assert [one.id for one in ask.models.list()] == ["tiny"]
            assert ask.models.retrieve("tiny").id == "tiny"
        assert raw(address, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 401")
        assert raw(address, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


# ---------------------------------------------------------------- many at once


def test_rows_are_shared_and_each_gets_its_own():
    batch, got = ScriptedBatch(pause=0.002, rows=3), {}
    with served(server(batch)) as address, client(address) as ask:

        def one(index):
            text = f"this is {index} " * (1 + index % 3)
            got[index] = ask.completions.create(model="tiny", prompt=text).choices[0].text == text

        threads = [threading.Thread(target=one, args=(index,)) for index in range(16)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert got == dict.fromkeys(range(16), True)


def test_a_line_that_is_too_long_is_refused():
    batch = ScriptedBatch(pause=0.05, rows=1)
    with served(server(batch, limits=Limits(rows=1, longest=200, waiting=1))) as address, client(address) as ask:
        streams = [ask.completions.create(model="tiny", prompt="x" * 50, stream=True)]
        until(lambda: batch.active)
        streams.append(ask.completions.create(model="tiny", prompt="y" * 50, stream=True))
        with pytest.raises(openai.RateLimitError) as refused:
            ask.completions.create(model="tiny", prompt="z")
        assert refused.value.response.headers["retry-after"] == "1"
        [stream.close() for stream in streams]
        until(lambda: not batch.active)
        assert ask.completions.create(model="tiny", prompt="z").choices[0].text == "z"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_row(stream):
    batch = ScriptedBatch(pause=0.02)
    with served(server(batch)) as address:
        with connected(address, posted("/v1/completions", {"prompt": "x" * 150, "stream": stream})):
            until(lambda: batch.active)
        until(lambda: batch.released)
        assert batch.active == []


def test_a_client_that_leaves_the_line_is_forgotten():
    batch = ScriptedBatch(pause=0.02, rows=1)
    serving = server(batch, limits=Limits(rows=1, longest=200, waiting=4))
    with served(serving) as address, client(address) as ask:
        with ask.completions.create(model="tiny", prompt="x" * 150, stream=True):
            until(lambda: batch.active)
            with connected(address, posted("/v1/completions", {"prompt": "y"})):
                until(lambda: serving.engine.waiting)
            until(lambda: serving.metrics.cancelled._value.get() == 1)
            assert serving.engine.waiting == 0


def test_an_answer_that_takes_too_long_ends_with_an_error():
    batch = ScriptedBatch(pause=0.05)
    with served(server(batch, limits=Limits(rows=4, longest=200, timeout=0.3))) as address, client(address) as ask:
        with pytest.raises(openai.InternalServerError) as late:
            ask.completions.create(model="tiny", prompt="x" * 150)
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        stream = ask.completions.create(model="tiny", prompt="x" * 150, stream=True)
        with pytest.raises(openai.APIError, match="not finished within"):
            list(stream)
        assert batch.active == []


def test_a_step_that_fails_ends_its_answers_and_no_others():
    batches = []

    def make():
        batches.append(ScriptedBatch(pause=0.02))
        return batches[-1]

    serving = Serving(LM, POLICY, limits=Limits(rows=4, longest=200), batch=make)
    with served(serving) as address, client(address) as ask:
        batches[0].fails = True
        with pytest.raises(openai.InternalServerError, match="failed on this batch"):
            ask.completions.create(model="tiny", prompt="x")
        assert ask.completions.create(model="tiny", prompt="x").choices[0].text == "x"
        assert len(batches) == 2


def test_stopping_lets_answers_finish_and_takes_no_more():
    batch = ScriptedBatch(pause=0.02)
    serving = server(batch)
    with served(serving) as address, client(address) as ask:
        stream = iter(ask.completions.create(model="tiny", prompt="x" * 20, stream=True))
        next(stream)
        serving.engine.drain()
        with pytest.raises(openai.InternalServerError, match="stopping"):
            ask.completions.create(model="tiny", prompt="y")
        assert "".join(chunk.choices[0].text for chunk in stream) == "x" * 19


def test_stopping_ends_answers_that_take_too_long_with_an_error():
    with contextlib.ExitStack() as clients:
        with served(server(ScriptedBatch(pause=0.05)), grace=0.2) as address:
            ask = clients.enter_context(client(address))
            stream = ask.completions.create(model="tiny", prompt="x" * 150, stream=True)
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)


@pytest.mark.parametrize(
    "policy",
    [None, POLICY, DRAFTS],
    ids=["full", "exits", "drafts"],
)
def test_answers_are_those_that_generate_gives_alone(policy):
    """Over the real batch, with more requests than rows: best tokens and samples with a seed."""
    prompts = ["the sky", "why?", "a longer prompt, that is", "B"] * 2
    asked = [({"temperature": 0}, {"do_sample": False})] * 4
    asked += [({"temperature": 0.7, "seed": seed}, {"temperature": 0.7, "seed": seed}) for seed in range(4)]
    alone = [
        LM.generate(prompt, policy=policy, chat=False, max_new_tokens=12, **ours)
        for prompt, (_, ours) in zip(prompts, asked, strict=True)
    ]
    got = {}
    with served(Serving(LM, policy, limits=Limits(rows=3, longest=100))) as address, client(address) as ask:

        def one(index):
            options = asked[index][0]
            got[index] = ask.completions.create(model="tiny", prompt=prompts[index], max_tokens=12, **options)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(prompts))]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    for index, expected in enumerate(alone):
        if policy is DRAFTS and "seed" in asked[index][0]:
            continue  # drafts are made only while the batch has time for them, and each is a draw
        assert got[index].usage.completion_tokens == len(expected.tokens[0])
        assert got[index].choices[0].text == expected.texts[0]
        if policy is not DRAFTS:
            assert got[index].offramp["exit_layers"] == expected.exit_layers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_usage_says_how_much_of_a_prompt_was_not_computed(stream):
    """Over the real batch: first nothing, then whole blocks of what was asked before; nothing, if that is asked for."""
    serving = Serving(LM, limits=Limits(rows=3, longest=100))
    said, options = [], {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    begun = "a prompt of forty signs, and then some."
    with served(serving) as address, client(address) as ask:
        for prompt, more in (
            (begun, {}), (f"{begun}?", {}), (begun, {"extra_body": {"offramp": {"prompt_cache": False}}}),
            (["unlike", f"{begun}!"], {"n": 1}),
        ):  # fmt: skip
            got = ask.completions.create(model="tiny", prompt=prompt, max_tokens=2, temperature=0, **more, **options)
            usage = [chunk.usage for chunk in got][-1] if stream else got.usage
            said.append((usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens))
        assert said == [(39, 0), (40, 32), (39, 0), (46, 32)]
        text = raw(address, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert b"offramp_prompt_tokens_total 164.0" in text
    assert b"offramp_cached_prompt_tokens_total 64.0" in text


def test_what_was_not_computed_is_no_saving_of_the_exits():
    serving, prompt = Serving(LM, limits=Limits(1, 100, 64)), "a prompt of forty signs, and then some.."
    with served(serving) as address, client(address) as ask:
        costs = []
        for _ in range(2):
            answer = ask.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0)
            costs.append(answer.offramp["cost"])
    assert [cost["flops"] for cost in costs] == [cost["full_flops"] for cost in costs]
    assert costs[1]["flops"] < costs[0]["flops"] / 2


def test_engines_that_round_keep_nothing_unless_asked():
    rounding = LanguageModel(tiny("llama"), LM.tokenizer, engine="torch")
    assert [Serving(LM, limits=Limits(4, 100, kept)).kept for kept in (None, 0, 64)] == [100, 0, 64]
    assert [Serving(rounding, limits=Limits(4, 100, kept)).kept for kept in (None, 0, 64)] == [0, 0, 64]


# ---------------------------------------------------------------- about the server


def test_health_metrics_and_what_the_page_asks_for(running):
    address, ask, _ = running
    ask.completions.create(model="tiny", prompt=PROMPT)

    def get(path):
        head, _, body = raw(address, f"GET {path} HTTP/1.0\r\n\r\n".encode()).partition(b"\r\n\r\n")
        assert b" 200 " in head.splitlines()[0]
        return head, body

    health = json.loads(get("/health")[1])
    assert (health["status"], health["model"], health["promise"]) == ("ok", "tiny", "not tested")
    about = json.loads(get("/v1/offramp")[1])
    assert (about["model"], about["num_layers"], about["policy"]) == ("tiny", 4, POLICY.to_dict())
    assert about["limits"]["rows"] == 4
    assert about["has_chat_template"]
    assert not about["certificate"]["on_file"]
    text = get("/metrics")[1].decode()
    for line in (
        'offramp_tokens_total{exit_layer="2"}', "offramp_waiting 0.0", 'offramp_flops_total{kind="full"}',
        "offramp_time_to_first_token_seconds_bucket", 'offramp_requests_total{path="/v1/completions",status="200"}',
        "offramp_flops_saved ",
    ):  # fmt: skip
        assert line in text
    assert b"content-security-policy" in get("/")[0].lower() or get("/")[1].startswith(b"offramp serves tiny")


def test_the_page_may_run_its_own_script_and_nothing_else(monkeypatch, tmp_path):
    """The digest is that of the example in the specification of content security policies."""
    from offramp.serve import app

    file = tmp_path / "page.html"
    file.write_text("<html><style>b{}</style><script>alert('Hello, world.');</script></html>")
    monkeypatch.setattr(app, "_PAGE", file)
    app._read_page.cache_clear()
    rules = app.page("tiny").headers["content-security-policy"]
    app._read_page.cache_clear()
    assert "script-src 'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='" in rules
    assert "default-src 'none'" in rules
    assert "unsafe" not in rules
    monkeypatch.setattr(app, "_PAGE", tmp_path / "absent.html")
    assert app.page("tiny").body.startswith(b"offramp serves tiny")
