import json
from pathlib import Path

import pytest
import warm

from sftmix.planning import traces


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def start_warm(arguments, environment, output):
    """As `traces.start_python`, without the seconds that imports take."""
    own = {**environment, "DS_ACCELERATOR": "cpu"}
    return warm.start(arguments, env=own, cwd=Path.cwd(), stdout=output, stderr=output)


@pytest.fixture(scope="module", autouse=True)
def _warm_traces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "start_python", start_warm)
        yield


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """A DeepSpeed JSON whose buckets do not hide a small model."""
    path = tmp_path_factory.mktemp("zero") / "zero.json"
    section = {"stage": 3, "reduce_bucket_size": 50_000, "stage3_prefetch_bucket_size": 50_000}
    path.write_text(json.dumps({"zero_optimization": section}))
    return path
