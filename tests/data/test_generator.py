"""Generated data: a function of the seed, without repeats, and wrong exactly where it says so."""

import pytest

from sftmix.config.schema import GeneratorConfig
from sftmix.data.generator import OPPOSITES, SKILLS, generate


def right_answer(skill, prompt):
    body = prompt.partition(": " if skill != "last" else "? ")[2]
    match skill:
        case "copy":
            return body
        case "opposite":
            *rest, word = body.split()
            return " ".join([*rest, {**OPPOSITES, **{b: a for a, b in OPPOSITES.items()}}[word]])
        case "last":
            return body.split(", ")[-1]
        case "sort":
            return " ".join(sorted(body.split()))
        case "add":
            return str(
                sum(int(word.strip(".")) for word in prompt.split() if word.strip(".").isdigit())
            )
        case "reverse":
            return " ".join(reversed(body.split()))


def generated(seed=0, **settings):
    return generate(
        GeneratorConfig(**{"num_train": 600, "num_held_out": 100, "noisy_share": 0.3, **settings}),
        seed=seed,
    )


def test_generated_data_is_a_function_of_the_seed():
    assert generated() == generated()
    assert generated()[0] != generated(seed=1)[0] and generated()[1] != generated(seed=1)[1]


def test_no_generated_prompt_is_there_twice():
    train, held_out, _ = generated()
    assert (len(train), len(held_out)) == (600, 100)
    assert len({example.messages[0]["content"] for example in train + held_out}) == 700
    assert (
        {example.group for example in train}
        == {example.group for example in held_out}
        == set(SKILLS)
    )


def test_exactly_the_noisy_generated_answers_are_wrong():
    train, held_out, noisy = generated()
    assert noisy <= {example.example_id for example in train}
    for example in train + held_out:
        prompt, answer = (message["content"] for message in example.messages)
        assert (answer != right_answer(example.group, prompt)) == (example.example_id in noisy)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_the_noisy_share_is_about_what_was_asked_for(share):
    _, _, noisy = generated(noisy_share=share)
    four_deviations = 4 * (share * (1 - share) / 600) ** 0.5
    assert abs(len(noisy) / 600 - share) <= four_deviations
