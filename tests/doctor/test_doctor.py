"""Every item of `sftmix doctor` finds the trouble it is there for, and leaves alone what is
well."""

import mmap
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from doctoring import only, stand_in
from families import FAMILIES
from naive import model_from
from processes import ROOT

from sftmix.cluster import exports
from sftmix.cluster.liveness import run_lock
from sftmix.cluster.local_ranks import first_failure, run_local_ranks
from sftmix.config.reader import load_config
from sftmix.doctor.checks import build, gpus, memory, network, nodes, ranks, storage, versions
from sftmix.doctor.findings import Finding, count, examine
from sftmix.errors import SftmixError
from sftmix.planning.states import Need

GIB = 2**30


@pytest.fixture
def start():
    """Starts a Python process that runs a text, says `ready`, and stays."""
    started = []

    def process(text):
        code = f"{text}\nprint('ready', flush=True)\nimport time\ntime.sleep(600)"
        started.append(
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        )
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield process
    for process in started:
        process.kill()
        process.communicate()


# Findings.


def test_what_fails_inside_an_item_is_a_finding_with_its_reason():
    def look():
        raise KeyError("no such row")

    finding = only(examine("ports", look))
    assert (
        finding.verdict == "bad"
        and "could not be examined: KeyError: 'no such row'" in finding.found
    )

    def refuse():
        raise SftmixError("the file is gone. Put it back.")

    assert only(examine("ports", refuse)).found == "the file is gone. Put it back."
    assert count(examine("ports", refuse)) == {"ok": 0, "warning": 0, "bad": 1, "skipped": 0}


def test_a_finding_is_one_line():
    assert Finding("ports", "bad", "two\nlines.", "Do it.").line().splitlines() == [
        "bad      ports              two lines. Do it."
    ]


# Versions.


@pytest.mark.parametrize(
    ("package", "version", "link"),
    [
        ("deepspeed", "0.17.6", "DeepSpeed/issues/7718"),
        ("deepspeed", "0.18.2+cu126", "DeepSpeed/issues/7718"),
        ("deepspeed", "0.19.3", "DeepSpeed/issues/8224"),
        ("transformers", "5.1.0", "transformers/issues/43780"),
    ],
)
def test_a_release_known_to_be_wrong_is_named_with_its_issue(package, version, link):
    assert any(
        finding.verdict == "bad" and link in finding.found
        for finding in versions.known_bad({package: version})
    )


@pytest.mark.parametrize(
    ("package", "version"),
    [("deepspeed", "0.17.5"), ("deepspeed", "0.19.5"), ("transformers", "5.12.0")],
)
def test_a_release_beside_the_known_bad_ones_is_not(package, version):
    assert versions.known_bad({package: version}) == []


def test_a_version_outside_setup_py_is_named():
    required = ["deepspeed>=0.19.5,<0.20", "torch>=2.11"]
    assert versions.outside_ranges({"deepspeed": "0.19.8", "torch": "2.13.0+cpu"}, required) == []
    finding = only(versions.outside_ranges({"deepspeed": "0.20.1", "torch": "2.11.0"}, required))
    assert (
        finding.verdict == "bad"
        and "deepspeed 0.20.1 is outside" in finding.found
        and "<0.20,>=0.19.5" in finding.remedy
    )


def test_this_environment_is_judged_by_the_table(monkeypatch):
    assert only(versions.check_versions()).verdict == "ok"
    monkeypatch.setattr(
        versions,
        "installed",
        lambda: {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.18.0", "datasets": "5.2.0"},
    )
    found = " ".join(finding.found for finding in versions.check_versions())
    assert (
        "wrong gradients under ZeRO-2" in found
        and "outside of what setup.py asks for" in found
        and "transformers is not installed" in found
    )


@pytest.mark.parametrize(
    ("cuda", "driver", "verdict"),
    [
        (None, None, "skipped"),
        (None, "580.65.06", "bad"),
        ("12.8", None, "warning"),
        ("13.0", "570.12", "bad"),
        ("13.0", "580.65.06", "ok"),
    ],
)
def test_driver_and_cuda_must_fit(cuda, driver, verdict):
    assert only(versions.check_driver(cuda, driver)).verdict == verdict


# Builds.


def plant_lock(folder, minutes=60):
    folder.mkdir(parents=True)
    for name in ("build.ninja", "lock"):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - 60 * minutes,) * 2)
    return folder / "lock"


def test_a_killed_builds_lock_is_found_and_mended_and_a_living_ones_stays(tmp_path, start):
    dead, alive, young = (
        plant_lock(tmp_path / "py311_cpu" / name) for name in ("dead", "alive", "young")
    )
    owner = start(f"file = open({str(alive)!r}, 'rb')")
    killed = start(f"file = open({str(dead)!r}, 'rb')")
    os.utime(young.parent / "build.ninja")
    assert [f.verdict for f in build.check_locks([tmp_path], fix=True)] == ["ok", "ok", "warning"]
    assert dead.exists()  # its owner lives
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    held, stale, fresh = build.check_locks([tmp_path], fix=False)
    assert held.verdict == "ok" and f"pid {owner.pid}" in held.found
    assert (
        stale.verdict == "bad"
        and str(dead) in stale.found
        and "--fix" in stale.remedy
        and dead.exists()
    )
    assert fresh.verdict == "warning" and "too young" in fresh.found

    assert [f.verdict for f in build.check_locks([tmp_path], fix=True)] == ["ok", "ok", "warning"]
    assert (
        not dead.exists()
        and alive.exists()
        and young.exists()
        and (dead.parent / "build.ninja").exists()
    )


@pytest.mark.parametrize("why", ["shared disk", "another user"])
def test_a_lock_whose_owner_could_not_be_seen_is_not_mended(tmp_path, monkeypatch, why):
    lock = plant_lock(tmp_path / "fused_adam")
    if why == "shared disk":
        monkeypatch.setattr(build, "mount_of", lambda path: storage.Mount("/", "nfs4"))
    else:
        monkeypatch.setattr(build, "_sees_processes_of", lambda uid: False)
    finding = only(build.check_locks([tmp_path], fix=True))
    assert finding.verdict == "bad" and f"rm {lock}" in finding.remedy and lock.exists()


def test_locks_are_looked_for_where_torch_builds(monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    assert build.extension_folders() == [Path("/somewhere")]
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert build.extension_folders()[0].parts[-2:] == (".cache", "torch_extensions")


def test_shared_memory_of_dead_processes_is_found_and_that_of_living_ones_is_not(tmp_path, start):
    names = [
        "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0",
        "torch_4194000_123_0",
        "deepspeed_allreduce_buffer_0_127.0.0.1_29501_0",
    ]
    for name in [*names, "someone-elses"]:
        (tmp_path / name).write_bytes(bytes(mmap.PAGESIZE))
        os.utime(tmp_path / name, (1, 1))
    # Mapped and closed, as C++ leaves it: Python's own mmap would keep the file open.
    start(
        "import ctypes\nmap = ctypes.CDLL(None).mmap\nmap.restype = ctypes.c_void_p\n"
        f"with open({str(tmp_path / names[2])!r}, 'rb') as file:\n"
        f"    map(None, ctypes.c_size_t({mmap.PAGESIZE}), 1, 1, file.fileno(), ctypes.c_long(0))"
    )
    finding = only(build.check_leftovers(tmp_path))
    assert finding.verdict == "warning" and finding.facts == {
        "bytes": 2 * mmap.PAGESIZE,
        "files": 2,
    }
    assert (
        names[0] in finding.remedy
        and names[1] in finding.remedy
        and names[2] not in finding.remedy
        and "someone" not in finding.remedy
    )


def test_a_missing_compiler_is_bad_only_for_what_needs_it(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert only(build.check_compiler(has_gpu=False, offloads=False)).verdict == "ok"
    finding = only(build.check_compiler(has_gpu=True, offloads=True))
    assert (
        finding.verdict == "bad"
        and "Triton" in finding.found
        and "offload_optimizer" in finding.found
    )


# Network.


def test_a_taken_port_is_named_with_its_holder(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        finding = only(network.check_ports())
        assert (
            finding.verdict == "bad"
            and f"pid {os.getpid()}" in finding.found
            and f"{port} (MASTER_PORT)" in finding.found
        )
        monkeypatch.delenv("MASTER_PORT")
        monkeypatch.setattr(network, "DEFAULT_PORT", port)
        assert only(network.check_ports()).verdict == "warning"
    assert only(network.check_ports(port)).verdict == "ok"


@pytest.mark.parametrize("value", ["http", "0", "70000"])
def test_a_master_port_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("MASTER_PORT", value)
    assert "is not a port" in only(network.check_ports()).found


@pytest.mark.parametrize(
    ("own", "num_nodes", "verdict"),
    [
        (["127.0.1.1"], 1, "ok"),
        (["127.0.1.1"], 2, "bad"),
        ([], 1, "warning"),
        ([], 2, "bad"),
        (["10.0.0.5"], 2, "ok"),
    ],
)
def test_a_host_name_of_the_loopback_is_enough_for_one_node_only(
    monkeypatch, own, num_nodes, verdict
):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(
        network, "_addresses", lambda name: ["127.0.0.1"] if name == "localhost" else own
    )
    assert only(network.check_host_name(num_nodes=num_nodes)).verdict == verdict


def test_several_interfaces_ask_for_a_name(monkeypatch):
    for name in network.NAMES.values():
        monkeypatch.delenv(name, raising=False)
    found = [
        network.Interface(name, address, True)
        for name, address in [("lo", "127.0.0.1"), ("eth0", "10.0.0.5"), ("ib0", "10.1.0.5")]
    ]
    bridge = network.Interface("docker0", "172.17.0.1", True)
    assert only(network.check_interfaces([*found[:2], bridge], num_nodes=2)).verdict == "ok"
    finding = only(network.check_interfaces(found, num_nodes=2))
    assert (
        finding.verdict == "warning"
        and "GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0" in finding.remedy
    )
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    assert "NCCL_SOCKET_IFNAME=eth1" in only(network.check_interfaces(found)).found
    for value in ("eth", "=eth0", "^docker"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
        assert only(network.check_interfaces(found, num_nodes=2)).verdict == "ok", value


def test_this_machines_interfaces_are_found():
    assert any(
        interface.name == "lo" and interface.address == "127.0.0.1"
        for interface in network.interfaces()
    )


# The run folder.


def test_a_folder_that_takes_no_file_is_named(tmp_path):
    assert (
        only(storage.check_writable(tmp_path / "a" / "run")).verdict == "ok"
        and list(tmp_path.iterdir()) == []
    )
    assert only(storage.check_writable(Path("/proc/run"))).found.startswith(
        "/proc cannot be written"
    )  # root too is refused there
    (tmp_path / "file").touch()
    assert "is not a folder" in only(storage.check_writable(tmp_path / "file" / "run")).found


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    finding = only(storage.check_writable(tmp_path))
    assert (
        finding.verdict == "bad"
        and "Input/output error" in finding.found
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.parametrize(("free", "verdict"), [(29, "bad"), (31, "warning"), (100, "ok")])
def test_space_is_held_against_what_the_run_keeps(tmp_path, monkeypatch, free, verdict):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=free * GIB))
    finding = only(
        storage.check_space(tmp_path / "run", needed_bytes=30 * GIB, meaning="checkpoints")
    )
    assert (
        finding.verdict == verdict
        and f"{free}.0 GiB free" in finding.found
        and "30.0 GiB (checkpoints)" in finding.found
    )


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [("ext4", "ok"), ("nfs4", "ok"), ("lustre", "ok"), ("tmpfs", "warning"), ("fuse.s3fs", "bad")],
)
def test_the_file_system_of_the_run_folder_is_known(tmp_path, kind, verdict):
    table = [
        storage.Mount("/", "overlay"),
        storage.Mount(str(tmp_path), kind),
        storage.Mount(str(tmp_path / "other"), "proc"),
    ]
    finding = only(storage.check_file_system(tmp_path / "run", table))
    assert finding.verdict == verdict and finding.facts["type"] == kind
    assert finding.facts["is_network"] == (kind in ("nfs4", "lustre", "fuse.s3fs"))


def test_a_run_folder_held_by_a_living_run_is_named(tmp_path):
    assert only(storage.check_writer(tmp_path)).verdict == "ok"
    claimed = run_lock.claim(tmp_path)
    finding = only(storage.check_writer(tmp_path))
    assert (
        finding.verdict == "bad"
        and f"attempt 1, host {socket.gethostname()}, pid {os.getpid()}" in finding.found
    )
    claimed.release()
    assert only(storage.check_writer(tmp_path)).verdict == "ok"


# Memory and GPUs.


def quickstart(*overrides):
    return load_config(ROOT / "configs/quickstart.yaml", list(overrides))


def need_of(num_parameters, *overrides, num_ranks=8, local_ranks=8):
    need = Need(quickstart(*overrides), num_ranks, local_ranks)
    need.__dict__["num_parameters"] = num_parameters
    return need


def test_the_parameters_are_those_of_the_model():
    assert Need(quickstart(), 1, 1).num_parameters == 392_320  # what the quickstart prints


def test_the_need_follows_the_stage_and_the_offload():
    billions = {
        stage: need_of(10**9, f"engine.zero_stage={stage}").gpu_bytes / 1e9
        for stage in (0, 1, 2, 3)
    }
    # float32: weights 4, sums 4, moments 8, over 8 ranks
    assert billions == {0: 16.0, 1: 9.0, 2: 5.5, 3: 2.0}
    offloaded = need_of(10**9, f"engine.deepspeed={ROOT / 'configs/deepspeed/zero3_offload.json'}")
    assert offloaded.offload["optimizer"] and offloaded.gpu_bytes < 1e9 < offloaded.host_bytes(
        has_gpu=True
    )
    assert need_of(10**9).disk_bytes == 10**9 * (16 * 3 + 4 * 8)
    assert need_of(10**9).step_traffic == {"gather": 8 * 10**9, "reduce": 4 * 10**9}


@pytest.mark.parametrize(
    ("settings", "stage", "is_whole"),
    [
        ({"model_type": "llama"}, 3, False),
        ({"model_type": "llama"}, 2, True),
        ({"model_type": "mixtral", "num_local_experts": 2}, 3, True),
        (None, 3, True),  # random weights
    ],
)
def test_the_host_holds_a_whole_model_only_where_it_must(tmp_path, settings, stage, is_whole):
    overrides = [f"engine.zero_stage={stage}"]
    if settings is not None:
        model_from({**FAMILIES["llama"][0], **settings}).save_pretrained(tmp_path)
        path = [f"model.path={tmp_path}", "model.architecture="]
        overrides += path
    need = Need(quickstart(*overrides), 8, 8)
    shards = 8 * (need.states_per_rank + need.weights_per_rank)
    whole = need.num_parameters * need.bytes_per_weight
    assert need.host_bytes(has_gpu=False) == shards + (whole if is_whole else 0)


@pytest.mark.parametrize(
    ("total", "available", "verdict"), [(4, 4, "bad"), (64, 10, "warning"), (64, 60, "ok")]
)
def test_memory_is_held_against_the_model(total, available, verdict):
    need = need_of(10**9, num_ranks=2, local_ranks=1)
    finding = only(memory.check_machine(need, has_gpu=False, memory=(total * GIB, available * GIB)))
    assert finding.verdict == verdict and "1,000,000,000 parameters" in finding.found


def gpu(index=0, **changes):
    return gpus.Gpu(
        **{
            "index": index,
            "name": "H100",
            "total_bytes": 80 * GIB,
            "used_bytes": 0,
            "temperature": 40,
            "ecc_errors": 0,
            "is_persistent": True,
            "driver": "580.65.06",
            **changes,
        }
    )


def test_the_fullest_gpu_and_too_few_gpus_are_named():
    cards = [gpu(0), gpu(1, used_bytes=79 * GIB)]
    few, full = memory.check_gpus(need_of(10**9), cards)
    assert few.verdict == "bad" and "8 ranks are to run here on 2 GPUs" in few.found
    assert full.verdict == "warning" and "GPU 1 has 1.0 GiB free of 80.0 GiB" in full.found
    assert (
        memory.check_gpus(need_of(10**12), [gpu(0)] * 8)[-1].verdict == "bad"
        and memory.check_gpus(None, cards) == []
    )


def test_the_peak_of_a_step_counts_where_it_is_known():
    """The states of 10^9 parameters on 8 ranks fit; with activations of 100 GB they do not."""
    need = need_of(10**9)
    states, planned = (
        memory.check_gpus(need, [gpu(0)] * 8, planned=planned)[-1]
        for planned in (None, (100e9, "at its peak in the backward"))
    )
    assert (states.verdict, planned.verdict) == ("ok", "bad")
    assert "without activations" in states.found and "peak in the backward" in planned.found


def test_a_model_that_cannot_be_traced_counts_its_states(monkeypatch):
    def refuse(*_, **__):
        raise SftmixError("the training step cannot be traced")

    monkeypatch.setattr("sftmix.planning.plan.memory_on_gpu", refuse)
    need = need_of(10**9)
    size, when = memory.planned_bytes(need)
    assert size == need.gpu_bytes and "cannot be traced" in when


NVIDIA_SMI = """
import sys
if "-p2p" in sys.argv:
    print("      GPU0  GPU1\\n GPU0  X  CNS\\n GPU1  CNS  X")
elif "--query-compute-apps" in " ".join(sys.argv):
    print("4711, 512 MiB")
else:
    print("0, NVIDIA H100, 81559, 10, 40, 0, Enabled, 580.65.06")
    print("1, NVIDIA H100, 81559, 10, 91, 3, Disabled, 580.65.06")
"""


def test_what_nvidia_smi_says_of_sick_gpus_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stand_in(tmp_path / "bin", monkeypatch, "nvidia-smi", NVIDIA_SMI)
    cards = gpus.list_gpus()
    assert [card.index for card in cards] == [0, 1] and cards[0].total_bytes == 81559 * 2**20
    text = "\n".join(finding.line() for finding in gpus.check_health(cards))
    for words in (
        "bad.*3 uncorrected memory errors",
        "91 C",
        "persistence mode is off",
        "pid 4711, 512 MiB",
        "not every GPU reads .*CNS",
    ):
        assert re.search(words, text), (words, text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [card.index for card in gpus.list_gpus()] == [1]
    stand_in(
        tmp_path / "bin",
        monkeypatch,
        "nvidia-smi",
        "import sys\nsys.exit('Failed to initialize NVML: Driver/library version mismatch')",
    )
    assert (
        "Driver/library version mismatch"
        in only(examine("GPUs", lambda: gpus.check_health(gpus.list_gpus()))).found
    )


def test_no_gpu_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    assert (
        only(gpus.check_health(gpus.list_gpus()))
        .line()
        .startswith("skipped  GPUs               there is no nvidia-smi")
    )


# Ranks.


def test_wrong_gradients_are_bad():
    result = {
        "num_ranks": 2,
        "device": "cpu",
        "gradients": {"gradient": 8e-7, "tensor": "head", "weight": 1e-7, "seconds": 1.0},
    }
    assert only(ranks.check_gradients(result)).verdict == "ok"
    for name, value in [("gradient", 2e-5), ("weight", 2e-5), ("gradient", float("nan"))]:
        finding = only(
            ranks.check_gradients({**result, "gradients": {**result["gradients"], name: value}})
        )
        assert finding.verdict == "bad" and "Do not train here" in finding.remedy


def test_bandwidth_is_turned_into_the_time_of_a_step():
    rows = [
        {"bytes": 10**6, "all_gather": 1.0, "reduce_scatter": 1.0},
        {"bytes": 10**9, "all_gather": 0.5, "reduce_scatter": 1.0},
    ]
    finding = only(
        ranks.check_bandwidth(
            {"num_ranks": 2, "device": "cpu", "collectives": rows}, need_of(10**9)
        )
    )
    assert (
        finding.facts["step_seconds"] == pytest.approx(8 * 0.5 + 4 * 1.0)
        and "8 s at this speed" in finding.found
    )
    slow = ranks.check_bandwidth({"num_ranks": 2, "device": "cuda", "collectives": rows[:1]}, None)
    assert [f.verdict for f in slow] == ["ok", "warning"]


def test_a_rank_that_fails_ends_the_others_and_is_the_one_named(monkeypatch):
    monkeypatch.setattr("sftmix.cluster.local_ranks.GRACE_SECONDS", 0.2)
    code = (
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('the disk is"
        " full')\ntime.sleep(600)"
    )
    started = time.monotonic()
    failure = first_failure(run_local_ranks([sys.executable, "-c", code], 2, limit_seconds=60))
    assert (
        failure.startswith("rank 1 of 2 ended with 1:\nthe disk is full")
        and time.monotonic() - started < 20
    )
    ends = run_local_ranks(
        [sys.executable, "-c", "import time\ntime.sleep(600)"], 2, limit_seconds=0.3
    )
    assert first_failure(ends).startswith("rank 0 of 2 did not end in time")
    assert (
        first_failure(
            run_local_ranks([sys.executable, "-c", "print('x' * 10**6)"], 2, limit_seconds=60)
        )
        is None
    )


def test_ranks_that_cannot_start_are_a_finding(monkeypatch):
    monkeypatch.setattr(ranks.sys, "executable", "/bin/false")
    finding = only(examine("ranks", lambda: ranks.run_ranks(2, ["gradients"], on_gpus=False)))
    assert finding.verdict == "bad" and "rank 0 of 2 ended with 1" in finding.found


def test_the_doctor_of_a_node_gets_the_environment_that_a_run_gives_it(monkeypatch):
    """Else it examines another machine than the ranks will see."""
    given = {"NCCL_IB_HCA": "mlx5_0", "PYTORCH_ALLOC_CONF": "a:b c", "SFTMIX_X": "1"}
    for name, value in {**given, "HF_TOKEN": "secret", "EDITOR": "vi"}.items():
        monkeypatch.setenv(name, value)
    words = shlex.split(nodes.remote_command(["--quick"])[-1])
    sent = dict(word.split("=", 1) for word in words[words.index("env") + 1 :] if "=" in word)
    assert sent == exports.wanted(os.environ)
    assert given.items() <= sent.items() and not {"HF_TOKEN", "EDITOR"} & sent.keys()
