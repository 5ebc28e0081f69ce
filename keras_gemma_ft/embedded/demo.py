"""The embedded task: what is said at home -> one strict JSON command.

    python -m keras_gemma_ft.embedded.demo      rewrites both files, the same
                                                to the byte

    "could you set the lights in the hall to warm white, thirty percent"
    {"intent":"light","room":"hallway","colour":"warm white","percent":30}

It is the job that a small model is tuned for in earnest: free wording in, a
command that a program reads out. An untuned model never gets one right, a
tuned one is right or wrong to the character, so exact match measures it.

How it is made: eight intents, each a few slots with a closed set of values
(`sentences.py`). A combination of values is drawn, a sentence pattern put
around it, politeness or chatter around that, and the whole is written as a
person types or as a speech recogniser hears (lower case, no punctuation).
What a lookup cannot do:

- numbers come in digits or in words ("180", "a hundred and eighty", "one
  eighty"), with or without their unit, or as an idiom ("half an hour", "a
  dozen"), and must be copied into digits;
- some slots may be absent, and their key is absent then;
- rooms and devices have second names ("lounge" is `living room`);
- each combination of slot values in the held-out split is one that training
  never shows, though training shows each value with others at least
  `LEAST_SEEN` times. So no held-out request can be in the training split;
  `records` checks that too, with case, punctuation and politeness taken off.

JSON has no spaces, numbers no quotes, and keys the order of the intent's
slots. The sentences are our own; nothing is taken from a dataset.
"""

import collections
import itertools
import json
import random
import re

from keras_gemma_ft import embedded
from keras_gemma_ft.embedded import sentences

SEED = 20240627

# The fewest training rows in which a value of a slot must occur.
LEAST_SEEN = 6

_OPENINGS = ("", "", "", "hey, ", "OK, ", "hi there, ", "my hands are full, ")
_ASKS = ("", "", "please ", "could you ", "can you ", "would you ")
_CLOSINGS = ("", "", "", ", please", ", thanks", ", thank you", " now")


def records(seed=SEED):
    """Makes the task.

    Returns:
        `{"train": [...], "eval": [...]}` of `{"prompt", "response"}` records,
        the same for the same seed.
    """
    splits = {"train": [], "eval": []}
    taken = set()
    for name, intent in sentences.INTENTS.items():
        rng = random.Random(f"{seed} {name}")
        shown, held_out = intent.rows
        combinations = _spread(intent.combinations(), rng)
        splits["eval"] += _draw(
            name, combinations[:held_out], held_out, taken, rng
        )
        splits["train"] += _draw(
            name, combinations[held_out:], shown, taken, rng
        )
    for rows in splits.values():
        random.Random(seed).shuffle(rows)
    _check(splits["train"], splits["eval"])
    return splits


def normalize(request):
    """A request without case, punctuation and politeness, to compare by."""
    words = _bare(request)
    around = {_bare(p) for p in _OPENINGS + _ASKS + _CLOSINGS} - {""}
    # The longest first: "thank you" before "thank".
    either = "|".join(sorted(around, key=lambda p: (-len(p), p)))
    words = re.sub(rf"^(({either}) )+", "", words)
    return re.sub(rf"( ({either}))+$", "", words)


def _bare(text):
    return re.sub(r"[^a-z0-9%]+", " ", text.lower()).strip()


def _request(intent, slots, rng):
    """One way to say `slots`: pattern, politeness, and how it is written."""
    orders, remarks = intent.patterns(slots)
    pattern = rng.choice(orders + remarks)
    fields = re.findall(r"{(\w+)}", pattern)
    said = pattern.format(**{f: sentences.say(f, slots, rng) for f in fields})
    ask = rng.choice(_ASKS) if pattern in orders else ""
    closing = rng.choice(_CLOSINGS)
    if "please" in ask and "please" in closing:
        closing = ""
    text = rng.choice(_OPENINGS) + ask + said + closing
    if rng.random() < 0.35:  # As a speech recogniser writes it.
        return re.sub(r"[,:]", "", text.lower())
    end = "?" if ask.endswith("you ") else rng.choice((".", "", "!"))
    return text[0].upper() + text[1:] + end


def _spread(combinations, rng):
    """Shuffles so that any first part shows each value about equally often.

    "Each value" is of the slot that has most: a value's first combination
    comes before any value's second.
    """
    rng.shuffle(combinations)
    values = collections.defaultdict(set)
    for slots in combinations:
        for name, value in slots.items():
            values[name].add(value)
    widest = max(values, key=lambda name: (len(values[name]), name))
    seen = collections.Counter()
    turns = []
    for slots in combinations:
        seen[slots.get(widest)] += 1
        turns.append(seen[slots.get(widest)])
    order = sorted(range(len(combinations)), key=turns.__getitem__)
    return [combinations[i] for i in order]


def _draw(name, combinations, count, taken, rng):
    """`count` records that go round the combinations, no request twice."""
    rows = []
    for slots in itertools.cycle(combinations):
        if len(rows) == count:
            return rows
        request = _request(sentences.INTENTS[name], slots, rng)
        if normalize(request) in taken:
            continue
        taken.add(normalize(request))
        answer = {"intent": name, **slots}
        response = json.dumps(answer, separators=(",", ":"))
        rows.append({"prompt": request, "response": response})


def _check(shown, held_out):
    """Nothing held out was shown, and each value was shown often enough."""
    both = {r["response"] for r in shown} & {r["response"] for r in held_out}
    assert not both, f"combinations in both splits: {sorted(both)}"
    both = {normalize(r["prompt"]) for r in shown} & {
        normalize(r["prompt"]) for r in held_out
    }
    assert not both, f"requests in both splits: {sorted(both)}"
    seen = collections.Counter(itertools.chain(*map(_values, shown)))
    needed = set(itertools.chain(*map(_values, held_out))) | set(seen)
    rare = {v: seen[v] for v in needed if seen[v] < LEAST_SEEN}
    assert not rare, f"shown fewer than {LEAST_SEEN} times: {rare}"


def _values(row):
    """The `(intent, slot, value)` of a record."""
    answer = json.loads(row["response"])
    return [(answer["intent"], *pair) for pair in answer.items()]


def to_jsonl(rows):
    """Records as `bytes`: UTF-8, one JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return "".join(lines).encode("utf-8")


def main():
    """Rewrites `demo_train.jsonl` and `demo_eval.jsonl` in this folder."""
    for split, rows in records().items():
        path = embedded.demo_file(split)
        path.write_bytes(to_jsonl(rows))
        print(f"{path.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
