"""The files for batch systems: what they start is a command of ours, nothing in them is run that
was not meant to be, and signals and exit codes go through."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from nodes import script
from processes import sftmix

from sftmix.cli import TEMPLATES, _parser, main
from sftmix.cluster.templates import FILES, FOLDER, VALUES, render
from sftmix.config.schema import Config
from sftmix.errors import ConfigError

GIVEN = {
    "slurm": {"nodes": "2", "gpus": "4", "time": "24:00:00", "partition": "a100"},
    "kubernetes": {
        "nodes": "2",
        "gpus": "4",
        "image": "registry.example/sftmix:1",
        "claim": "runs",
        "folder": "/shared/sftmix",
    },
    "skypilot": {"nodes": "2", "gpus": "4", "accelerator": "H100"},
    "pdsh": {"hostfile": "/etc/hosts-of-the-run"},
}
ARGUMENTS = [
    "configs/quickstart.yaml",
    'run.dir=it\'s $(touch hacked) `touch hacked`;"x" # %n',
    "a={b: [1, 2]}",
    "--stage",
    "score",
]


def rendered(template, **more):
    return render(template, {**GIVEN[template], **more}, ARGUMENTS, doctor_arguments=ARGUMENTS[:3])


def scripts_of(template, text):
    """Returns the shell scripts in a file, by name."""
    if template in ("slurm", "pdsh"):
        return {template: text}
    documents = list(yaml.safe_load_all(text))
    if template == "kubernetes":
        return {"run": next(d for d in documents if d["kind"] == "ConfigMap")["data"]["run.sh"]}
    return {name: documents[0][name] for name in ("setup", "run")}


def test_every_template_is_known_and_there():
    assert set(TEMPLATES) == set(FILES) == set(VALUES) and {
        path.name for path in FOLDER.iterdir()
    } == set(FILES.values())


@pytest.mark.parametrize("template", TEMPLATES)
def test_bash_can_read_it_and_our_parser_takes_the_command(template, tmp_path):
    found = []
    for name, text in scripts_of(template, rendered(template)).items():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        if shutil.which("shellcheck"):
            command = ["shellcheck", "--shell=bash", "--severity=warning", "-"]
            assert subprocess.run(command, input=text, text=True, check=False).returncode == 0, name
        for line in text.replace("\\\n", " ").splitlines():
            if "sftmix.cli" in line:
                words = [word for word in shlex.split(line.removesuffix(" &")) if word != "exec"]
                options = words[words.index("sftmix.cli") + 1 :]
                found.append(
                    _parser().parse_args(
                        [
                            word.replace("$JOB_COMPLETION_INDEX", "1").replace(
                                "$SKYPILOT_NODE_RANK", "1"
                            )
                            for word in options
                        ]
                    )
                )
    launch = found[-1]
    assert (
        [*launch.overrides] == ARGUMENTS[1:3]
        and launch.config == ARGUMENTS[0]
        and launch.stage == "score"
        and launch.hostfile is not None
    )
    assert launch.launcher == {"slurm": "slurm", "pdsh": "pdsh"}.get(template, "ssh")
    assert launch.node_rank == (1 if template in ("kubernetes", "skypilot") else None)


def test_the_kubernetes_job_has_as_many_pods_as_nodes_and_is_made_anew_on_75():
    service, config, job = yaml.safe_load_all(rendered("kubernetes", name="alpaca"))
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == "alpaca"
    assert config["data"]["hostfile"] == "alpaca-0.alpaca slots=4\nalpaca-1.alpaca slots=4\n"
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    } == {
        75: "Ignore",
        2: "FailJob",
    }
    # without either no pod failure policy, no names
    assert pod["restartPolicy"] == "Never" and pod["subdomain"] == "alpaca"
    assert (
        service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    )
    container = pod["containers"][0]
    assert (
        container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
        and container["name"] == "sftmix"
    )
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_the_slurm_directives_stand_before_the_first_command():
    lines = rendered("slurm").splitlines()
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "time=24:00:00",
        "signal=B:USR1@600",
        "requeue",
        "open-mode=append",
    } <= set(directives)
    assert "partition=a100" in directives and not any(
        line.startswith(("account", "qos")) for line in directives
    )
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])


HOSTILE = [
    "",
    "x\ny",
    "$(touch hacked)",
    "a;b",
    "a b",
    "-x",
    "'",
    '"',
    "1\n#SBATCH --uid=0",
    "{a: b}",
    "a: b",
    "\u00fc",
]


@pytest.mark.parametrize(
    ("template", "name"), [(template, name) for template in TEMPLATES for name in VALUES[template]]
)
def test_hostile_values_are_refused(template, name):
    for value in HOSTILE:
        if value == VALUES[template][name].default:
            continue
        with pytest.raises(ConfigError, match=f"--set {name}=.* cannot be: "):
            rendered(template, **{name: value})


@pytest.mark.parametrize(
    ("template", "more", "words"),
    [
        ("slurm", ["--set", "nodes=2"], "also needs --set gpus=.*--set time=.*24:00:00"),
        ("slurm", ["--set", "node=2"], "slurm has no such value. Did you mean `nodes`"),
        ("slurm", ["--set", "nodes"], "expected NAME=VALUE"),
        ("slurm", ["--hostfile", "h"], "--hostfile does nothing with --template slurm"),
        ("pdsh", ["--set", "hostfile=/h", "run.dir=a\nb"], "holds a line break"),
        ("pdsh", ["--set", "hostfile=/h", "run.dri=a"], "run.dri"),
    ],
)
def test_what_is_missing_or_wrong_is_said(template, more, words):
    from sftmix.pipeline.launching import launch_on_nodes

    options = _parser().parse_args(
        ["launch", "configs/quickstart.yaml", *more[2:], "--template", template, *more[:2]]
    )
    with pytest.raises(ConfigError, match=words):
        launch_on_nodes(options)


def test_the_command_prints_it():
    done = sftmix(
        "launch",
        "configs/quickstart.yaml",
        "train.epochs=2",
        "--template",
        "pdsh",
        "--set",
        "hostfile=/h",
    )
    assert (
        done.stdout.startswith("#!/bin/bash\n")
        and "launch configs/quickstart.yaml train.epochs=2 --hostfile /h --launcher pdsh"
        in done.stdout
    )


@pytest.mark.parametrize(
    "given",
    [
        ["--set", "nodes=2", "--set", "gpus=4", "--set", "time=1:00"],
        ["--set", "nodes=2", "gpus=4", "time=1:00"],
        ["--set", "nodes=2,gpus=4,time=1:00"],
        ["--set", "nodes=2,", "gpus=4,", "time=1:00"],
    ],
)
def test_several_pairs_behind_set(given, capsys):
    assert main(["launch", "quickstart", "train.epochs=2", "--template", "slurm", *given]) == 0
    printed = capsys.readouterr().out
    assert "--nodes=2\n" in printed and "per-node=4\n" in printed and "--time=1:00\n" in printed
    assert "launch quickstart train.epochs=2 --hostfile" in printed


def test_the_help_of_set_shows_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    shown = re.search(r"its values, as (.*?) or (\S+)", " ".join(capsys.readouterr().out.split()))
    for words in (shown[1].split(), [shown[2]]):
        assert (
            main(
                [
                    "launch",
                    "quickstart",
                    "--template",
                    "slurm",
                    "--set",
                    *words,
                    "--set",
                    "time=1:00",
                ]
            )
            == 0
        )
        assert "--nodes=2\n" in capsys.readouterr().out


def test_a_comma_within_a_value_is_the_values_own(capsys):
    main(["launch", "quickstart", "--template", "pdsh", "--set", "folder=/a,b=c/d,hostfile=/h"])
    assert "cd -- /a,b=c/d\n" in capsys.readouterr().out


def test_no_key_of_a_config_has_the_name_of_a_value():
    assert not {name for values in VALUES.values() for name in values} & set(Config.model_fields)


PYTHON = """
import os, signal, sys, time
def take(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    if os.environ.get("LATE"):
        time.sleep(1)
    sys.exit(int(os.environ["CODE"]))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, take)
print(open(sys.argv[sys.argv.index("--hostfile") + 1]).read(), sys.argv[3:], flush=True)
if os.environ.get("WAIT"):
    time.sleep(30)
sys.exit(int(os.environ["CODE"]))
"""


@pytest.mark.parametrize(
    ("code", "sent", "is_requeued"),
    [
        (0, None, False),
        (75, None, True),
        (1, None, False),
        (75, signal.SIGUSR1, True),
        (75, signal.SIGTERM, False),
        (137, None, False),
    ],
)
def test_the_slurm_script_hands_signals_on_and_requeues_on_75(tmp_path, code, sent, is_requeued):
    commands = tmp_path / "bin"
    script(commands, "python", PYTHON)
    script(
        commands,
        "scontrol",
        "import sys\nprint('n1\\nn2' if sys.argv[1] == 'show' else 'scontrol ' + '"
        " '.join(sys.argv[1:]))\n",
    )
    text = rendered("slurm", python=str(commands / "python"), folder=str(tmp_path))
    environment = {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "CODE": str(code),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
    }
    environment |= {"WAIT": "1", "LATE": "1"} if sent else {}
    (tmp_path / "job.sh").write_text(text)
    process = subprocess.Popen(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = process.stdout.readline()
    if sent:
        time.sleep(0.5)
        process.send_signal(sent)
    output = first + process.stdout.read()
    process.wait(60)
    process.stdout.close()
    assert process.returncode == code and ("scontrol requeue 7" in output) == is_requeued, output
    assert "n1 slots=4\nn2 slots=4" in output and repr(ARGUMENTS[1]) in output
    assert sent is None or f"got {sent.name}" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "job.sh"]
