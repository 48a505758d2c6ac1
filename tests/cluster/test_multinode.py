"""`sftmix launch`: what reaches the nodes is what was given here, whatever letters are in it, and
nothing of it is run by a shell."""

import base64
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from nodes import nodes_on_this_machine, script
from processes import ROOT

from sftmix.cli import _parser
from sftmix.cluster import exports, launch_commands
from sftmix.cluster.environment import translate
from sftmix.cluster.hostfile import Node
from sftmix.cluster.run_commands import run_commands
from sftmix.errors import ConfigError
from sftmix.pipeline import launching

NODES = [Node("a", 2), Node("b", 1)]
HOSTILE = [
    "run.dir=$(touch hacked) `touch hacked` x",
    "run.dir=$(touch${IFS}hacked);touch${IFS}hacked",
    'a=it\'s "quoted" \\ and \\" $HOME',
    "b='x'\"y\"\\z&|<>*?~!#",
    "c=%n%h%u%% %n",
    "d=two\nlines here",
    "e=tab\there",
    "data.generator={num_train: 62, noisy_share: 0.2}",
    "",
    "f=\u00fc",
]
VALUES = {
    "HF_HOME": '/a b/$(touch hacked)`touch hacked`"\\;%n',
    "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
    "NCCL_SOCKET_IFNAME": "^lo,docker0",
    "GLOO_SOCKET_IFNAME": "eth0;touch hacked",
    "OMP_NUM_THREADS": "3",
}
PROBE = """
import json, os, sys
rank = os.environ["RANK"]
with open(os.environ["SFTMIX_TEST_FOLDER"] + "/" + rank, "w") as file:
    json.dump([sys.argv[1:], dict(os.environ), os.getcwd()], file)
"""


def plan(launcher, *arguments, nodes=NODES, **where):
    return launch_commands.make_plan(
        nodes, Path("hosts"), launcher, arguments, **{"address": None, "port": None, **where}
    )


def deepspeed_runner(launcher, arguments, env_file, nodes=NODES):
    """Returns what DeepSpeed's own runner starts for our command: the words of pdsh, mpirun or
    srun."""
    from deepspeed.launcher import multinode_runner, runner

    args = runner.parse_args(
        launch_commands.runner_command(plan(launcher, *arguments, nodes=nodes))[3:]
    )
    pool = {node.host: node.slots for node in nodes}
    kinds = {
        "pdsh": multinode_runner.PDSHRunner,
        "openmpi": multinode_runner.OpenMPIRunner,
        "slurm": multinode_runner.SlurmRunner,
    }
    made = kinds[launcher](args, "world", *([] if launcher == "pdsh" else [pool]))
    for line in env_file.splitlines():
        made.add_export(*line.split("=", maxsplit=1))
    active = {node.host: list(range(node.slots)) for node in nodes}
    return made.get_cmd({}, active)


def test_every_word_reaches_the_nodes_of_pdsh_unchanged(tmp_path, monkeypatch):
    """DeepSpeed's text for the shells of the nodes, read by a shell; in place of Python something
    that prints its words."""
    found, _, _ = deepspeed_runner("pdsh", HOSTILE, exports.env_file_text(VALUES, "pdsh"))
    text = (
        " ".join(found[found.index("-w") + 2 :])
        .replace("%%", "\0")
        .replace("%n", "0")
        .replace("\0", "%")
    )  # as pdsh does
    assert f"cd {Path.cwd()};" in text and sys.executable in text
    printed = [*(f'"${name}"' for name in VALUES), ""]
    text = text.replace(f"cd {Path.cwd()};", "").replace(
        sys.executable, "printf '%s\\0' " + " ".join(printed), 1
    )
    done = subprocess.run(
        ["sh", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    words = done.stdout.split("\0")[:-1]
    assert words[: len(VALUES)] == list(VALUES.values())
    assert words[-len(HOSTILE) :] == HOSTILE and list(tmp_path.iterdir()) == []


def test_the_same_words_without_our_care_are_run_by_the_shell(tmp_path, monkeypatch):
    """What this is for; if DeepSpeed quotes one day, this fails, and ours must go."""
    monkeypatch.setattr(launch_commands, "pdsh_argument", str)
    found, _, _ = deepspeed_runner(
        "pdsh", ["run.dir=$(touch hacked) x"], "HF_HOME=$(touch hacked2)\n"
    )
    text = (
        " ".join(found[found.index("-w") + 2 :])
        .replace(f"cd {Path.cwd()};", "")
        .replace(sys.executable, "echo", 1)
    )
    subprocess.run(["sh", "-c", text], cwd=tmp_path, capture_output=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hacked", "hacked2"]


def test_mpirun_gets_arguments_as_they_are_and_values_without_quotes_or_not_at_all():
    plain = {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "OMP_NUM_THREADS": "3"}
    found = deepspeed_runner("openmpi", HOSTILE, exports.env_file_text(plain, "openmpi"))
    assert (
        found[:3] == ["mpirun", "-n", "3"]
        and found[-len(HOSTILE) :] == HOSTILE
        and "NCCL_IB_HCA=mlx5_0,mlx5_1" in found
    )
    for value in ("a b", "$(id)", "a;b", "it's"):
        with pytest.raises(ConfigError, match="HF_HOME is .*DeepSpeed gives mpirun"):
            exports.env_file_text({"HF_HOME": value}, "openmpi")
        # the quotes would be a part of it
        assert f'HF_HOME="{value}"' in deepspeed_runner("openmpi", [], f"HF_HOME={value}\n")


def test_srun_is_given_the_environment_itself():
    found = exports.for_srun(VALUES)
    assert (
        found["SFTMIX_SET_NCCL_IB_HCA"] == VALUES["NCCL_IB_HCA"]
        and "NCCL_IB_HCA" not in found
        and found["HF_HOME"] == VALUES["HF_HOME"]
    )
    translate(found)
    assert found == VALUES
    with pytest.raises(ConfigError, match="PYTHONPATH is '/a b'"):
        exports.for_srun({"PYTHONPATH": "/a b"})
    words = deepspeed_runner("slurm", HOSTILE, "", nodes=[Node("a", 2), Node("b", 2)])
    assert words[:3] == ["srun", "-n", "4"] and words[-len(HOSTILE) :] == HOSTILE


def test_a_node_over_ssh_gets_one_quoted_text(tmp_path):
    *_, host, text = launch_commands.ssh_command(plan("ssh", *HOSTILE), 1, VALUES)
    there = text.split(" && exec ", 1)[1]
    words = shlex.split(there)
    assert host == "b" and words[0] == "env" and words[-len(HOSTILE) :] == HOSTILE
    printing = there.replace(sys.executable, "printf '%s\\0'", 1)
    done = subprocess.run(
        ["sh", "-c", printing], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (
        done.stdout.split("\0")[-len(HOSTILE) - 1 : -1] == HOSTILE
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.parametrize("name", ["a b", "a;b", "a$(id)", "it's", "a%n", 'a"b'])
def test_folders_that_deepspeed_does_not_quote_are_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ConfigError, match="the folder in which you are.*--launcher ssh"):
        plan("pdsh", "c.yaml")
    assert (
        f"cd -- {shlex.quote(str(tmp_path / name))} && "
        in launch_commands.ssh_command(plan("ssh", "c.yaml"), 0, {})[-1]
    )


@pytest.mark.parametrize(
    ("launcher", "nodes", "where", "words"),
    [
        ("pdsh", [Node("fe80::1", 1)], {}, "pdsh takes what is before a colon"),
        ("pdsh", [Node("localhost", 1), Node("b", 1)], {}, "the ranks would meet at localhost"),
        ("torchrun", NODES, {"address": "127.0.0.1"}, "the ranks would meet at 127.0.0.1"),
        ("slurm", NODES, {}, "slots are a 2, b 1"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(launcher, nodes, where, words):
    with pytest.raises(ConfigError, match=words):
        plan(launcher, "c.yaml", nodes=nodes, **where)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--hostfile is missing"),
        (["--hostfile", "hosts", "--set", "a=b"], "--set belongs to --template"),
        (["--hostfile", "hosts", "--master-port", "0"], "--master-port 0 is not a port"),
        (["--hostfile", "hosts", "--master-addr=-v"], "--master-addr '-v' is not a host name"),
        (
            ["--hostfile", "hosts", "--node-rank", "0"],
            "--node-rank is for --launcher ssh and torchrun",
        ),
        (
            ["--hostfile", "hosts", "--launcher", "ssh", "--node-rank", "2"],
            "has 2 nodes, counted from 0",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=2\nb slots=1\n")
    with pytest.raises(ConfigError, match=words):
        launching.plan_of(_parser().parse_args(["launch", "c.yaml", *options]))


def test_the_arguments_are_those_of_run_py(tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--stage", "train", "--force", "--restart"]
    made = launching.plan_of(_parser().parse_args(["launch", "c.yaml", "x=1", *options]))
    assert made.arguments == ("c.yaml", "x=1", "--stage", "train", "--force", "--restart")
    import importlib.util

    spec = importlib.util.spec_from_file_location("run", ROOT / "launch/run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    parsed = _parser().parse_args(run.as_command(list(made.arguments)))
    assert (
        parsed.command == "train"
        and parsed.overrides == ["x=1"]
        and parsed.force
        and parsed.restart
    )


def test_secrets_stay_here_and_the_users_own_file_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    Path(".deepspeed_env").write_text("# ours\n\nNCCL_DEBUG = INFO\nOWN=1=2\n")
    (tmp_path / "home/.deepspeed_env").write_text("NCCL_DEBUG=WARN\nHOME_ONLY=x\n")
    here = {
        "HF_TOKEN": "hf_secret",
        "HF_HOME": "/hf",
        "NCCL_DEBUG": "VERSION",
        "EDITOR": "vi",
        "TOKENIZERS_PARALLELISM": "true",
    }
    found = exports.wanted({**here, "PYTHONPATH": "/mine"}, Path("/root"))
    assert found == {
        "HF_HOME": "/hf",
        "NCCL_DEBUG": "INFO",
        "OWN": "1=2",
        "HOME_ONLY": "x",
        "PYTHONPATH": "/root:/mine",
        "TOKENIZERS_PARALLELISM": "true",
    }
    with launching._for_runner(
        plan("pdsh"), {**here, "MLFLOW_TRACKING_URI": "$(touch hacked)", "UCX_TLS": "tcp"}
    ) as environment:
        assert (
            Path(environment["DS_ENV_FILE"]).stat().st_mode & 0o077 == 0
            and "hf_secret" not in Path(environment["DS_ENV_FILE"]).read_text()
        )
        assert (
            "MLFLOW_TRACKING_URI" not in environment
            and environment["UCX_TLS"] == "tcp"
            and environment["HF_TOKEN"] == "hf_secret"
        )
    assert not Path(environment["DS_ENV_FILE"]).exists() and Path(
        ".deepspeed_env"
    ).read_text().startswith("# ours")
    Path(".deepspeed_env").write_text("export A=1\n")
    with pytest.raises(ConfigError, match=r"\.deepspeed_env:1: found 'export A=1'"):
        exports.wanted({}, Path("/root"))
    Path(".deepspeed_env").unlink()
    with pytest.raises(ConfigError, match="HF_HOME holds a line break"):
        exports.wanted({"HF_HOME": "a\nb"}, Path("/root"))


@pytest.mark.parametrize(
    ("code", "outcome", "is_published", "expected"),
    [
        (0, 0, True, 0),
        (255, 0, True, 0),  # the connection broke when all was done
        (0, None, True, 1),  # pdsh was killed; what is there is of an earlier start
        (0, 0, False, 1),
        (0, None, False, 1),
        (1, 75, False, 75),  # torchrun
        (0, 75, True, 75),
        (2, None, False, 2),
        (-9, None, False, 137),
    ],
)
def test_the_exit_code_says_what_was_published(tmp_path, code, outcome, is_published, expected):
    if is_published:
        (tmp_path / "manifest.json").touch()
    assert launching.judge(code, outcome, tmp_path / "manifest.json") == expected


# Real processes.


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["pdsh", "ssh", "torchrun"])
def test_ranks_on_two_nodes_see_arguments_and_environment_as_they_were_given(
    tmp_path, monkeypatch, launcher
):
    from shutil import which

    if launcher == "pdsh" and which("pdsh") is None:
        pytest.skip("there is no pdsh here")
    (tmp_path / "probe.py").write_text(PROBE)
    for module in (launch_commands,):
        monkeypatch.setattr(module, "RUN_SCRIPT", tmp_path / "probe.py")
    environment = {
        **os.environ,
        **VALUES,
        **nodes_on_this_machine(tmp_path),
        "SFTMIX_TEST_FOLDER": str(tmp_path / "found"),
    }
    (tmp_path / "found").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("hosts").write_text("a slots=2\nb slots=1\n")
    made = plan(launcher, *HOSTILE, port=29517)
    if launcher == "torchrun":  # its agents really meet
        made = plan(launcher, *HOSTILE, address="127.0.0.2", port=29517)
    if launcher == "pdsh":
        with launching._for_runner(made, environment) as prepared:
            assert run_commands([launch_commands.runner_command(made)], prepared) == 0
    else:
        variables = exports.wanted(environment, exports.PACKAGE_ROOT)
        assert (
            run_commands(
                [launch_commands.ssh_command(made, number, variables) for number in (0, 1)],
                environment,
            )
            == 0
        )
    check_probes(tmp_path, VALUES)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["hosts"]


def check_probes(tmp_path, values):
    """What three ranks of two nodes saw is what was given."""
    for rank in range(3):
        arguments, seen, folder = json.loads((tmp_path / "found" / str(rank)).read_text())
        assert arguments == HOSTILE and folder == str(tmp_path / "work")
        assert {name: seen[name] for name in values} == values
        assert (seen["NODE"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == [
            ("a", "0", "3"),
            ("a", "1", "3"),
            ("b", "0", "3"),
        ][rank]
        translate(seen)
        assert seen["LOCAL_WORLD_SIZE"] == "221"[rank] and seen["PYTHONPATH"].split(":")[0] == str(
            ROOT
        )


SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
number, exported, command = int(words[words.index("-n") + 1]), words[2], words[3:]
assert words[0] == "-n" and exported.startswith("--export=ALL")
for part in exported.split(",")[1:]:  # a comma ends a value; a name without one keeps what it has
    name, sign, value = part.partition("=")
    if sign:
        os.environ[name] = value
step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "9", "SLURM_STEP_NUM_TASKS": str(number)}
step["SLURM_STEP_TASKS_PER_NODE"] = "2(x2)"
step["SLURM_STEP_NODELIST"] = "node[1-2]"
names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
tasks = [dict(zip(names, map(str, (i, i % 2, i // 2)))) for i in range(number)]
started = [subprocess.Popen(command, env={**os.environ, **step, **task}) for task in tasks]
sys.exit(max([p.wait() for p in started]))
"""
MPIRUN = """
import os, subprocess, sys
words = sys.argv[1:]
number = int(words[words.index("-n") + 1])
given = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-x")
command = words[max(at for at, word in enumerate(words) if word == "-x") + 2 :]
own = {name: os.environ[name] for name in ("PATH", "HOME")}
names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
ranks = [dict(zip(names, map(str, (i, i % 2)))) for i in range(number)]
size = {"OMPI_COMM_WORLD_SIZE": str(number), "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
started = [subprocess.Popen(command, env={**own, **given, **size, **rank}) for rank in ranks]
sys.exit(max([p.wait() for p in started]))
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "code", "beside"), [("slurm", SRUN, "sinfo"), ("openmpi", MPIRUN, "ompi_info")]
)
def test_ranks_of_srun_and_mpirun_see_the_same(tmp_path, monkeypatch, launcher, code, beside):
    """DeepSpeed's runner is real; srun and mpirun are ours, and set what the real ones document."""
    (tmp_path / "probe.py").write_text(
        "from sftmix.cluster.environment import translate\ntranslate()\n" + PROBE
    )
    monkeypatch.setattr(launch_commands, "RUN_SCRIPT", tmp_path / "probe.py")
    script(tmp_path / "bin", {"slurm": "srun", "openmpi": "mpirun"}[launcher], code)
    script(tmp_path / "bin", beside, "")
    values = (
        VALUES
        if launcher == "slurm"
        else {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1", "HF_HOME": "/hf", "OMP_NUM_THREADS": "3"}
    )
    environment = {
        **os.environ,
        **values,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SFTMIX_TEST_FOLDER": str(tmp_path),
    }
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=2\nb slots=2\n")
    made = plan(launcher, *HOSTILE, nodes=[Node("a", 2), Node("b", 2)])
    with launching._for_runner(made, environment) as prepared:
        assert run_commands([launch_commands.runner_command(made)], prepared) == 0
    for rank in range(4):
        arguments, seen, folder = json.loads((tmp_path / str(rank)).read_text())
        assert (
            arguments == HOSTILE
            and folder == str(tmp_path)
            and {name: seen[name] for name in values} == values
        )
        assert (seen["WORLD_SIZE"], seen["LOCAL_RANK"], seen["LOCAL_WORLD_SIZE"]) == (
            "4",
            str(rank % 2),
            "2",
        )
        assert seen["MASTER_ADDR"] == {"slurm": "node1", "openmpi": "a"}[launcher]


@pytest.mark.parametrize(
    ("launcher", "program"),
    [("pdsh", "pdsh"), ("ssh", "ssh"), ("openmpi", "mpirun"), ("slurm", "srun")],
)
def test_a_launcher_whose_program_is_missing_is_refused(launcher, program, monkeypatch):
    from sftmix.pipeline.launching import _check_programs

    monkeypatch.setattr(
        "shutil.which", lambda name: None if name == program else f"/usr/bin/{name}"
    )
    with pytest.raises(
        ConfigError,
        match=f"--launcher {launcher} needs the program {program}, which is not in PATH",
    ):
        _check_programs(launcher)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    _check_programs(launcher)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("", [0, 1]), ("2,3", ["2", "3"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b"])],
)
def test_ranks_of_this_machine_get_the_devices_that_are_visible(visible, expected):
    command = launch_commands.local_command(
        launch_commands.devices_of_ranks(2, visible), ["c.yaml"], port=1
    )
    (given,) = [word for word in command if word.startswith("--world_info=")]
    world = json.loads(base64.urlsafe_b64decode(given.removeprefix("--world_info=")))
    assert world == {"localhost": expected} and command[-1] == "c.yaml"


def test_more_ranks_than_visible_devices_are_refused():
    with pytest.raises(
        ConfigError, match="num_processes is 3, and CUDA_VISIBLE_DEVICES=0,1 names 2"
    ):
        launch_commands.devices_of_ranks(3, "0,1")
