"""The garbage collector runs between steps only."""

import gc
import weakref

from sftmix.train.collector import collector_between_steps


class Node:
    def __init__(self):
        self.me = self  # a cycle: only the collector removes it


def test_garbage_of_a_step_is_collected_between_steps_and_not_in_one():
    collections = []

    def note(phase, info):
        if phase == "start":
            collections.append(info["generation"])

    old = Node()
    old_is_there = weakref.ref(old)
    with collector_between_steps():
        gc.callbacks.append(note)
        try:
            new = Node()
            is_there = weakref.ref(new)
            del new, old
            for _ in range(5000):
                Node()
            assert not collections and is_there() is not None
            gc.collect()
            assert len(collections) == 1 and is_there() is None
            assert old_is_there() is not None  # what was there before is not looked at
        finally:
            gc.callbacks.remove(note)
    assert gc.isenabled()
    gc.collect()
    assert old_is_there() is None


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with collector_between_steps():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
