"""The server as a deployment of Ray Serve: two replicas on this machine, and what they answer."""

import http.client
import json
import socket

import pytest

from local_ray import local_ray
from offramp import ExitPolicy, load
from serving import model

POLICY = ExitPolicy(threshold=0.5, min_layer=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    lm = model()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def port(folder, monkeypatch):
    """Where two replicas are listened for."""
    from offramp.serve.listen import deployment

    def build():
        import torch

        from offramp.serve.serving import Limits, Serving

        torch.set_num_threads(1)
        return Serving(load(folder, engine="torch"), POLICY, limits=Limits(rows=2, longest=100))

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with local_ray(monkeypatch):
        serve = pytest.importorskip("ray.serve", reason="needs the extra serve-ray")
        serve.start(http_options=serve.HTTPOptions(host="127.0.0.1", port=port))
        try:
            serve.run(deployment(build, replicas=2), route_prefix="/")
            yield port
        finally:
            serve.shutdown()


def answer(port, body):
    """The replica and the text of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        return response.headers["offramp-replica"], text
    finally:
        connection.close()


def whole(text):
    """Tokens and exit layers of an answer."""
    told = json.loads(text)
    return told["choices"][0]["text"], told["offramp"]["exit_layers"][0]


def streamed(text):
    """The same of a stream."""
    *events, end = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert end == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len(chunks) > 2
    layers = [layer for chunk in chunks for layer in chunk["offramp"].get("exit_layers", [])]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]), layers


@pytest.mark.slow
def test_both_of_two_replicas_answer_as_the_model_does(folder, port):
    alone = load(folder, engine="torch").generate("ab", policy=POLICY, max_new_tokens=8)
    expected = alone.texts[0], alone.exit_layers[0]
    for stream, read in ((False, whole), (True, streamed)):
        seen = {}
        for _ in range(60):
            replica, text = answer(port, {"prompt": "ab", "max_tokens": 8, "stream": stream})
            seen.setdefault(replica, set()).add(str(read(text)))
            if len(seen) == 2:
                break
        assert len(seen) == 2, "one replica answers all"
        assert set.union(*seen.values()) == {str(expected)}
