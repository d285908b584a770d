"""A peer that needs no engine: it continues counting from the last token of the prompt, or misbehaves as it is told."""

import json
import os
import signal
import sys
import time


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


settings = json.loads(sys.stdin.readline())
fault, after = settings.get("fault"), settings.get("after", 0)
if fault == "load":
    say(json.dumps({"error": "MemoryError: 9 GB"}))
    sys.exit()
if fault == "slow":
    time.sleep(60)
say(json.dumps({"versions": {"fake": "1.0", "tiles": str(settings.get("tiles"))}}))
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    last = asked["ids"][-1]
    said = {"tokens": [last + 1 + i for i in range(asked["new"])], "seconds": 0.5, "first": 0.125}
    if number >= after:
        if fault == "crash":
            sys.stderr.write("warming up\nthe engine broke\n")
            sys.exit(3)
        if fault == "tiles" and settings["tiles"]:
            os.kill(os.getpid(), signal.SIGILL)
        if fault == "hang":
            time.sleep(60)
        if fault == "text":
            say("loading 99%")
        if fault == "short":
            said["tokens"].pop()
        if fault == "other":
            said = {"token": 1}
        if fault == "error":
            said = {"error": "RuntimeError: no\nroom"}
    say(json.dumps(said))
