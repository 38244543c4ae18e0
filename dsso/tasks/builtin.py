"""The `builtin` task: generated sentence pairs, for machines without data.

Does the second sentence follow from the first? The first sentence says who did what to which thing, where
and when. The second one says it again in other words (synonyms, passive voice, another order, details left
out), or changes one to three facts (who, what was done, the thing, the place) or denies it. A denial and its
exclamation mark are only hints: half of the false sentences have none, and some true ones do ("did not fail
to buy"). So a model that looks at the second sentence alone, as a tiny one does, ends well above always
answering the same and well below a model that compares the two. Everything is a pure function of the seed.
"""

from __future__ import annotations

import random
from functools import lru_cache

from dsso.tasks.base import Example, TaskSpec

TRAIN, VALIDATION = 3_000, 1_000
SAME, DENIED = 0.55, 0.5
"""Shares: of the pairs that say the same; of denials among the others."""

SPEC = TaskSpec(
    name="builtin",
    kind="classification",
    hub="",
    columns=("sentence1", "sentence2"),
    fields=("sentence1", "sentence2"),
    labels=("different", "same"),
    verbalizer=("no", "yes"),
    template="First: {sentence1} Second: {sentence2} Does the second follow? Answer:",
    metrics=("accuracy", "f1"),
)

# groups of words with one meaning; words of different groups contradict each other
_WHO = (
    ("the doctor", "the physician"),
    ("the teacher", "the schoolmaster"),
    ("the child", "the kid"),
    ("the farmer", "the peasant"),
    ("the policeman", "the officer"),
    ("the lawyer", "the attorney"),
    ("the sailor", "the seaman"),
    ("the thief", "the burglar"),
)
_DID = (
    (("bought", "buy"), ("purchased", "purchase")),
    (("sold", "sell"), ("traded away", "trade away")),
    (("repaired", "repair"), ("fixed", "fix")),
    (("destroyed", "destroy"), ("wrecked", "wreck")),
    (("found", "find"), ("discovered", "discover")),
    (("lost", "lose"), ("mislaid", "mislay")),
    (("painted", "paint"), ("coloured", "colour")),
    (("hid", "hide"), ("concealed", "conceal")),
)
_PARTICIPLE = {"hid": "hidden"}
_THING = (
    ("the car", "the automobile"),
    ("the boat", "the ship"),
    ("the picture", "the painting"),
    ("the coat", "the jacket"),
    ("the bicycle", "the bike"),
    ("the stone", "the rock"),
    ("the clock", "the timepiece"),
    ("the carpet", "the rug"),
)
_PLACE = (
    ("in the forest", "in the woods"),
    ("in the city", "in the town"),
    ("near the shore", "near the beach"),
    ("at the shop", "at the store"),
    ("on the road", "on the street"),
    ("behind the house", "behind the home"),
)
_WHEN = ("yesterday", "last week", "on Monday", "in the morning", "after dinner", "long ago")


def generate(seed: int, train: int = TRAIN, validation: int = VALIDATION) -> dict[str, list[Example]]:
    """The public splits of the task.

    Args:
        seed: two runs with one seed see the same sentences.
        train: number of training examples.
        validation: number of validation examples (the protocol halves them into validation and test).
    """
    # every split has a stream of its own, so that the size of one does not change another
    return {
        name: list(_pairs(seed, name, count))
        for name, count in (("train", train), ("validation", validation))
    }


@lru_cache(maxsize=4)
def _pairs(seed: int, name: str, count: int) -> tuple[Example, ...]:
    draw = random.Random(f"builtin/{seed}/{name}")
    return tuple(_pair(draw) for _ in range(count))


def _pair(draw: random.Random) -> Example:
    fact = {name: draw.randrange(len(words)) for name, words in _SLOTS.items()}
    when = draw.choice(_WHEN)
    first = _plain(draw, fact, f"{_word(draw, 'place', fact)} {when}")
    same = draw.random() < SAME
    told = dict(fact)
    denied = not same and draw.random() < DENIED
    # one fact is enough to be different; several make the difference easier to see
    count = 0 if same or denied else draw.randint(1, 3)
    changed = draw.sample(sorted(_SLOTS), count)
    for slot in changed:
        others = [index for index in range(len(_SLOTS[slot])) if index != fact[slot]]
        told[slot] = draw.choice(others)
    # details may be left out, but not one that was changed
    second = _retell(draw, told, when, denied, keep_place="place" in changed)
    return Example({"sentence1": first, "sentence2": second}, int(same))


_SLOTS: dict[str, tuple[tuple[object, ...], ...]] = {
    "who": _WHO,
    "did": _DID,
    "thing": _THING,
    "place": _PLACE,
}


def _word(draw: random.Random, slot: str, fact: dict[str, int]) -> str:
    return str(draw.choice(_SLOTS[slot][fact[slot]]))


def _verb(draw: random.Random, fact: dict[str, int]) -> tuple[str, str]:
    return draw.choice(_DID[fact["did"]])


def _plain(draw: random.Random, fact: dict[str, int], tail: str) -> str:
    past, _ = _verb(draw, fact)
    return _sentence(f"{_word(draw, 'who', fact)} {past} {_word(draw, 'thing', fact)} {tail}")


def _retell(draw: random.Random, fact: dict[str, int], when: str, denied: bool, keep_place: bool) -> str:
    who, thing, place = (_word(draw, slot, fact) for slot in ("who", "thing", "place"))
    past, base = _verb(draw, fact)
    place = place if keep_place or draw.random() < 0.5 else ""
    when = when if draw.random() < 0.5 else ""
    style = draw.random()
    if denied:
        if style < 0.5:
            core = f"{who} did not {base} {thing}"
        else:
            core = f"{thing} was never {_PARTICIPLE.get(past, past)} by {who}"
    elif style < 0.1:
        core = f"{who} did not fail to {base} {thing}"
    elif style < 0.6:
        core = f"{thing} was {_PARTICIPLE.get(past, past)} by {who}"
    else:
        core = f"{who} {past} {thing}"
    end = "!" if draw.random() < (0.9 if denied else 0.1) else "."
    if when and draw.random() < 0.5:
        return _sentence(" ".join(filter(None, (when, core, place))), end)
    return _sentence(" ".join(filter(None, (core, place, when))), end)


def _sentence(words: str, end: str = ".") -> str:
    return words[0].upper() + words[1:] + end
