"""Pushes to a stand-in for the Hub on this machine: what arrives, what is refused, what breaks."""

import argparse

import pytest
from stub_hub import Repository, stub_hub

from sftmix.errors import ArtifactError, ConfigError, MachineError
from sftmix.storage.hub import WAITS, Target, deliver, push_folder


@pytest.fixture
def hub(monkeypatch):
    with stub_hub(monkeypatch) as found:
        yield found


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "export"
    (made / "part").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights" * 100)
    (made / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (made / "part/vocabulary.txt").write_text("a b c")
    return made


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pushed(hub, name="me/model", kind="model"):
    files = dict(hub.repositories[kind, name].files)
    files.pop(".gitattributes")
    return files


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_new_repository_has_the_files_in_one_commit(hub, folder, kind, public):
    url = push_folder(folder, "me/model", kind=kind, public=public)
    assert url == f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}me/model"
    repository = hub.repositories[kind, "me/model"]
    assert repository.private is not public and len(repository.commits) == 1
    assert pushed(hub, kind=kind) == files_of(folder)


def test_files_of_others_stay_unless_they_are_to_be_replaced(hub, folder):
    repository = Repository(private=True)
    repository.files["pytorch_model.bin"] = b"of another model"
    hub.repositories["model", "me/model"] = repository
    with pytest.raises(ConfigError, match=r"holds 1 file already, first pytorch_model.bin\. Name"):
        push_folder(folder, "me/model")
    assert not repository.commits
    push_folder(folder, "me/model", replace=True)
    assert pushed(hub) == files_of(folder)


def test_what_is_there_already_is_no_obstacle(hub, folder):
    """As after a push that was cut off between its commit and the comparison."""
    push_folder(folder, "me/model")
    assert push_folder(folder, "me/model") == f"{hub.url}/me/model"
    assert pushed(hub) == files_of(folder)
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="holds 4 files already"):
        push_folder(folder, "me/model")


def test_nobody_sees_an_export_by_accident(hub, folder):
    hub.repositories["model", "me/open"] = Repository(private=False)
    hub.repositories["model", "me/closed"] = Repository(private=True)
    with pytest.raises(ConfigError, match="me/open exists and is public"):
        push_folder(folder, "me/open")
    with pytest.raises(ConfigError, match="--public: me/closed exists and is private"):
        push_folder(folder, "me/closed", public=True)
    assert not any(repository.commits for repository in hub.repositories.values())
    push_folder(folder, "me/open", public=True)
    assert pushed(hub, "me/open") == files_of(folder)


@pytest.mark.parametrize("part", ["/api/models/me/model", "/create", "/commit"])
@pytest.mark.parametrize("status", [503, None])
def test_a_break_is_tried_again(hub, folder, part, status):
    # more breaks than huggingface_hub itself tries to get over
    hub.failing = [(part, status)] * 2
    waited = []
    push_folder(folder, "me/model", wait=waited.append)
    assert not hub.failing and waited in ([], [*WAITS[: len(waited)]])
    assert pushed(hub) == files_of(folder)
    assert len(hub.repositories["model", "me/model"].commits) == 1


def test_what_does_not_end_says_so_and_the_same_command_goes_on(hub, folder):
    hub.failing = [("/create", 500)] * 1000
    waited = []
    with pytest.raises(MachineError, match=f"could not be uploaded in {len(WAITS) + 1} tries"):
        push_folder(folder, "me/model", wait=waited.append)
    assert waited == [*WAITS]
    hub.failing = []
    push_folder(folder, "me/model")
    assert pushed(hub) == files_of(folder)


def test_a_refusal_is_told_at_once(hub, folder, monkeypatch):
    def never(_):
        raise AssertionError("another try cannot help")

    monkeypatch.setenv("HF_TOKEN", "of somebody else")
    with pytest.raises(MachineError, match=r"refuses me/model with 401: .*`hf auth login`"):
        push_folder(folder, "me/model", wait=never)
    with pytest.raises(ConfigError, match=r"--push: .*a/b/c.* Expected owner/name"):
        push_folder(folder, "a/b/c", wait=never)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="since HF_HUB_OFFLINE is set"):
        push_folder(folder, "me/model", wait=never)


def test_files_that_changed_on_their_way_are_told(hub, folder, monkeypatch):
    class Forgetful(dict):
        def __setitem__(self, name, content):
            super().__setitem__(name, content[::-1] if name.endswith(".safetensors") else content)

    hub.repositories["model", "me/model"] = Repository(private=True, files=Forgetful())
    with pytest.raises(ArtifactError, match="differs .* in 1 file, first model.safetensors"):
        push_folder(folder, "me/model")


def options(**changes):
    given = {"to": None, "push": None, "public": False, "replace": False}
    return argparse.Namespace(**{**given, **changes})


def test_a_target_is_a_folder_a_repository_or_both(hub, tmp_path):
    def write(to):
        to.mkdir()
        (to / "config.json").write_text("{}")
        return to

    beside = tmp_path / "run"
    beside.mkdir()
    with pytest.raises(
        ConfigError, match="No target is named. Expected --to FOLDER, --push OWNER/NAME, or both"
    ):
        Target.of(options())
    with pytest.raises(ConfigError, match="--public and --replace: only with --push"):
        Target.of(options(to=tmp_path / "a", public=True, replace=True))
    assert deliver(write, Target.of(options(to=tmp_path / "a")), beside=beside) == str(
        tmp_path / "a"
    )
    deliver(write, Target.of(options(push="me/one")), beside=beside)
    assert not list(beside.iterdir())  # nothing of it is left
    deliver(write, Target.of(options(push="me/two", to=tmp_path / "b")), beside=beside)
    assert (tmp_path / "b/config.json").is_file()
    assert pushed(hub, "me/one") == pushed(hub, "me/two") == {"config.json": b"{}"}
