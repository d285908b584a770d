"""Bodies of requests: what is taken, and what is refused under which name."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.core.running import OWN
from offramp.serve.requests import ApiError, parse

CHAT = {"messages": [{"role": "user", "content": "why ?"}]}


def read(chat=False, **fields):
    base = CHAT if chat else {"prompt": "why ?"}
    return parse(json.dumps({**base, **fields}).encode(), chat=chat, most=4)


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({}, "threshold", OWN),
        ({"temperature": 0}, "sampling", {"do_sample": False}),
        ({"temperature": 0.5, "top_p": 1, "seed": 3}, "sampling", {"temperature": 0.5, "top_p": 1.0, "seed": 3}),
        ({"stop": "end"}, "stop", ("end",)),
        ({"stop": None}, "stop", ()),
        ({"prompt": [1, 2]}, "prompts", [[1, 2]]),
        ({"prompt": [[1], [2, 3]]}, "prompts", [[1], [2, 3]]),
        ({"prompt": ["a", "b"]}, "prompts", ["a", "b"]),
        ({"max_tokens": 3}, "max_tokens", 3),
        ({"logprobs": 2}, "top", 2),
        ({"logit_bias": {"5": -100}}, "bias", {5: -100.0}),
        ({"offramp": {"threshold": 0.8}}, "threshold", 0.8),
        ({"offramp": {"threshold": None}}, "threshold", None),
        ({"offramp": {"policy": "full"}}, "threshold", None),
        ({"offramp": {"policy": "default"}}, "threshold", OWN),
        ({"offramp": {"policy": "default", "threshold": None}}, "threshold", OWN),
    ],
    ids=str,
)  # fmt: skip
def test_fields_are_taken(fields, name, value):
    assert getattr(read(**fields), name) == value


def test_a_message_may_be_parts_and_developers_are_the_system():
    wanted = read(chat=True, messages=[
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None},
    ])  # fmt: skip
    assert wanted.prompts == [[{"role": "system", "content": "be brief"}, {"role": "assistant", "content": "yes"}]]


@pytest.mark.parametrize(
    ("chat", "fields", "param"),
    [
        (False, {"frequency": 1}, "frequency"),
        (False, {"messages": []}, "messages"),
        (False, {"model": 3}, "model"),
        (False, {"prompt": None}, "prompt"),
        (False, {"prompt": []}, "prompt"),
        (False, {"prompt": [[]]}, "prompt"),
        (False, {"prompt": [1, "a"]}, "prompt"),
        (False, {"prompt": [True]}, "prompt"),
        (False, {"prompt": "a\ud800"}, "prompt"),
        (False, {"prompt": ["a"] * 5}, "prompt"),
        (False, {"prompt": ["a"] * 2, "n": 3}, "prompt"),
        (False, {"n": 0}, "n"),
        (False, {"n": 5}, "n"),
        (False, {"n": True}, "n"),
        (False, {"n": 1.5}, "n"),
        (False, {"max_tokens": 0}, "max_tokens"),
        (False, {"max_tokens": "3"}, "max_tokens"),
        (False, {"max_tokens": 10**30}, "max_tokens"),
        (False, {"temperature": -1}, "temperature"),
        (False, {"temperature": "hot"}, "temperature"),
        (False, {"temperature": True}, "temperature"),
        (False, {"top_p": 1.5}, "top_p"),
        (False, {"seed": 2**64}, "seed"),
        (False, {"stream": 1}, "stream"),
        (False, {"stream_options": {"include_usage": True}}, "stream_options"),
        (False, {"stream": True, "stream_options": {"x": 1}}, "stream_options"),
        (False, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (False, {"stop": ["x"] * 5000}, "stop"),
        (False, {"stop": ""}, "stop"),
        (False, {"stop": "x" * 201}, "stop"),
        (False, {"stop": [1]}, "stop"),
        (False, {"stop": {}}, "stop"),
        (False, {"logprobs": 6}, "logprobs"),
        (False, {"logprobs": True}, "logprobs"),
        (False, {"echo": True}, "echo"),
        (False, {"user": 1}, "user"),
        (False, {"logit_bias": {"a": 1}}, "logit_bias"),
        (False, {"logit_bias": {"1": "x"}}, "logit_bias.1"),
        (False, {"logit_bias": {"1": 101}}, "logit_bias.1"),
        (False, {"logit_bias": {"1": None}}, "logit_bias.1"),
        (False, {"presence_penalty": 3}, "presence_penalty"),
        (False, {"offramp": 1}, "offramp"),
        (False, {"offramp": {"treshold": 1}}, "offramp.treshold"),
        (False, {"offramp": {"threshold": "low"}}, "offramp.threshold"),
        (False, {"offramp": {"policy": "fast"}}, "offramp.policy"),
        (False, {"offramp": {"policy": "full", "threshold": 0.5}}, "offramp.threshold"),
        (False, {"offramp": {"prompt_cache": 1}}, "offramp.prompt_cache"),
        (True, {"prompt": "x"}, "prompt"),
        (True, {"messages": "x"}, "messages"),
        (True, {"messages": []}, "messages"),
        (True, {"messages": ["x"]}, "messages[0]"),
        (True, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        (True, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (True, {"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        (True, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        (True, {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        (True, {"top_logprobs": 2}, "top_logprobs"),
        (True, {"logprobs": 2}, "logprobs"),
        (True, {"tools": [1]}, "tools"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_its_name(chat, fields, param):
    with pytest.raises(ApiError) as refused:
        read(chat, **fields)
    assert (refused.value.status, refused.value.kind, refused.value.param) == (400, "invalid_request_error", param)
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"3",
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "number", "not-utf-8", "nan", "deep", "huge-number"],
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as refused:
        parse(body, chat=False, most=4)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


_FIELDS = (
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream",
    "stream_options", "logprobs", "top_logprobs", "logit_bias", "offramp", "user", "echo", "presence_penalty",
)  # fmt: skip


@given(chat=st.booleans(), name=st.sampled_from(_FIELDS), value=_VALUES)
def test_any_value_of_a_field_is_taken_or_refused(chat, name, value):
    base = CHAT if chat else {"prompt": "why ?"}
    with contextlib.suppress(ApiError):
        parse(json.dumps({**base, name: value}).encode(), chat=chat, most=4)
