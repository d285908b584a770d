"""The server's page in a real browser, against a stub that speaks the server's interface."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from browser import PROGRAM, browsing

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
from starlette.applications import Starlette  # noqa: E402
from starlette.responses import JSONResponse, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

import offramp  # noqa: E402
from offramp.serve.app import page  # noqa: E402
from serving import listening  # noqa: E402

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium")

SOURCE = Path(offramp.__file__).parent
DEPTH, EXITS = 30, [20, 22, 24, 26, 28]
ALL_READ = {"prompt_cache": False}  # or the second of two answers would have its prompt for free
FULL = (
    "The sky looks blue because air scatters the short waves of sunlight far more than the long ones .\n\n"
    "Whatever way you look, blue light reaches your eyes from there; near the sun it is white, and in the evening, "
    "when light has come a long way through the air, most of the blue is gone and what is left is red ."
)
ABOUT = {
    "model": "stub", "version": "0", "num_layers": DEPTH, "exit_layers": EXITS, "has_chat_template": True,
    "policy": {"confidence": "softmax", "threshold": 0.8, "min_layer": 20, "skipped": "propagate"},
    "certificate": {
        "on_file": True, "promise": "holds",
        "statement": "New prompts get answers at most 0.05 away from the full model's on average; this holds with "
        "probability 95 % over the calibration prompts.",
    },
    "limits": {"rows": 4, "context": 2048, "max_tokens": 2047, "default_max_tokens": 256},
}  # fmt: skip


def tokens_of(text):
    """Words with their blanks, and an end without text."""
    return [part if i == 0 else f" {part}" for i, part in enumerate(text.split(" "))] + [""]


class Stub:
    """Answers like the server; `about` and the attributes say how."""

    def __init__(self, **about):
        self.about, self.asked = ABOUT | about, []
        self.key = self.refuses = None
        self.breaks, self.pause = False, 0.0

    def tokens(self, threshold):
        """Text, layer and confidence of each token; lower thresholds leave earlier, and lose a word."""
        words = tokens_of(FULL if threshold is None or threshold > 0.7 else FULL.replace("far more", "rather more"))
        for i, word in enumerate(words):
            sure = (i * 37 % 100) / 100
            out = [layer for layer in EXITS if threshold is not None and sure * (0.6 + layer / 60) > threshold]
            yield word, out[0] if out else DEPTH, None if i == 0 else sure

    async def chunks(self, threshold):
        found = list(self.tokens(threshold))
        chat = self.about["has_chat_template"]
        for text, layer, sure in found:
            choice = {"delta": {"content": text}} if chat else {"text": text}
            told = {"exit_layers": [layer], "confidences": [sure], "tokens": [text], "num_layers": DEPTH}
            chunk = {"choices": [{"index": 0, **choice, "finish_reason": None}], "offramp": told}
            yield f"data: {json.dumps(chunk)}\n\n"
            await asyncio.sleep(self.pause)
            if self.breaks and text == " air":
                self.breaks = False
                return
        layers = [layer for _, layer, _ in found]
        cost = {
            "mean_depth": sum(layers) / len(layers) / DEPTH,
            "flops": sum(layers),
            "full_flops": DEPTH * len(layers),
        }
        cost |= {"seconds": sum(layers) / 1000, "tokens_per_second": 1000 * len(layers) / sum(layers)}
        promised = {"holds_for_this_request": threshold == 0.8, "statement": ABOUT["certificate"]["statement"]}
        promised["reasons"] = [] if threshold == 0.8 else ["the request does not go by the certified policy"]
        choice = {"index": 0, **({"delta": {}} if chat else {"text": ""}), "finish_reason": "stop"}
        last = {"choices": [choice], "offramp": {"num_layers": DEPTH, "certificate": promised, "cost": cost}}
        yield f"data: {json.dumps(last)}\n\n: still here\n\ndata: [DONE]\n\n"

    def refused(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "the API key is missing or wrong"}}, 401)
        return None

    async def page(self, _):
        return page("stub")

    async def told(self, request):
        return self.refused(request) or JSONResponse(self.about)

    async def answer(self, request):
        body = await request.json()
        self.asked.append(body)
        if refused := self.refused(request):
            return refused
        if self.refuses:
            message, self.refuses = self.refuses, None
            return JSONResponse({"error": {"message": message}}, 429, {"Retry-After": "2"})
        own = body.get("offramp", {})
        level = None if own.get("policy") == "full" or not self.about["policy"] else own.get("threshold", 0.8)
        return StreamingResponse(self.chunks(level), media_type="text/event-stream")

    @contextlib.contextmanager
    def served(self):
        """Its address, until the end of the block."""
        paths = [
            Route("/", self.page),
            Route("/v1/offramp", self.told),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
        ]
        with listening(Starlette(routes=paths), uvicorn.Server) as address:
            yield f"{address}/"


@pytest.fixture(scope="module")
def tab():
    with browsing() as tab:
        yield tab


@contextlib.contextmanager
def opened(tab, stub, width=1300, scheme="light"):
    tab.look(width, scheme=scheme)
    tab.requested.clear(), tab.complaints.clear()
    with stub.served() as address:
        tab.open(address)
        yield address
        tab.get("running?.abort()")


def asked(tab, question="Why is the sky blue?"):
    tab.until("!document.getElementById('trouble').hidden || about !== null")
    tab.get("document.getElementById('question').focus()")
    tab.write(question)
    tab.press("Enter")


def finished(tab, panes=2):
    tab.until(f"running === null && document.querySelectorAll('.turn:last-child .pane').length === {panes}")


def texts(tab, selector):
    return tab.get(f"[...document.querySelectorAll({json.dumps(selector)})].map((it) => it.textContent)")


def colours(tab):
    return tab.get("[...document.querySelectorAll('.exits .tokens span')].map((it) => getComputedStyle(it).background)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 400])
def test_tokens_have_the_colour_of_their_layer_and_the_full_answer_is_beside(tab, width, scheme):
    stub = Stub()
    with opened(tab, stub, width, scheme) as address:
        asked(tab)
        finished(tab)
        words = tokens_of(FULL)
        assert texts(tab, ".exits .tokens span") == texts(tab, ".full .tokens span") == words
        layers = [layer for _, layer, _ in stub.tokens(0.8)]
        seen = dict(zip(layers, colours(tab), strict=True))
        assert len(set(seen.values())) == len(set(layers)) > 3
        assert len(set(zip(layers, colours(tab), strict=True))) == len(seen)
        assert "rgba(0, 0, 0, 0)" in seen[DEPTH]  # full depth is plain
        heights = tab.get("[...document.querySelectorAll('.exits .strip i')].map((it) => parseFloat(it.style.height))")
        assert heights == pytest.approx([100 * layer / DEPTH for layer in layers], abs=1e-3)
        assert not tab.overflows()
        sides = tab.get("[...document.querySelectorAll('.pane')].map((it) => it.getBoundingClientRect().top)")
        assert (sides[0] == sides[1]) == (width > 1000)
        assert tab.get("getComputedStyle(document.body).colorScheme") == "light dark"
        dark = tab.get("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        assert dark == (scheme == "dark")
        assert all(url.startswith((address, "data:")) for url in tab.requested)
        assert tab.complaints == []
    assert [body["offramp"] for body in stub.asked] == [ALL_READ, {**ALL_READ, "policy": "full"}]
    assert stub.asked[0]["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]


def test_the_slider_asks_again_and_what_differs_is_marked(tab):
    stub = Stub()
    with opened(tab, stub):
        asked(tab)
        finished(tab)
        assert "all 64 tokens are the same" in "".join(texts(tab, ".beside")).replace(f"{len(tokens_of(FULL))}", "64")
        tab.get("document.getElementById('threshold').focus()")
        tab.press("Home")
        tab.until("document.querySelectorAll('.other').length === 2")
        finished(tab)
        assert stub.asked[-1]["offramp"] == {**ALL_READ, "threshold": 0}
        assert len(stub.asked) == 3  # the full answer is still there
        assert texts(tab, ".exits .other") == [" rather"]
        assert texts(tab, ".full .other") == [" far"]
        said = " ".join(texts(tab, ".beside"))
        assert "× its FLOPs per token" in said
        assert "not measured" in said
        assert [row[:4] for row in texts(tab, ".tries tr")[1:]] == ["the ", "0.00"]
        assert "Not for this answer: the request does not go by the certified policy" in "".join(texts(tab, "#promise"))
        tab.get("document.getElementById('own').click()")
        finished(tab)
        assert stub.asked[-1]["offramp"] == ALL_READ  # the policy's own again, which the certificate is about
        assert "Not for this answer" not in "".join(texts(tab, "#promise"))
        assert tab.complaints == []


def test_the_keyboard_goes_through_tokens_and_escape_stops(tab):
    stub = Stub()
    with opened(tab, stub):
        asked(tab)
        finished(tab)
        tab.get("document.querySelector('.exits .tokens').focus()")
        tab.press("ArrowRight"), tab.press("ArrowRight")
        word, layer, sure = list(stub.tokens(0.8))[1]
        where = f"left after layer {layer} of 30" if layer < DEPTH else "went to full depth, layer 30"
        assert texts(tab, ".exits .detail") == [f"“{word}” {where}, confidence {sure:.2f}"]
        assert tab.get("document.querySelectorAll('.exits .here').length") == 2  # the token and its bar
        assert tab.get("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        stub.pause = 0.05
        asked(tab, "And at night?")
        tab.until("document.querySelectorAll('.turn:last-child .exits .tokens span').length > 3")
        tab.press("Escape")
        finished(tab)
        assert texts(tab, ".turn:last-child h3 span") == ["stopped", "not asked"]
        assert [m["role"] for m in stub.asked[-1]["messages"]] == ["user", "assistant", "user"]
        assert len(texts(tab, ".turn:last-child .exits .tokens span")) < len(tokens_of(FULL))


def test_errors_and_lost_connections_are_told_and_can_be_tried_again(tab):
    stub = Stub()
    with opened(tab, stub):
        stub.refuses, stub.breaks = "too many requests <b>wait</b>", True
        asked(tab)
        tab.until("!document.getElementById('trouble').hidden")
        assert texts(tab, "#trouble span") == ["too many requests <b>wait</b> (again in 2 s)"]
        tab.get("document.getElementById('again').click()")
        tab.until("document.getElementById('trouble').textContent.includes('connection was lost')")
        tab.get("document.getElementById('again').click()")
        finished(tab)
        assert tab.get("document.getElementById('trouble').hidden")
        assert texts(tab, ".exits .tokens span") == tokens_of(FULL)
    asked(tab, "Are you there?")
    tab.until("document.getElementById('trouble').textContent.includes('cannot be reached')")


def test_a_key_is_asked_for_where_the_server_wants_one(tab):
    stub = Stub()
    stub.key = "sesame"
    with opened(tab, stub):
        tab.until("document.activeElement.id === 'secret'")
        tab.write("sesame")
        tab.press("Enter")
        tab.until("about !== null")
        asked(tab)
        finished(tab)
        assert texts(tab, ".exits .tokens span") == tokens_of(FULL)


def test_markup_in_texts_stays_text(tab):
    stub = Stub(model="<img src=x onerror=alert(1)>")
    with opened(tab, stub):
        asked(tab, "<script>alert(1)</script>")
        finished(tab)
        assert texts(tab, ".turn h2") == ["<script>alert(1)</script>"]
        assert tab.get("document.querySelectorAll('img, .turn script').length") == 0


def test_a_lossless_policy_has_a_switch_instead_of_the_slider(tab):
    stub = Stub(policy={**ABOUT["policy"], "skipped": "verify"})
    with opened(tab, stub):
        tab.until("about !== null")
        assert tab.get("document.getElementById('slider').hidden && !document.getElementById('mode').hidden")
        asked(tab)
        finished(tab)
        tab.get("document.querySelector('[name=mode][value=full]').click()")
        finished(tab, panes=1)
        assert [body["offramp"] for body in stub.asked] == [ALL_READ, {**ALL_READ, "policy": "full"}]


def test_without_a_policy_or_a_chat_template_the_full_model_goes_on_with_a_text(tab):
    stub = Stub(policy=None, exit_layers=[], has_chat_template=False)
    with opened(tab, stub):
        asked(tab, "The sky")
        finished(tab, panes=1)
        assert texts(tab, ".full .tokens span") == tokens_of(FULL)
        assert stub.asked == [
            {"model": "stub", "stream": True, "offramp": {"prompt_cache": False}, "prompt": "The sky"}
        ]


def test_the_page_is_one_small_file_that_makes_no_markup_of_texts():
    html = (SOURCE / "serve" / "page.html").read_text()
    assert len(html.encode()) < 150_000
    assert not [
        word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(") if word in html
    ]
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html
