"""A tiny run whose data is prepared, and what comes of it when nothing disturbs it."""

import shutil

import pytest
from processes import sftmix, sftmix_on_ranks
from reference_runs import OPTIONS, QUICKSTART, result_of


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures") / "run"
    sftmix("data", QUICKSTART, *OPTIONS, f"run.dir={folder}")
    return folder


@pytest.fixture(scope="session")
def undisturbed(prepared, tmp_path_factory):
    """Returns, for a number of ranks, the result of a run that nothing disturbed."""
    results = {}

    def of(num_ranks):
        if num_ranks not in results:
            folder = tmp_path_factory.mktemp(f"undisturbed{num_ranks}") / "run"
            shutil.copytree(prepared, folder)
            options = [*OPTIONS, f"run.dir={folder}"]
            sftmix_on_ranks(num_ranks, "reference", QUICKSTART, *options)
            results[num_ranks] = result_of(folder)
        return results[num_ranks]

    return of


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"
