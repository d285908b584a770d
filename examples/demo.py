"""The main job, end to end, on a small pretrained model: answers side by side, timed, and what is promised of them.

Run with `make demo`. Takes under five minutes on two cores; a page with the certificate goes to runs/demo.
"""

import itertools
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import offramp
from offramp import ExitPolicy
from offramp.calibration import Calibration, Grid, Promise, calibrate
from offramp.core.policy import DRAFTS
from offramp.metrics.intervals import Bootstrap, Interval
from offramp.report.html import report
from offramp.runs.machine import describe
from offramp.runs.progress import progress
from offramp.tasks import TASKS, Example

FOLDER = Path("runs/demo")
SUBJECTS = (
    "a candle", "a castle", "a comet", "a desert", "a forest", "a glacier", "a kettle", "a lighthouse", "a museum",
    "a pencil", "a river", "a telescope",
)  # fmt: skip
FORMS = ("What is {}?", "What is {} good for?", "Tell me one interesting thing about {}.")
TIMED = [form.format(subject) for subject, form in zip(SUBJECTS, itertools.cycle(FORMS))]
"""Other prompts than those on whose answers the bundled drafter was trained."""
CAPITALS = """
Afghanistan: Kabul, Albania: Tirana, Algeria: Algiers, Angola: Luanda, Argentina: Buenos Aires, Armenia: Yerevan,
Australia: Canberra, Austria: Vienna, Azerbaijan: Baku, Bangladesh: Dhaka, Belarus: Minsk, Belgium: Brussels,
Bhutan: Thimphu, Bolivia: Sucre, Botswana: Gaborone, Brazil: Brasília, Bulgaria: Sofia, Cambodia: Phnom Penh,
Cameroon: Yaoundé, Canada: Ottawa, Chad: N'Djamena, Chile: Santiago, China: Beijing, Colombia: Bogotá, Croatia:
Zagreb, Cuba: Havana, Cyprus: Nicosia, Denmark: Copenhagen, Ecuador: Quito, Egypt: Cairo, Eritrea: Asmara, Estonia:
Tallinn, Ethiopia: Addis Ababa, Fiji: Suva, Finland: Helsinki, France: Paris, Gabon: Libreville, Georgia: Tbilisi,
Germany: Berlin, Ghana: Accra, Greece: Athens, Haiti: Port-au-Prince, Honduras: Tegucigalpa, Hungary: Budapest,
Iceland: Reykjavik, India: New Delhi, Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad, Ireland: Dublin, Italy: Rome,
Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, Kenya: Nairobi, Kuwait: Kuwait City, Laos: Vientiane, Latvia: Riga,
Lebanon: Beirut, Liberia: Monrovia, Libya: Tripoli, Lithuania: Vilnius, Madagascar: Antananarivo, Malawi: Lilongwe,
Malaysia: Kuala Lumpur, Mali: Bamako, Malta: Valletta, Mauritania: Nouakchott, Mexico: Mexico City, Moldova:
Chisinau, Mongolia: Ulaanbaatar, Morocco: Rabat, Mozambique: Maputo, Namibia: Windhoek, Nepal: Kathmandu, Nicaragua:
Managua, Niger: Niamey, Nigeria: Abuja, Norway: Oslo, Oman: Muscat, Pakistan: Islamabad, Panama: Panama City,
Paraguay: Asunción, Poland: Warsaw, Portugal: Lisbon, Qatar: Doha, Romania: Bucharest, Russia: Moscow, Rwanda:
Kigali, Senegal: Dakar, Serbia: Belgrade, Singapore: Singapore, Slovakia: Bratislava, Slovenia: Ljubljana, Somalia:
Mogadishu, Spain: Madrid, Sudan: Khartoum, Sweden: Stockholm, Switzerland: Bern, Syria: Damascus, Thailand: Bangkok,
Togo: Lomé, Tunisia: Tunis, Turkey: Ankara, Uganda: Kampala, Ukraine: Kyiv, Uruguay: Montevideo, Venezuela: Caracas,
Vietnam: Hanoi, Yemen: Sanaa, Zambia: Lusaka, Zimbabwe: Harare
"""
PAIRS = CAPITALS.replace("\n", " ").strip().split(", ")
CAPITAL = "What is the capital of {}?"
SHOWN = CAPITAL.format("Peru")
"""Not among those that anything is chosen or certified by."""
PROMISE = Promise("exact_match", tolerance=0.15, failure=0.1)
"""Chosen after trials on these questions; fix your own before you look, or certify on others than you looked at."""
TOKENS, ROUNDS = 48, 3
TRANSFORMERS, FULL, DRAFTED, FOUR = "transformers", "full depth", "drafts, checked", "four bits"
Way = Callable[[str], str]
"""From a question to an answer."""


def main() -> None:
    """Ask, time, certify, and say in two sentences what was gained and what is promised."""
    began = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)  # all seconds are of this run, none of an earlier one
    lm, small = (offramp.load("smollm2", dtype=dtype, exits="bundled") for dtype in ("bfloat16", "int4"))
    machine = "{device}, {instructions}, {threads} threads".format(**describe(lm.model.device))
    ways: dict[str, Way] = {
        TRANSFORMERS: lambda question: reference(lm, question),
        FULL: lambda question: text(lm, question, None),
        DRAFTED: lambda question: text(lm, question, DRAFTS),
        FOUR: lambda question: text(small, question, None),
    }

    say(f"1. {SHOWN!r}, answered four ways on this machine ({machine}); the shortest of {ROUNDS} each")
    ask(SHOWN, ways)
    print(
        f"The last three are our kernels. This model's package has {FOUR} for all but its head, which are read as they "
        "are; the head has eight, and so has what both multiply. One question is luck; and may that be trusted? So:"
    )

    say(f"2. {len(TIMED)} other questions with longer answers, at full depth and with drafts, in turns")
    gained = beside_full_depth(ways)
    print(gained)

    say(f"3. {len(PAIRS)} other capitals: what do four bits instead of sixteen lose, with drafts or without?")
    certified = promised(small, lm)
    print(certified.certificate.words())

    say("What was gained, and what is promised")
    print(f"{gained}\n{kept(certified)}")
    page = report([FOLDER / "calibrate"], FOLDER / "report.html")
    print(f"\n{time.perf_counter() - began:.0f} s in all. The certificate as a page: {page}")


def say(title: str) -> None:
    """A heading."""
    print(f"\n== {title}\n", flush=True)


def text(lm: offramp.LanguageModel, question: str, policy: ExitPolicy | None) -> str:
    """An answer by one of ours."""
    return lm.generate(question, policy=policy, max_new_tokens=TOKENS, chat=True).texts[0]


def reference(lm: offramp.LanguageModel, question: str) -> str:
    """The answer by transformers alone."""
    inputs = lm.encode([question], chat=True)
    ids = lm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return lm.decode(ids[:, inputs["input_ids"].shape[1] :].tolist())[0]


def timed(way: Way, question: str) -> tuple[float, str]:
    """Seconds of a whole answer, its question included, and the answer."""
    began = time.perf_counter()
    answer = way(question)
    return time.perf_counter() - began, answer


def ask(question: str, ways: dict[str, Way]) -> None:
    """Print each way's answer as it comes, with the shortest of its seconds."""
    first = None
    for name, way in ways.items():
        runs = [timed(way, question) for _ in range(ROUNDS)]
        seconds, answer = min(runs)
        share = "" if first is None else f", {seconds / first:.2f} of {TRANSFORMERS}'"
        first = first or seconds
        print(f"{name} ({seconds:.2f} s{share}):\n  {' '.join(answer.split())}\n", flush=True)


def beside_full_depth(ways: dict[str, Way]) -> str:
    """What drafts gain on the timed questions; a gain is only said where the interval holds nothing else."""
    rows, same = [], 0
    with progress("timing") as update:
        for done, question in enumerate(TIMED):
            update(done, len(TIMED), question)
            runs = [[timed(ways[name], question) for name in (FULL, DRAFTED)] for _ in range(ROUNDS)]
            rows.append([min(run[at][0] for run in runs) for at in (0, 1)])
            same += runs[0][0][1] == runs[0][1][1]
    full, drafted = zip(*rows, strict=True)
    share = Bootstrap(TIMED).ratio(drafted, full)
    found = f"{worded(share)} of full depth, for {len(TIMED)} whole answers of up to {TOKENS} tokens"
    return (
        f"{verdict(share)}: drafts took {found}. Promised, since full depth checks every token: its very text, which "
        f"came {same} of {len(TIMED)} times."
    )


def worded(share: Interval) -> str:
    """A share of seconds with its interval."""
    return f"{share.value:.2f} (95 % interval over questions: {share.low:.2f} to {share.high:.2f}) of the seconds"


def verdict(share: Interval) -> str:
    """Whether time was saved."""
    if share.high < 1:
        return "Gained"
    return "Lost" if share.low > 1 else "No gain shown"


def promised(small: offramp.LanguageModel, lm: offramp.LanguageModel) -> Calibration:
    """The cheapest way in four bits that is shown to keep the promise, if any is."""
    task = replace(TASKS["prompts"], metrics=("exact_match",))
    examples = [
        Example(country, CAPITAL.format(country), (f"The capital of {country} is {city}.", city), country)
        for country, city in (pair.split(": ") for pair in PAIRS)
    ]
    every = replace(DRAFTS, confidence="max", threshold=0.0)  # the same drafts, in words that a grid can vary
    with progress("calibrating") as update:
        return calibrate(
            small, task, examples, every, PROMISE, FOLDER / "calibrate", reference=lm, max_new_tokens=TOKENS,
            grid=Grid(thresholds=(0.0,), accepts=(1.0,), static_layers=()), order="path", tuning=0.15,
            minimise="seconds-per-token", progress=update,
        )  # fmt: skip


def kept(certified: Calibration) -> str:
    """What the certified way gained on questions that it was not chosen by, and what is promised of it."""
    certificate, seconds = certified.certificate, certified.seconds
    if not certificate.certified or seconds is None:
        return f"Four bits: {certificate.finding()}."
    how = "with drafts" if certified.policy.skipped == "verify" else "at full depth, so without any exit,"
    share = Interval(**seconds["seconds_ratio"])
    right = certificate.room["mean"]
    return (
        f"{verdict(share)}: four bits {how} took {worded(share)} of full depth in sixteen, for capitals without "
        f"part in the choice. Promised: of such questions, at most {PROMISE.tolerance:.0%} are answered rightly in "
        f"sixteen bits ({right:.0%} are, to the letter) but wrongly in four. That holds with probability "
        f"{1 - PROMISE.failure:g} over the draw of the {certificate.n} capitals it was certified with, had the "
        "tolerance and bound been chosen before any look at them: for this demonstration they were chosen after "
        "trials. On your questions choose them first. Of other questions it says nothing."
    )


if __name__ == "__main__":
    sys.exit(main())
