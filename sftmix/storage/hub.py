"""A finished folder as one commit of a repository on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sftmix import __version__
from sftmix.errors import ArtifactError, ConfigError, MachineError, counted, first_line
from sftmix.storage.files import sha256_of_file

WAITS = (1, 2, 4, 8, 16)  # seconds before each further try
OF_THE_HUB = (".gitattributes",)  # files that a new repository has by itself
LOG_IN = "Log in with one that may write there: `hf auth login`, or HF_TOKEN."
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Target:
    """Where an export goes: a new folder, a repository (`push`, owner/name), or both. public,
    replace: as of `push_folder`."""

    to: Path | None
    push: str | None
    public: bool = False
    replace: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> Target:
        """Raises ConfigError for no target, and for options of a push without one."""
        if options.to is None and options.push is None:
            raise ConfigError(
                "No target is named. Expected --to FOLDER, --push OWNER/NAME, or both."
            )
        given = [f"--{name}" for name in ("public", "replace") if getattr(options, name)]
        if given and options.push is None:
            raise ConfigError(f"{' and '.join(given)}: only with --push.")
        return cls(options.to, options.push, options.public, options.replace)


def deliver(
    write: Callable[[Path], Path],
    target: Target,
    *,
    beside: Path | None = None,
    kind: str = "model",
) -> str:
    """Writes an export to the target; for a push alone to a folder in `beside` (default: the
    machine's folder for temporary files), removed afterwards. Returns the address of what was
    pushed, else the folder."""
    if target.push is None:
        assert target.to is not None, "a target is a folder, a repository, or both"
        return str(write(target.to))
    settings: dict[str, Any] = {
        "kind": kind,
        "public": target.public,
        "replace": target.replace,
    }
    if target.to is not None:
        return push_folder(write(target.to), target.push, **settings)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".export-") as folder:
        return push_folder(write(Path(folder) / "export"), target.push, **settings)


def push_folder(
    folder: Path,
    repo: str,
    *,
    kind: str = "model",
    public: bool = False,
    replace: bool = False,
    wait: Callable[[float], object] = time.sleep,
) -> str:
    """Uploads the files of a folder as one commit, and compares what the Hub lists with them.
    Returns the page's address.

    repo: `owner/name`; made where it does not exist, private unless `public`. kind: model or
    dataset. replace: a repository with files has these alone afterwards; its history keeps the
    others. A connection that breaks, and an answer of 429 or 5xx, are tried again after 1 to 16
    seconds; what was uploaded before a break is not uploaded again. Raises ConfigError for a name,
    a visibility or files that do not fit, MachineError where the Hub cannot be reached or refuses,
    ArtifactError if it lists other files afterwards.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    api = HfApi(library_name="sftmix", library_version=__version__)

    def ask(call: Callable[..., _Answer], **options: Any) -> _Answer:
        return _persistently(lambda: call(repo_type=kind, **options), repo, wait)

    try:
        found = ask(api.repo_info, repo_id=repo, files_metadata=True)
    except HFValidationError as error:
        raise ConfigError(f"--push: {first_line(error)} Expected owner/name.") from None
    except RepositoryNotFoundError:
        repo = ask(api.create_repo, repo_id=repo, private=not public, exist_ok=True).repo_id
    else:
        is_there = not _differences(folder, found)  # an earlier push was cut off after its commit
        _refuse_unfit(found, repo, public=public, replace=replace or is_there)
    url = ask(
        api.upload_folder,
        repo_id=repo,
        folder_path=folder,
        commit_message=f"Exported by sftmix {__version__}",
        delete_patterns="*" if replace else None,
    ).repo_url
    if wrong := _differences(folder, ask(api.repo_info, repo_id=repo, files_metadata=True)):
        raise ArtifactError(
            f"{repo} differs from what was uploaded in {counted(len(wrong), 'file')}, first"
            f" {wrong[0]}. Somebody else may write there; push again with --replace."
        )
    return str(url)


def _refuse_unfit(found: Any, repo: str, *, public: bool, replace: bool) -> None:
    if public and found.private:
        raise ConfigError(
            f"--public: {repo} exists and is private. Change it in its settings on the Hub, or"
            " leave --public out."
        )
    if not public and not found.private:
        raise ConfigError(
            f"--push: {repo} exists and is public, so that everybody would see the export. Give"
            " --public as well, or name another."
        )
    files = [file.rfilename for file in found.siblings or () if file.rfilename not in OF_THE_HUB]
    if files and not replace:
        raise ConfigError(
            f"--push: {repo} holds {counted(len(files), 'file')} already, first {files[0]}. Name"
            " another, or give --replace: its files will be the export's, and its history keeps"
            " the others."
        )


def _persistently(call: Callable[[], _Answer], repo: str, wait: Callable[[float], object]) -> Any:
    """Returns the answer of a call, tried again where another try may help."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,  # of httpx or httpx2
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    for pause in (*WAITS, None):
        try:
            return call()
        except RepositoryNotFoundError:
            raise  # for the caller, who makes it
        except OfflineModeIsEnabled:
            raise MachineError(
                f"--push: {repo} cannot be reached, since HF_HUB_OFFLINE is set. Unset it, or use"
                " --to alone."
            ) from None
        except LocalTokenNotFoundError:
            raise MachineError(
                f"--push: {repo} needs a token of the Hub, and this machine has none. {LOG_IN}"
            ) from None
        except (HTTPError, ConnectionError, TimeoutError) as error:  # or an answer that is one
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status < 500 and status != 429:
                raise MachineError(
                    f"--push: the Hub refuses {repo} with {status}: {first_line(error)}"
                    f"{' ' + LOG_IN if status in (401, 403) else ''}"
                ) from None
            if pause is None:
                raise MachineError(
                    f"--push: {repo} could not be uploaded in {len(WAITS) + 1} tries"
                    f" ({first_line(error)}) Check the connection and run the same command again:"
                    " what was uploaded is kept."
                ) from None
        wait(pause)
    raise AssertionError("the last try returns or raises")


def _differences(folder: Path, listed: Any) -> list[str]:
    """Returns the names of files that are not in both the folder and the repository's list, with
    one size and, where the Hub lists hashes (of large files), one hash."""
    there = {
        file.rfilename: file for file in listed.siblings or () if file.rfilename not in OF_THE_HUB
    }
    here = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    wrong = sorted(set(there) ^ set(here))
    for name in sorted(set(there) & set(here)):
        lfs = there[name].lfs
        is_same = there[name].size == here[name].stat().st_size and (
            lfs is None or lfs.sha256 == sha256_of_file(here[name])
        )
        wrong += [] if is_same else [name]
    return wrong


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
