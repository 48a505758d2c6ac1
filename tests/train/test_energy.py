"""Energy from the counters of a machine, as Linux shows them in files."""

import math

import pytest
import torch

from sftmix.train.energy import EnergyCounter

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path):
    """Returns a function that sets the counters of a machine with two processors, in joules."""

    def count(*joules):
        for number, value in enumerate(joules):
            for package in (f"intel-rapl:{number}", f"intel-rapl:{number}:0"):  # and a part of it
                folder = tmp_path / package
                folder.mkdir(exist_ok=True)
                (folder / "energy_uj").write_text(f"{int(value * 1e6)}\n")
                (folder / "max_energy_range_uj").write_text("1000000000\n")
        return tmp_path

    return count


def test_it_counts_what_all_processors_took_since_it_was_asked_last(machine):
    energy = EnergyCounter(CPU, is_first=True, rapl=machine(100, 900))
    machine(150, 990)
    assert energy.take() == pytest.approx(140)
    machine(151, 990)
    assert energy.take() == pytest.approx(1)
    energy.add(7)  # of an earlier attempt
    assert energy.read() == pytest.approx(7)


def test_a_counter_may_wrap_around(machine):
    energy = EnergyCounter(CPU, is_first=True, rapl=machine(990, 0))
    machine(5, 0)
    assert energy.read() == pytest.approx(15)


def test_on_a_machine_one_rank_counts_and_without_counters_nothing_is_said(machine, tmp_path):
    second = EnergyCounter(CPU, is_first=False, rapl=machine(1, 1))
    machine(50, 50)
    assert second.take() == 0
    assert math.isnan(EnergyCounter(CPU, is_first=True, rapl=tmp_path / "none").take())
