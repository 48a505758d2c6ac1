import json

import pytest

from sftmix.errors import ArtifactError
from sftmix.storage import artifacts
from sftmix.storage.files import write_json


def make(folder, text="content", settings=None):
    with artifacts.publish(folder, stage="data", settings=settings or {"a": 1}) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "file.txt").write_text(text)
        (staging / "other.txt").write_text("x")
    return folder


def test_a_published_folder_verifies(tmp_path):
    manifest = artifacts.verify(make(tmp_path / "out"))
    assert set(manifest.files) == {"deep/file.txt", "other.txt"}
    assert manifest.fingerprint == artifacts.stage_fingerprint("data", {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no staging left


def test_an_error_inside_leaves_the_old_output_as_it_was(tmp_path):
    folder = make(tmp_path / "out", "old")
    with (
        pytest.raises(RuntimeError),
        artifacts.publish(folder, stage="data", settings={}) as staging,
    ):
        (staging / "file.txt").write_text("half")
        raise RuntimeError
    assert (folder / "deep" / "file.txt").read_text() == "old"
    artifacts.verify(folder)


def test_publishing_again_replaces_the_whole_folder(tmp_path):
    folder = make(tmp_path / "out", "old")
    (folder / "stray.txt").write_text("x")
    make(folder, "new")
    assert (folder / "deep" / "file.txt").read_text() == "new" and not (
        folder / "stray.txt"
    ).exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "deep" / "file.txt").unlink(), "is missing"),
        (lambda f: (f / "deep" / "file.txt").write_text("conten"), "6 bytes, expected 7"),
        (
            lambda f: (f / "deep" / "file.txt").write_text("Content"),
            "differs from what was written",
        ),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"surplus": 1}'), "is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is damaged"),
        (
            lambda f: (f / "manifest.json").write_text(
                '{"stage": "a", "fingerprint": "b", "settings": {}, "inputs": {}, "files": 5}'
            ),
            "is damaged",
        ),
        (
            lambda f: (f / "manifest.json").write_text(
                '{"stage": "a", "fingerprint": "b", "settings": 5, "inputs": {}, "files": {}}'
            ),
            "is damaged",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    folder = make(tmp_path / "out")
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        artifacts.verify(folder)


def test_fingerprints_depend_on_settings_and_inputs_and_not_on_key_order():
    of = artifacts.stage_fingerprint
    assert of("data", {"a": 1, "b": 2}) == of("data", {"b": 2, "a": 1})
    assert (
        len(
            {
                of("data", {"a": 1}),
                of("data", {"a": 2}),
                of("score", {"a": 1}),
                of("data", {"a": 1}, {"in": "x"}),
            }
        )
        == 4
    )


def test_the_identity_stands_for_the_content_in_the_digest(tmp_path):
    def digest(folder, text, identity):
        facts = {"identity": identity} if identity else {}
        with artifacts.publish(folder, stage="data", settings={}, facts=facts) as staging:
            (staging / "file").write_text(text)
        return artifacts.read_manifest(folder).digest

    assert digest(tmp_path / "a", "written at noon", "same") == digest(
        tmp_path / "b", "written at one", "same"
    )
    assert digest(tmp_path / "c", "one", None) != digest(tmp_path / "d", "two", None)


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1]})
    assert (
        json.loads((tmp_path / "x.json").read_text()) == {"a": [1]}
        and len(list(tmp_path.iterdir())) == 1
    )
