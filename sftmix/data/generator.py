"""The built-in data set: generated instruction data, from a seed.

Six skills of different difficulty. Some training answers are wrong on purpose, so that confidence
has something to find. Held-out examples are never wrong, and none of their prompts is in the
training part.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from sftmix.config.schema import GeneratorConfig
from sftmix.data.conversations import Example, content_hash

WORDS = (
    "amber basil cedar delta ember fjord grove haven indigo jade kelp lotus maple nectar olive"
    " pearl".split()
)
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "light": "dark",
    "early": "late",
    "full": "empty",
    "soft": "hard",
    "wet": "dry",
    "young": "old",
    "high": "low",
    "rich": "poor",
    "near": "far",
    "loud": "quiet",
    "thick": "thin",
}


Skill = Callable[[random.Random], tuple[str, str]]  # draws a prompt and its answer


def _on_words(
    question: str, separator: str, fewest: int, answer: Callable[[list[str]], str]
) -> Skill:
    """Returns a skill on `fewest` words, or one more."""

    def draw(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(WORDS, rng.randint(fewest, fewest + 1))
        return f"{question} {separator.join(words)}", answer(words)

    return draw


def _opposite(rng: random.Random) -> tuple[str, str]:
    word = rng.choice([*OPPOSITES, *OPPOSITES.values()])
    other = OPPOSITES.get(word) or next(k for k, v in OPPOSITES.items() if v == word)
    subject = rng.choice(WORDS)
    return f"Say the opposite: the {subject} is {word}", f"the {subject} is {other}"


def _sort(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, 3)
    return f"Sort these words: {' '.join(words)}", " ".join(sorted(words))


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1, 30), rng.randint(1, 30)
    return f"Add {a} and {b}.", f"{a + b}"


SKILLS: dict[str, Skill] = {
    "copy": _on_words("Repeat these words:", " ", 2, " ".join),
    "opposite": _opposite,
    "last": _on_words("What is the last word of this list?", ", ", 3, lambda words: words[-1]),
    "sort": _sort,
    "add": _add,
    "reverse": _on_words("Reverse the order:", " ", 2, lambda words: " ".join(reversed(words))),
}


def generate(
    settings: GeneratorConfig, *, seed: int
) -> tuple[list[Example], list[Example], set[str]]:
    """Returns the training and the held-out examples, and the ids of the training examples whose
    answer is wrong.

    A pure function of its arguments: the same on every machine.
    """
    rng = random.Random(f"sftmix-generator-{seed}")
    seen: set[str] = set()

    def draw() -> tuple[str, str, str]:
        while True:
            skill = rng.choice(list(SKILLS))
            prompt, answer = SKILLS[skill](rng)
            if prompt not in seen:
                seen.add(prompt)
                return skill, prompt, answer

    held_out = [
        _example(*draw(), f"generated:held-out {n}") for n in range(1, settings.num_held_out + 1)
    ]
    train: list[Example] = []
    noisy: set[str] = set()
    for number in range(1, settings.num_train + 1):
        skill, prompt, answer = draw()
        is_noisy = rng.random() < settings.noisy_share
        given = answer
        # the answer to another prompt of the same skill: plausible, but wrong
        while is_noisy and given == answer:
            given = SKILLS[skill](rng)[1]
        train.append(_example(skill, prompt, given, f"generated:train {number}"))
        if is_noisy:
            noisy.add(train[-1].example_id)
    return train, held_out, noisy


def _example(skill: str, prompt: str, answer: str, place: str) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Example(content_hash(messages), messages, place, group=skill)
