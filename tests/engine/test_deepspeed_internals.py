"""DeepSpeed's private state: unknown versions and renamed attributes are errors."""

import contextlib
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


class Backend:
    """A communication backend whose calls end when they are waited for."""

    def __init__(self, events):
        self.events = events

    def all_reduce(self, tensor, async_op=False):
        self.events.append(f"call {tensor}")
        return types.SimpleNamespace(wait=lambda: self.events.append("wait"), name="work")

    def reduce_scatter_tensor(self, tensor):
        self.events.append(f"call {tensor}")

    def get_rank(self):
        self.events.append("rank")
        return 3


def test_collective_calls_and_waits_are_timed_and_nothing_else(monkeypatch):
    from deepspeed.comm import comm

    events = []

    @contextlib.contextmanager
    def timer():
        events.append("begin")
        yield
        events.append("end")

    backend = Backend(events)
    monkeypatch.setattr(comm, "cdb", backend)
    timed = deepspeed_internals.TimedCommunication(timer)
    timed.start()
    assert comm.cdb.get_rank() == 3
    work = comm.cdb.all_reduce("a", async_op=True)
    assert work.name == "work"
    comm.cdb.reduce_scatter_tensor("b")
    work.wait()
    assert events == [
        *("rank", "begin", "call a", "end", "begin", "call b", "end", "begin", "wait", "end")
    ]
    timed.stop()
    assert comm.cdb is backend


def test_the_names_of_collective_calls_are_those_of_deepspeeds_backend():
    from deepspeed.comm.torch import TorchBackend

    assert all(callable(getattr(TorchBackend, name)) for name in deepspeed_internals.COLLECTIVES)
