"""Practice texts, seeded, for what books of 1860-1920 lack: digits, turns.

A real Gemma 2 has read numbers in digits and words, JSON, and text that says
things twice; a few million tokens of old novels hold almost none of it, and a
model of them cannot copy a number from its prompt. These exercises are a fifth
of the embedded model's pre-training text, and the whole of a short second
stage in Gemma's turns, without which `<end_of_turn>` is a piece that the model
never saw. They share no sentence and no record layout with the demo task; the
names of its fields are among the words here, as a real Gemma knows them too.

    python -m keras_gemma_ft.embedded.practice --output=runs/practice.jsonl
    python -m keras_gemma_ft.embedded.practice --turns --output=runs/turns.jsonl
"""

import argparse
import json
import pathlib
import random

from keras_gemma_ft.embedded import sentences

COUNT = 18_000
_NAMES = (
    "Alice Arthur Bella Charles Clara Daniel Dora Edward Ellen Emma Frank "
    "George Grace Hannah Harry Helen Henry Ida Jack James Jane John Kate Laura "
    "Lucy Mary Martin Nora Oliver Paul Peter Rose Ruth Sarah Simon Susan "
    "Thomas Walter William Philip Agnes Hugh Maud Stephen Robert"
).split()
_WORDS = (
    "apple river stone window garden candle silver horse bread winter letter "
    "music forest butter ladder pepper basket copper flower bottle carpet "
    "hammer island jacket kettle lemon mirror needle orange pencil rabbit "
    "saddle table umbrella violet wagon yellow blanket cellar dinner engine "
    "feather glass honey iron jewel kitchen lamp milk nursery office parlour "
    "radio sugar tea upstairs vanilla water bedroom hall study purple blue "
    "green red white amber pink warm cold soft loud jazz piano rain soup rice"
).split()
_PLACES = (
    "London Bath York Paris Dover Oxford Rome Boston Vienna Dublin Leeds "
    "Bristol Salem Concord Lisbon Berlin Geneva Florence"
).split()
_THINGS = (
    "book clock chair coat hat knife ring rope sack spoon stool box drum cup "
    "boot bell map nail pipe plate brush comb barrel bucket"
).split()
_KINDS = "cat dog horse cow goat duck hen pig owl hare".split()


def _number(rng):
    """A whole number, small ones more often."""
    return rng.randint(1, rng.choice((12, 60, 100, 100, 300)))


def _said(n, rng):
    """The number in words or in digits."""
    if rng.random() < 0.3:
        return str(n)
    return sentences.number_words(n, rng)


def _counts(rng):
    numbers = [_number(rng) for _ in range(rng.randint(3, 8))]
    form = rng.choice(("{} is {}.", "{}: {}.", "{} we write {}.", "{}, {};"))
    pairs = [(sentences.number_words(n, rng), n) for n in numbers]
    if rng.random() < 0.3:
        return " ".join(form.format(n, words) for words, n in pairs)
    return " ".join(form.format(words, n) for words, n in pairs)


def _repeats(rng):
    pool = rng.choice((_WORDS, _NAMES, _PLACES, _THINGS))
    words = rng.choices(pool, k=rng.randint(2, 9))
    if rng.random() < 0.5:
        at = rng.randrange(len(words))
        words[at] = str(_number(rng))
    joint = rng.choice((" ", ", ", " and ", "; ", "-"))
    line = joint.join(words)
    times = rng.randint(2, 4)
    return rng.choice((" | ", ".\n", " = ", ". Again: ")).join([line] * times)


def _record(rng, facts):
    """A sentence about `facts`, then the same as JSON."""
    sentence, record = facts
    gap = rng.choice((" ", "\n", " -> ", " As a record: ", "\n= "))
    text = json.dumps(record, separators=(",", ":"))
    return sentence + gap + text


def _person(rng):
    n, name, place = _number(rng), rng.choice(_NAMES), rng.choice(_PLACES)
    said = _said(n, rng)
    sentence = rng.choice(
        (
            f"{name} of {place} is {said} years old.",
            f"In {place} lives {name}, aged {said}.",
            f"{name}, {said}, comes from {place}.",
        )
    )
    return sentence, {"name": name, "age": n, "town": place}


def _sale(rng):
    n, price = _number(rng), _number(rng)
    thing, name = rng.choice(_THINGS), rng.choice(_NAMES)
    sentence = rng.choice(
        (
            f"{name} sold {_said(n, rng)} of the {thing} kind for "
            f"{_said(price, rng)} pence.",
            f"For {_said(price, rng)} pence {name} gave away "
            f"{_said(n, rng)}, each a {thing}.",
            f"One {thing}, {_said(price, rng)} pence; {name} took "
            f"{_said(n, rng)}.",
        )
    )
    return sentence, {"thing": thing, "count": n, "pence": price, "by": name}


def _animal(rng):
    n, kind, word = _number(rng), rng.choice(_KINDS), rng.choice(_WORDS)
    good = rng.choice((True, False))
    sentence = rng.choice(
        (
            f"The {kind} called {word} weighs {_said(n, rng)} pounds and is "
            f"{'tame' if good else 'wild'}.",
            f"A {'tame' if good else 'wild'} {kind}, {_said(n, rng)} pounds, "
            f"answers to {word}.",
        )
    )
    return sentence, {"kind": kind, "called": word, "lb": n, "tame": good}


def _page(rng):
    word, n, two = rng.choice(_WORDS), _number(rng), rng.choice(_WORDS)
    sentence = rng.choice(
        (
            f"Look for {word} {two} on page {_said(n, rng)}.",
            f"Page {_said(n, rng)} tells of {word} {two}.",
            f"On the {_said(n, rng)} page: {word} {two}.",
        )
    )
    return sentence, {"find": f"{word} {two}", "page": n}


def _records(rng):
    make = rng.choice((_person, _sale, _animal, _page))
    return "\n".join(_record(rng, make(rng)) for _ in range(rng.randint(1, 4)))


# Names of a record's fields, in any mixture.
_KEYS = (
    "item quantity unit room device state minutes label colour percent degrees "
    "mode title artist intent shopping timer light music volume heating oven "
    "switch name price size owner street number letter weight date kind page"
).split()


def _fields(rng):
    """A request to write named values as JSON, and the JSON."""
    keys = rng.sample(_KEYS, rng.randint(2, 5))
    record = {
        key: _number(rng)
        if rng.random() < 0.5
        else " ".join(rng.choices(_WORDS, k=rng.randint(1, 2)))
        for key in keys
    }
    shown = list(record.items())
    rng.shuffle(shown)
    form = rng.choice(("{} is {}", "{}: {}", "{} = {}", "{} {}"))
    parts = [
        form.format(key, _said(v, rng) if isinstance(v, int) else v)
        for key, v in shown
    ]
    order = "/".join(record)
    request = rng.choice(("Write", "Note as JSON", "Record", "Fields"))
    text = f"{request} {order}. {rng.choice((', ', '; ')).join(parts)}"
    return text, json.dumps(record, separators=(",", ":"))


def _figures(rng):
    n = _number(rng)
    words = sentences.number_words(n, rng)
    form = rng.choice(("{} in digits?", "Digits for {}", "What is {}?"))
    return form.format(words), str(n)


def _echo(rng):
    words = rng.choices(_WORDS + _NAMES, k=rng.randint(1, 6))
    words[rng.randrange(len(words))] = str(_number(rng))
    line = " ".join(words)
    form = rng.choice(("Repeat: {}", "Say {}", "{} - again!"))
    return form.format(line), line


def _described(rng):
    sentence, record = rng.choice((_person, _sale, _animal, _page))(rng)
    return sentence, json.dumps(record, separators=(",", ":"))


def turns(count=16_000, seed=1):
    """Yields `count` {"prompt", "response"} exercises."""
    rng = random.Random(seed)
    kinds = (_fields, _fields, _figures, _echo, _described)
    for _ in range(count):
        prompt, response = rng.choice(kinds)(rng)
        yield {"prompt": prompt, "response": response}


def documents(count=COUNT, seed=0):
    """Yields `count` exercise texts, each a document."""
    rng = random.Random(seed)
    kinds = (_counts, _repeats, _records, _records)
    for _ in range(count):
        yield rng.choice(kinds)(rng)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--turns", action="store_true")
    args = parser.parse_args()
    records = turns() if args.turns else ({"text": t} for t in documents())
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    pathlib.Path(args.output).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
