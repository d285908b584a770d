"""What a certificate says, in words: the statement, what it rests on, what was found, and what it holds for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offramp.calibration.grid import FULL_DEPTH
from offramp.calibration.promise import MEASURES, Room, is_timed
from offramp.risk import CRC

if TYPE_CHECKING:
    from offramp.calibration.evidence import Account

PROMPTS_ALONE = "prompts or lengths save, exits do not"
COSTS_MORE = "THE POLICY COSTS MORE than the full model, which loses nothing: use that"
UNSURE = "whether it costs less than the full model is not sure, by what these prompts show"
NEVER_EXIT = "the certified policy is: never exit"


def words(c: Account) -> str:
    """The statement in plain English, and what it rests on."""
    room = [] if c.room is None else [Room(**c.room).words(c.promise)]
    if c.certified:
        return " ".join([_statement(c), _search(c), _found(c), *room, _scope(c)])
    if c.room is not None and not Room(**c.room).suffices(c.promise):
        why = Room(**c.room).refusal(c.promise)
        return f"{_refused(c)} The promise would say nothing. {why}"
    if c.pays_nothing:
        found = finding(c)
        return " ".join([f"{found[0].upper()}{found[1:]}.", _search(c), *room])
    return " ".join([_refused(c), _nothing(c), _search(c), *room])


def finding(c: Account) -> str:
    """What was found, in one sentence without its full stop."""
    cost = MEASURES[c.minimise or "flops"]
    if c.selected is not None:
        chosen = c.tests[c.selected]
        others = sum(test["passed"] for test in c.tests) - 1
        more = f", the cheapest of {others + 1} that keep the promise" if others else ""
        return f"the certified policy is: {chosen['name']}, at {_cost(c, chosen)} of the full model's {cost}{more}"
    if c.other_format:
        tried = f"nothing that was tried in {c.conditions['dtype']}, full depth included,"
        return f"{tried} " + ("costs less than the full model" if c.pays_nothing else "is shown to keep the promise")
    if not c.pays_nothing:
        return f"nothing that was tried is shown to keep the promise; {NEVER_EXIT}"
    passed = min((t for t in c.tests if t["passed"]), key=lambda t: t["cost"], default=None)
    best = "" if passed is None else f" (the cheapest that keeps the promise, {passed['name']}: {passed['cost']:.3f})"
    return f"nothing tried costs less than the full model in {cost}{best}; {NEVER_EXIT}"


def _cost(c: Account, chosen: dict[str, Any]) -> str:
    """What the chosen setting costs, with its interval where there is one."""
    if c.paid is None or c.paid["low"] is None:
        return f"{chosen['cost']:.3f}"
    part = "held-out" if "test" in c.estimates else "certification"
    return f"{c.paid['value']:.3f} ({c.paid['low']:.3f} to {c.paid['high']:.3f}, {part} prompts)"


def _refused(c: Account) -> str:
    p = c.promise
    wanted = f"mean loss at most {p.tolerance:g}" + ("" if p.bound == CRC else f", failure {p.failure:g}")
    which = f"still in {c.conditions['dtype']}: not the full model" if c.other_format else "which is the full model"
    return f"Nothing was certified ({wanted}): the policy never leaves early, {which}."


def _statement(c: Account) -> str:
    p = c.promise
    alone = c.selected is not None and c.tests[c.selected]["name"] == FULL_DEPTH
    means = [] if alone else ["by leaving early"]
    early = " and ".join([*means, f"by working in {c.conditions['dtype']}"] if c.other_format else means)
    mean = {
        "risk": f"lose at most {p.tolerance:g} of {p.metric} on average {early}, where a prompt that "
        "gains counts as one that loses nothing",
        "signed": f"lose at most {p.tolerance:g} of {p.metric} on average {early}, where prompts that "
        "gain make up for others that lose",
        "textual": f"get answers at most {p.tolerance:g} away from the full model's on average, where 1 - "
        f"{p.metric} of the two texts is their distance",
        "tail": f"lose more than {p.margin} of {p.metric} {early} with a probability of at most "
        f"{p.tolerance:g}, which says nothing about how much those lose",
    }[p.kind]
    who = "New prompts" if p.unit == "prompt" else "New groups of prompts, each counted once,"
    if p.bound == CRC:
        return (
            f"{who} {mean}: a guarantee on the mean over calibrations (conformal risk control). It has no failure "
            "probability, and a single calibration such as this one may exceed the tolerance."
        )
    return (
        f"{who} {mean}. This holds with probability at least {1 - p.failure:g} over the draw of the {c.n} "
        f"certification {p.unit}s, which must be independent and like the new ones."
    )


def _search(c: Account) -> str:
    several = f"sequences fixed in advance, each at level {c.level:.3g}"
    how = {
        "path": "a sequence fixed in advance" if c.level == c.promise.failure else several,
        "chains": several,
        "pareto": "a sequence found on other prompts, the tuning part",
    }[c.order]
    passed = sum(test["passed"] for test in c.tests)
    if not c.tests:
        return "On other prompts, the tuning part, none of the settings cost less than the full model."
    if len(c.tests) == 1:
        verdict = "passed" if passed else "did not pass"
        text = f"One setting was tested, {c.tests[0]['name']}, bound {c.promise.bound}; it {verdict}."
    else:
        text = f"{len(c.tests)} settings were tested in {how}, bound {c.promise.bound}; {passed} passed."
        if c.minimise is not None:
            text += f" The cheapest in {MEASURES[c.minimise]} was taken, never exiting among them."
    examples, groups = c.splits["certification"]
    if c.promise.unit == "prompt" and groups < examples:
        text += f" The {examples} prompts come from {groups} groups and were taken to be independent."
    return text


def limit_words(upper: float) -> str:
    """An upper limit of a mean loss; of gains it is 0 and the last step of its search, which says nothing."""
    return f"{max(upper, 1e-4):.3g}"


def _found(c: Account) -> str:
    part = "test" if "test" in c.estimates else "certification"
    seen = c.estimates[part]
    loss, flops = seen["loss"], seen["flops_ratio"]
    where = "held-out" if part == "test" else "certification (which it was chosen by)"
    sure = f" with confidence {1 - c.promise.failure:g}"
    limit = f", at most {limit_words(seen['upper'])}{sure}" if "upper" in seen else ""
    mean = "mean loss" if c.promise.unit == "prompt" else "mean of their groups' mean losses"
    text = f"On the {seen['examples']} {where} prompts the {mean} was {loss['value']:.3g}{limit}, at "
    text += f"{flops['value']:.3f} of the full model's FLOPs, prompts included"
    if flops["low"] is not None:
        text += f" ({flops['low']:.3f} to {flops['high']:.3f})"
    token, own = seen.get("flops_per_token_ratio"), seen.get("own_flops_per_token_ratio")
    if token is not None:
        text += f", and {token['value']:.3f} of its FLOPs per generated token, without encoder and prompt"
    if own is not None:
        text += f" ({own['value']:.3f} of what a token costs with the same shortened prompt and no exits)"
    if c.minimise is not None and is_timed(c.minimise) and c.selected is not None:
        if c.paid is not None and c.paid["low"] is not None:
            text += f"; at {c.paid['value']:.3f} of its {MEASURES[c.minimise]}, measured in turns "
            text += f"({c.paid['low']:.3f} to {c.paid['high']:.3f})"
        text += f"; on the tuning prompts, by which it was chosen, at {c.tests[c.selected]['cost']:.3f} of its "
        text += f"{MEASURES[c.minimise]}, measured in turns"
    return f"{text}: {against}." if (against := warning(c)) else f"{text}."


def warning(c: Account) -> str:
    """What speaks against the policy's cost on the held-out part; empty where nothing does."""
    if not c.certified:
        return ""
    seen = c.estimates.get("test", c.estimates["certification"])
    token = seen.get("flops_per_token_ratio")
    if seen["flops_ratio"]["value"] < 1 and token is not None and token["value"] >= 1:
        return PROMPTS_ALONE
    if not c.saves:
        return COSTS_MORE
    return "" if c.saving_is_sure else UNSURE


def _scope(c: Account) -> str:
    have = c.conditions
    exits = "without trained exits" if have["exits"] is None else f"with the exits {have['exits'][:12]}"
    tokens = have["settings"].get("max_new_tokens")
    return (
        f"It is about prompts on average, not about each, and only for {have['model']} (weights "
        f"{have['weights'][:12]}) in {have['dtype']} {exits}, {have['task']['name']}, answers of at most {tokens} "
        f"tokens, {have['batch_size']} at a time. Losses and costs are relative to {c.reference}."
    )


def _nothing(c: Account) -> str:
    """Which setting came nearest, what it fails by, and whether more prompts would help."""
    p, safest = c.promise, c.tests[0]
    lowest = min(test["loss"] for test in c.tests)
    if c.needed is None and lowest < p.tolerance:
        more = (
            f"The lowest mean loss, {lowest:.4g}, is so close to the tolerance that no reasonable number of "
            "prompts would tell them apart."
        )
    elif c.needed is None:
        more = (
            f"No number of prompts would change that: the mean loss of {safest['name']}, the safest that was "
            f"looked at, is {safest['loss']:.3g} (lowest of all: {lowest:.3g})."
        )
    else:
        stay = "losses stay as they are (lowest mean" if p.bound == "wsr" else "mean losses stay as they are (lowest"
        more = f"If {stay}: {lowest:.3g}), about {c.needed} certification {p.unit}s would be needed; there were {c.n}."
    return f"{_nearest(c)} {more}"


def _nearest(c: Account) -> str:
    p, test = c.promise, min(c.tests, key=lambda test: (test["p_value"], test["loss"]))
    loss, made = test["loss"], f"{test['p_value']:.3g}"
    side = "below" if loss < p.tolerance else "above"
    what = (
        f"the bound {p.bound} makes {made} of it, which has to be at most {p.tolerance:g}" if p.bound == CRC
        else f"the bound {p.bound} gives it a p-value of {made}, which has to be at most {c.level:.3g}"
    )  # fmt: skip
    joined = "but" if side == "below" else "and"
    return (
        f"Nearest came {test['name']}: its mean loss, {loss:.3g}, is {abs(p.tolerance - loss):.2g} {side} the "
        f"tolerance, {joined} {what}."
    )
