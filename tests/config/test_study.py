"""A study is a config with arms; every mistake in an arm is one line with its place."""

import pytest

from sftmix.config.reader import load_config
from sftmix.config.study import load_study
from sftmix.errors import ConfigError

STUDY = """
base: quickstart
train: {epochs: 2}
study:
  dir: studies/mu
  seeds: [3, 5]
  control: ntp
  arms:
    ntp:
      mixup: {weight: 0}
    strong:
      mixup: {weight: 0.5}
      reference: {train: {epochs: 4}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_an_arm_is_the_config_with_its_own_sections_on_top(file):
    study = load_study(file, ["train.batch_size=7"])
    weak, strong = study.config("ntp", 3), study.config("strong", 5)
    assert (weak.mixup.weight, strong.mixup.weight) == (0, 0.5)
    assert weak.mixup.alpha == strong.mixup.alpha == 0.5  # of the base, beside the arm's own key
    assert weak.train.batch_size == strong.reference_train.batch_size == 7
    assert (strong.train.epochs, strong.reference_train.epochs) == (2, 4)
    assert (strong.run.seed, str(strong.run.dir)) == (5, "studies/mu/trials/strong/seed_5")
    assert not weak.baseline.enabled and not strong.baseline.enabled


def test_a_number_of_seeds_stands_for_as_many_from_0_on(file):
    assert load_study(file, ["study.seeds=3"]).settings.seeds == [0, 1, 2]


def test_one_arm_leaves_the_others_as_they_are(file):
    study = load_study(file)
    assert study.config("ntp", 3).reference.train is None
    assert study.config("ntp", 3).model_dump(exclude={"run", "mixup"}) == load_config(
        "quickstart", ["train.epochs=2", "baseline.enabled=false"]
    ).model_dump(exclude={"run", "mixup"})


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("weight: 0.5", "wieght: 0.5", ["arm `strong`", "study.yaml:12", "Did you mean `weight`"]),
        ("epochs: 4", "epochs: 0", ["arm `strong`", "study.yaml:13", "reference.train.epochs"]),
        ("control: ntp", "control: nto", ["study.yaml:4", "'nto'", "ntp, strong"]),
        ("seeds: [3, 5]", "seeds: [3, 3]", ["different numbers", "[3, 3]"]),
        ("seeds: [3, 5]", "seeds: 0", ["study.yaml:6", "`study.seeds` is 0"]),
        ("    ntp:", "    n/p:", ["'n/p' cannot name a folder"]),
        ("  control", "  contrl", ["study.yaml:7", "Did you mean `control`?"]),
    ],
)
def test_mistakes_name_arm_and_line(file, before, after, words):
    file.write_text(STUDY.replace(before, after, 1))
    with pytest.raises(ConfigError) as error:
        load_study(file)
    assert all(word in str(error.value) for word in words), error.value


def test_one_arm_is_no_study(file):
    file.write_text(STUDY[: STUDY.index("    strong")])
    with pytest.raises(ConfigError, match="expected two or more, found 1"):
        load_study(file)


@pytest.mark.parametrize("override", ["mixup.weight=0.1", "mixup={}"])
def test_an_override_that_an_arm_would_hide_is_refused(file, override):
    with pytest.raises(ConfigError, match=r"the arm `ntp` sets this key itself"):
        load_study(file, [override])


def test_a_run_refuses_a_study_and_a_study_refuses_a_run(file):
    with pytest.raises(ConfigError, match=r"study\.yaml:4: this is a study .*`sftmix study "):
        load_config(file)
    with pytest.raises(ConfigError, match="no section `study`"):
        load_study("quickstart")
