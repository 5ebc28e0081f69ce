"""What the embedded task says: eight intents, their values and sentences.

Only the words are here; `demo.py` draws from them. A pattern's `{field}` is
the value of the slot of that name, said in one of the ways `say` knows.
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Intent:
    """One command.

    Attributes:
        rows: `(training rows, held-out rows)`.
        slots: name -> values, in the order of the answer's keys. None among
            the values: the slot may be absent. A tuple of names shares a
            tuple of value tuples.
        orders: imperative sentences, which may follow "could you".
        remarks: sentences of any other form.
    """

    rows: tuple
    slots: dict
    orders: tuple
    remarks: tuple

    def combinations(self):
        """A list of every dict of slot values; absent slots have no key."""
        combinations = []
        for values in itertools.product(*self.slots.values()):
            slots = {}
            for name, value in zip(self.slots, values):
                if isinstance(name, tuple):
                    slots.update(zip(name, value))
                else:
                    slots[name] = value
            slots = {k: v for k, v in slots.items() if v is not None}
            # The items without a container are plurals: no "1 eggs".
            if slots.get("quantity") != 1 or "unit" in slots:
                combinations.append(slots)
        return combinations

    def patterns(self, slots):
        """`(orders, remarks)` that name the optional slots there are."""
        optional = [n for n, values in self.slots.items() if None in values]

        def fitting(patterns):
            return tuple(
                p
                for p in patterns
                if all((f"{{{n}}}" in p) == (n in slots) for n in optional)
            )

        return fitting(self.orders), fitting(self.remarks)


_ROOMS = (
    *("kitchen", "bedroom", "bathroom", "living room"),
    *("hallway", "garage", "office", "nursery"),
)
_SECOND_NAMES = {
    "living room": ("living room", "lounge", "sitting room"),
    "hallway": ("hallway", "hall"),
    "office": ("office", "study"),
    "tv": ("TV", "telly", "television"),
    "coffee machine": ("coffee machine", "coffee maker"),
    "air conditioner": ("air conditioner", "air con", "AC"),
    "bottom heat": ("bottom heat", "lower heat"),
}
# Items and their containers; an item without one is counted itself.
_CONTAINERS = {
    "milk": ("bottle", "carton"),
    "olive oil": ("bottle", "tin"),
    "water": ("bottle", "crate"),
    "orange juice": ("bottle", "carton"),
    "rice": ("bag", "packet"),
    "flour": ("bag", "packet"),
    "sugar": ("bag", "packet"),
    "coffee": ("bag", "jar"),
    "tea": ("packet", "box"),
    "pasta": ("packet", "box"),
    "honey": ("jar", "bottle"),
    "jam": ("jar", "tin"),
    "beans": ("tin", "bag"),
    "tuna": ("tin", "jar"),
    "soap": ("bar", "box"),
    "chocolate": ("bar", "box"),
    **dict.fromkeys(("eggs", "lemons", "onions", "apples"), (None,)),
    **dict.fromkeys(("tomatoes", "candles"), (None,)),
}
_PLURALS = {"box": "boxes"}

INTENTS = {
    "switch": Intent(
        rows=(300, 16),
        slots={
            "device": (
                *("fan", "lamp", "heater", "tv", "radio", "kettle"),
                *("coffee machine", "dishwasher", "humidifier"),
                "air conditioner",
            ),
            "room": _ROOMS,
            "state": ("on", "off"),
        },
        orders=(
            "turn {state} the {device} in the {room}",
            "turn the {device} in the {room} {state}",
            "switch the {room} {device} {state}",
            "switch {state} the {room} {device}",
            "go to the {room} and turn the {device} {state}",
        ),
        remarks=(
            "I want the {room} {device} {state}",
            "the {device} in the {room} should be {state}",
            "{room} {device} {state}",
        ),
    ),
    "timer": Intent(
        rows=(700, 30),
        slots={
            "minutes": tuple(range(2, 61)),
            "label": (
                *(None, "pasta", "eggs", "rice", "tea", "bread", "pizza"),
                *("laundry", "nap", "cake", "homework"),
            ),
        },
        orders=(
            "set a timer for {minutes}",
            "start {minute} timer",
            "count down {minutes}",
            "set a {label} timer for {minutes}",
            "set a timer for {minutes} for the {label}",
            "start {minute} timer for the {label}",
            "time the {label}, {minutes}",
            "remind me about the {label} in {minutes}",
        ),
        remarks=(
            "I need a timer for {minutes}",
            "timer, {minutes}",
            "{label} timer, {minutes}",
            "{minutes} for the {label}",
            "I need {minute} timer for the {label}",
        ),
    ),
    "light": Intent(
        rows=(320, 16),
        slots={
            "room": _ROOMS,
            "colour": (
                *("red", "orange", "yellow", "green", "blue", "purple"),
                *("pink", "white", "warm white"),
            ),
            "percent": (None, *range(10, 100, 10)),
        },
        orders=(
            "make the {room} light {colour}",
            "set the lights in the {room} to {colour}",
            "turn the {room} lights {colour}",
            "make the {room} light {colour} at {percent}",
            "set the lights in the {room} to {colour}, {percent}",
            "dim the {room} lights to {percent} and make them {colour}",
        ),
        remarks=(
            "I would like {colour} light in the {room}",
            "{colour} for the {room} light",
            "{room} light {colour}, {percent}",
            "I would like {percent} {colour} light in the {room}",
        ),
    ),
    "shopping": Intent(
        rows=(420, 24),
        slots={
            ("item", "unit"): tuple(
                (item, unit)
                for item, units in _CONTAINERS.items()
                for unit in units
            ),
            "quantity": tuple(range(1, 13)),
        },
        orders=(
            "add {goods} to the shopping list",
            "put {goods} on the list",
            "write down {goods} for the shop",
            "get {goods} next time you order",
        ),
        remarks=(
            "we need {goods}",
            "we are out, so {goods} for the shopping list",
            "I have to buy {goods}",
            "shopping list: {goods}",
        ),
    ),
    "heating": Intent(
        rows=(320, 16),
        slots={"room": _ROOMS, "degrees": tuple(range(15, 26))},
        orders=(
            "set the heating in the {room} to {degrees}",
            "heat the {room} to {degrees}",
            "put the {room} thermostat at {degrees}",
            "keep the {room} at {degrees}",
        ),
        remarks=(
            "I want {degrees} in the {room}",
            "the {room} should be at {degrees}",
            "{room} heating {degrees}",
        ),
    ),
    "oven": Intent(
        rows=(300, 16),
        slots={
            "degrees": tuple(range(100, 250, 10)),
            "mode": (None, "fan", "grill", "steam", "bottom heat"),
        },
        orders=(
            "preheat the oven to {degrees}",
            "set the oven to {degrees}",
            "heat the oven up to {degrees}",
            "preheat the oven to {degrees} with {mode}",
            "set the oven to {mode} at {degrees}",
            "use {mode} and bring the oven to {degrees}",
        ),
        remarks=(
            "I need the oven at {degrees}",
            "oven at {degrees}",
            "I need the oven at {degrees} on {mode}",
            "oven on {mode}, {degrees}",
        ),
    ),
    "music": Intent(
        rows=(260, 16),
        slots={
            "play": (
                *("jazz", "rock", "opera", "classical music", "piano music"),
                *("folk songs", "the news", "the weather report"),
                *("bird song", "rain sounds", "a bedtime story", "a podcast"),
            ),
            "room": (None, *_ROOMS),
        },
        orders=(
            "play {play}",
            "put {play} on",
            "let me hear {play}",
            "play {play} in the {room}",
            "put {play} on in the {room}",
        ),
        remarks=(
            "in the {room} play {play}",
            "I would like to hear {play}",
            "I feel like {play}",
            "{play} in the {room}",
            "I would like to hear {play} in the {room}",
        ),
    ),
    "volume": Intent(
        rows=(320, 16),
        slots={"room": _ROOMS, "percent": tuple(range(10, 100, 10))},
        orders=(
            "set the volume in the {room} to {percent}",
            "turn the {room} speaker to {percent}",
            "change the {room} volume to {percent}",
            "put the sound in the {room} at {percent}",
        ),
        remarks=(
            "I want the {room} speaker at {percent}",
            "volume {percent} in the {room}",
            "{room} volume {percent}",
        ),
    ),
}

_TO_NINETEEN = (
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_words(value, rng):
    """A number from 0 to 299 in words, in one of the ways it is said."""
    if value < 20:
        return _TO_NINETEEN[value]
    if value < 100:
        tens, ones = divmod(value, 10)
        joint = rng.choice((" ", "-"))
        return _TENS[tens] + (joint + _TO_NINETEEN[ones] if ones else "")
    hundreds, rest = divmod(value, 100)
    digit = _TO_NINETEEN[hundreds]
    one = rng.choice(("one", "a"))
    hundred = (one if hundreds == 1 else digit) + " hundred"
    if not rest:
        return hundred
    joint = hundred + " and "
    # "One eighty", but "one five" is no way to say 105.
    if rest >= 10:
        joint = rng.choice((joint, digit + " "))
    return joint + number_words(rest, rng)


def _number(value, rng):
    """Digits or words, as often one as the other."""
    return str(value) if rng.random() < 0.5 else number_words(value, rng)


def _minutes(slots, rng):
    idioms = {15: "a quarter of an hour", 30: "half an hour", 60: "an hour"}
    value = slots["minutes"]
    if value in idioms and rng.random() < 0.4:
        return idioms[value]
    return f"{_number(value, rng)} {rng.choice(('minutes', 'minutes', 'min'))}"


def _minute(slots, rng):
    number = _number(slots["minutes"], rng)
    # Of the numbers to 60 only 8, 11 and 18 start with a vowel.
    vowel = slots["minutes"] in (8, 11, 18)
    return f"{'an' if vowel else 'a'} {number} minute"


def _goods(slots, rng):
    count, item, unit = slots["quantity"], slots["item"], slots.get("unit")
    idioms = {2: "a couple of", 6: "half a dozen", 12: "a dozen"}
    if count == 1:
        number = rng.choice(("a", "one", "1"))
    elif not unit and count in idioms and rng.random() < 0.4:
        number = idioms[count]
    else:
        number = _number(count, rng)
    if not unit:
        return f"{number} {item}"
    unit = unit if count == 1 else _PLURALS.get(unit, unit + "s")
    return f"{number} {unit} of {item}"


def _degrees(slots, rng):
    unit = rng.choice((" degrees", " degrees", " celsius", ""))
    return _number(slots["degrees"], rng) + unit


def _percent(slots, rng):
    if rng.random() < 0.3:
        return f"{slots['percent']}%"
    return _number(slots["percent"], rng) + " percent"


_PHRASES = {
    "minutes": _minutes,
    "minute": _minute,
    "goods": _goods,
    "degrees": _degrees,
    "percent": _percent,
}


def say(field, slots, rng):
    """What stands for `{field}` in a pattern: one way to say the slots."""
    if field in _PHRASES:
        return _PHRASES[field](slots, rng)
    value = slots[field]
    return rng.choice(_SECOND_NAMES.get(value, (value,)))
