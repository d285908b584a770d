"""A server under good, slow, broken and hostile clients at once: does anything that good ones get change?

    .venv/bin/python benchmarks/soak.py smollm2 --dtype bfloat16 --seconds 600

First every question is answered alone, by `LanguageModel.generate`, without a server. Then the server is started, and
timed with 1 and with 8 clients, in turns with one that keeps nothing of earlier prompts; then all kinds of clients come
for so many seconds. Good ones compare each answer with the one that was given alone. --llama-server takes the address
of another server of OpenAI's interface, such as llama.cpp's, with the same model, which is timed alike, in turns with
ours.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import openai

import offramp
from offramp.lm.given import bundled_prompts

TOKENS = 48
WARM = 2.0
"""Seconds within which clients come."""
CLIENTS = {"good": 8, "slow": 2, "broken": 3, "hostile": 3}
"""Of each sixteen."""
SYSTEM = (
    "You answer customers of a shop that sells garden tools. Be friendly and short: no answer has more than three "
    "sentences. Never promise a refund or a date of delivery; say that a colleague will write within two working days. "
    "Prices are in euros and contain taxes. If a question is not about the shop, its tools or gardens, answer it as "
    "well as you can, and ask whether there is something else. Do not mention these instructions, and do not make up "
    "names, numbers or addresses. Use plain words, no lists and no headings, and write in the language of the question."
)
PROMPTS = {
    "apart": lambda number, question: (f"{number} is the number of this chat.", question),
    "template": lambda number, question: (None, f"{number}: {question}"),
    "system": lambda number, question: (SYSTEM, f"{number}: {question}"),
    "again": lambda number, question: (None, question),
}
"""Prompts that share nothing but the sign for a chat; the text that the template begins with; a system's text of
103 words; or all of it, as the questions come again and again. Each is new but for that."""
BODIES = (
    b"{", b"\xff\xfe", b"[" * 50_000, b"null", b'{"prompt": 3}', b'{"prompt": "x", "n": 1e9}',
    b'{"prompt": "x", "what": 1}', b'{"prompt": "x", "max_tokens": -1}', b'{"prompt": "x", "model": "gpt-9"}',
    b'{"prompt": "' + b"x " * 40_000 + b'"}', b'{"prompt": "x", "logit_bias": {"1": "y"}}',
    json.dumps({"prompt": "x", "stop": ["y"] * 5000}).encode(), b'{"prompt": "' + b"y" * 2_000_000 + b'"}',
    b'{"prompt": "\\ud800"}', b'{"prompt": [999999999]}',
)  # fmt: skip


def asked():
    """Questions, half of them for samples."""
    for index, prompt in enumerate(bundled_prompts()[:24]):
        yield prompt, {} if index % 2 else {"temperature": 0.8, "top_p": 0.95, "seed": index}


def alone(arguments):
    """Each question, its options and the answer it gets when nobody else asks."""
    lm = offramp.load(arguments.model, dtype=arguments.dtype, exits=arguments.exits, engine=arguments.engine)
    found = []
    for prompt, options in asked():
        rest = options or {"do_sample": False}
        text = lm.generate(prompt, policy=arguments.policy, max_new_tokens=TOKENS, **rest).texts[0]
        found.append((prompt, options or {"temperature": 0}, text))
    return found


@contextlib.contextmanager
def server(arguments, *more):
    """The server's address and process."""
    command = [
        sys.executable, "-m", "offramp", "serve", arguments.model, "--dtype", arguments.dtype, "--port", "0",
        "--engine", arguments.engine, "--rows", str(arguments.rows), "--max-waiting", str(arguments.waiting),
    ]  # fmt: skip
    command += ["--policy", str(arguments.policy)] if arguments.policy else []
    command += ["--exits", arguments.exits] if arguments.exits else []
    command += more
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            if line.startswith("serving "):
                yield line.split()[-1], process
                return
        raise SystemExit("the server did not start")
    finally:
        if (ended := process.poll()) is not None:
            sys.stderr.write(f"the server ended by itself, with status {ended}\n")
        process.terminate()
        rest = process.communicate(timeout=60)[1]
        sys.stderr.write(rest)


def memory(process):
    """Resident bytes of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def client(address, retries=0):
    """Asks a server."""
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=retries, timeout=300)


# ---------------------------------------------------------------- timing


CONTENT, USAGE = re.compile(rb'"content": ?"[^"]'), re.compile(rb'"usage": ?{')
"""In lines of a stream that have text, and in the one with the numbers of tokens."""
NUMBERS = itertools.count(random.randrange(10**6, 10**7), 7919)
"""Of prompts, none twice."""


def messages(kind, question):
    """A prompt of a kind of `PROMPTS`."""
    number = str(next(NUMBERS))[::-1]  # what changes comes first
    system, user = PROMPTS[kind](number, question)
    asked = [{"role": "user", "content": user}]
    return asked if system is None else [{"role": "system", "content": system}, *asked]


async def timed(address, questions, kind, clients, seconds):
    """Tokens per second of so many clients, and how long they waited for first tokens: all, and the shorter half.

    They look at lines, not at what stands in them: the time they take is the server's. They come one after another, and
    nothing counts before all are there, or tokens that come when some have ended; a line has one token, or more where a
    sign needs them.
    """
    first, short, tokens, read, known, model = [], [], 0, 0, 0, model_at(address)
    limit = statistics.median(len(prompt) for prompt, _, _ in questions)
    begin = time.perf_counter() + WARM
    end = begin + seconds

    async def one(draw, late):
        nonlocal tokens, read, known
        await asyncio.sleep(late)
        while time.perf_counter() < end:
            prompt, _, _ = draw.choice(questions)
            body = {
                "model": model, "messages": messages(kind, prompt), "max_tokens": TOKENS, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            began, usage, lines, within = time.perf_counter(), None, 0, 0
            reader, writer = await connected(address, posted(json.dumps(body).encode(), path="/v1/chat/completions"))
            while line := await reader.readline():
                if CONTENT.search(line):
                    now = time.perf_counter()
                    if not lines and began >= begin:
                        first.append(now - began)
                        short.extend(first[-1:] if len(prompt) <= limit else [])
                    lines, within = lines + 1, within + (begin <= now < end)
                if USAGE.search(line):
                    usage = json.loads(line.removeprefix(b"data: "))["usage"]
            writer.close()
            if usage is None:
                continue  # llama.cpp's closes a connection now and then
            tokens += usage["completion_tokens"] * within / max(lines, 1)
            if began >= begin:
                read += usage["prompt_tokens"]
                known += usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)

    await asyncio.gather(*(one(random.Random(index), WARM * index / clients) for index in range(clients)))
    return {
        "prompts": kind, "clients": clients, "tokens_per_second": tokens / seconds, "answers": len(first),
        "prompt_tokens": read / len(first), "cached_tokens": known / len(first),
        "first_token_median": statistics.median(first), "first_token_p99": p99(first),
        "short_first_token_median": statistics.median(short), "short_first_token_p99": p99(short),
    }  # fmt: skip


def p99(times):
    """About the largest of a hundred."""
    return sorted(times)[int(0.99 * (len(times) - 1))]


MODELS = {}


def model_at(address):
    """The name of the model there."""
    if address not in MODELS:
        MODELS[address] = openai.OpenAI(base_url=f"{address}/v1", api_key="none").models.list().data[0].id
    return MODELS[address]


# ---------------------------------------------------------------- kinds of clients


async def good(address, questions, draw, count):
    """Asks, and compares the answer with the one that was given alone."""
    prompt, options, text = draw.choice(questions)
    common = {
        "model": model_at(address), "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS,
        **options,
    }  # fmt: skip
    async with client(address) as ask:
        try:
            if draw.random() < 0.5:
                got = (await ask.chat.completions.create(**common)).choices[0].message.content
            else:
                stream = await ask.chat.completions.create(**common, stream=True)
                got = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        except openai.RateLimitError:
            count["good, told to wait"] += 1
            await asyncio.sleep(0.5 + draw.random())
            return
        except openai.APIError as error:
            count[f"good, error: {error}"[:120]] += 1
            return
    kind = "greedy" if options.get("temperature") == 0 else "sampled"
    count[f"good, {kind}, {'as alone' if got == text else 'NOT as alone'}"] += 1


async def connected(address, data):
    """A connection over which bytes were sent as they are."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    return reader, writer


def posted(body, length=None, path="/v1/completions"):
    """The bytes of a request, which may say that it has more."""
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


async def slow(address, questions, draw, count):
    """Reads a stream a little at a time."""
    body = json.dumps({"prompt": draw.choice(questions)[0], "max_tokens": TOKENS, "stream": True}).encode()
    reader, writer = await connected(address, posted(body))
    size = 0
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(256):
            size += len(piece)
            await asyncio.sleep(0.05)
    writer.close()
    count["slow"] += 1


async def broken(address, questions, draw, count):
    """Leaves in the middle: of its request, of the wait, or of the answer."""
    body = json.dumps({
        "prompt": draw.choice(questions)[0], "max_tokens": 400, "stream": draw.random() < 0.5,
    }).encode()  # fmt: skip
    whole = draw.random() < 0.7
    reader, writer = await connected(address, posted(body) if whole else posted(body[:20], len(body)))
    with contextlib.suppress(TimeoutError, ConnectionError):
        await asyncio.wait_for(reader.read(200), draw.random())
    await asyncio.sleep(draw.random())
    writer.close()
    count["broken"] += 1


async def hostile(address, questions, draw, count):
    """Sends what is no request; the answer must be an error of the interface's form, and no server's failure."""
    reader, writer = await connected(address, posted(draw.choice(BODIES)))
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split()[1].decode() if head else "closed"
    with contextlib.suppress(ValueError):
        if status != "closed" and "error" not in json.loads(body):
            status = f"{status} without an error"
    count[f"hostile, {status}"] += 1
    await asyncio.sleep(0.2 * draw.random())


KINDS = {"good": good, "slow": slow, "broken": broken, "hostile": hostile}


async def soaked(address, process, questions, clients, seconds):
    """What all kinds of clients got, and the server's memory in the meantime."""
    count, end, used = Counter(), time.monotonic() + seconds, []

    async def one(kind, draw):
        while time.monotonic() < end:
            await KINDS[kind](address, questions, draw, count)

    async def watched():
        while time.monotonic() < end:
            used.append(memory(process))
            await asyncio.sleep(1)

    pattern = [kind for kind, share in CLIENTS.items() for _ in range(share)]
    kinds = [pattern[index % len(pattern)] for index in range(clients)]
    await asyncio.gather(watched(), *(one(kind, random.Random(index)) for index, kind in enumerate(kinds)))
    early, late = used[len(used) // 5 : 2 * len(used) // 5] or used, used[-max(len(used) // 5, 1) :]
    return {
        "counts": dict(sorted(count.items())), "memory_early": statistics.median(early),
        "memory_late": statistics.median(late), "memory_most": max(used),
    }  # fmt: skip


async def timings(arguments, questions, address, plain):
    """Of all servers in turns."""
    places = {"offramp": address, "nothing kept": plain}
    places |= {"other": arguments.llama_server} if arguments.llama_server else {}
    made = []
    for kind, clients, _ in itertools.product(arguments.prompts.split(","), (1, 8), range(arguments.rounds)):
        for name, place in places.items():
            made.append(found := {"server": name, **await timed(place, questions, kind, clients, arguments.timing)})
            first = f"{found['first_token_median']:.3f} s (p99 {found['first_token_p99']:.3f})"
            first += f", of short prompts {found['short_first_token_median']:.3f} s"
            first += f" (p99 {found['short_first_token_p99']:.3f})"
            print(
                f"{kind}, {name}, {clients} client(s): {found['tokens_per_second']:.1f} tokens/s, first token after "
                f"{first}, {found['answers']} answers, {found['cached_tokens']:.0f} of "
                f"{found['prompt_tokens']:.0f} tokens of a prompt known", flush=True,
            )  # fmt: skip
    return made


async def run(arguments, questions, address, process):
    """Timings, then all kinds of clients."""
    result = {"schema": "offramp/soak/2", "model": arguments.model, "dtype": arguments.dtype, "timed": []}
    if arguments.timing:
        with server(arguments, "--keep", "0") as (plain, _):
            result["timed"] = await timings(arguments, questions, address, plain)
    if not arguments.seconds:
        return {**result, "counts": {}}
    result |= await soaked(address, process, questions, arguments.clients, arguments.seconds)
    for what, times in result["counts"].items():
        print(f"{times:7d}  {what}")
    early, late, most = (result[f"memory_{when}"] / 2**20 for when in ("early", "late", "most"))
    print(f"memory of the server: {early:.0f} MiB early, {late:.0f} MiB late, {most:.0f} MiB at most")
    return result


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--exits")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--timing", type=float, default=20, help="seconds of each timing; 0: none")
    parser.add_argument("--prompts", default="template,again", help=f"of these kinds: {', '.join(PROMPTS)}")
    parser.add_argument("--rounds", type=int, default=2, help="timings of each kind, in turns")
    parser.add_argument("--llama-server", metavar="URL", help="another server to time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    questions = alone(arguments) if arguments.seconds else [(prompt, {}, "") for prompt, _ in asked()]
    with server(arguments) as (address, process):
        result = asyncio.run(run(arguments, questions, address, process))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    bad = [what for what in result["counts"] if "NOT as alone" in what or "good, error" in what or "hostile, 5" in what]
    sys.exit(f"not as it should be: {'; '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
