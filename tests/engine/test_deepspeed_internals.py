"""DeepSpeed's private state: unknown versions and renamed attributes are errors."""

import types

import pytest

from sftmix.engine import deepspeed_internals
from sftmix.errors import ConfigError


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0.0"])
def test_a_version_whose_private_state_is_unknown_is_refused(version, monkeypatch):
    monkeypatch.setattr(deepspeed_internals.import_deepspeed(), "__version__", version)
    with pytest.raises(ConfigError, match=rf"DeepSpeed {version} is installed; .* of 0\.19\.x"):
        deepspeed_internals.import_deepspeed()


def test_an_attribute_that_was_renamed_is_an_error_and_not_set():
    engine = types.SimpleNamespace(checkpoint_engine=None)
    with pytest.raises(RuntimeError, match="has no attribute save_non_zero_checkpoint"):
        deepspeed_internals.use_state_files(engine, object())
    assert engine.checkpoint_engine is None
