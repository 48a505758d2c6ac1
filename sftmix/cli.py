"""The command line: a config file, `key=value` overrides, and one command per stage.

Heavy imports are inside the commands: `sftmix --help` must not load torch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sftmix import __version__
from sftmix.cluster.environment import launched_rank, translate
from sftmix.errors import INTERRUPTED, SftmixError, StoppedError
from sftmix.liveness import processes

if TYPE_CHECKING:
    from sftmix.config.schema import Config

STAGES = {
    "data": "read, check and encode the examples",
    "reference": "train the reference model, keeping checkpoints",
    "score": "confidence of every example over the checkpoints",
    "split": "divide the examples into confident and unconfident",
    "baseline": "train the target with next-token prediction alone",
    "train": "train the target with SFTMix",
    "evaluate": "measure the trained models on held-out examples",
    "report": "write the HTML report and print its table",
}
OTHERS = {
    "run": "the whole recipe; stages that are up to date are not run again",
    "inspect": "show examples with their tokens coloured by the response mask",
    "export": "copy a trained model to a folder of your own",
}
LAUNCH = (
    "run on the nodes of a hostfile, through DeepSpeed's launchers; or write a batch script, with"
    " --template"
)
FORCE = "replace finished work that was made with other settings"
RESTART = "discard saved progress instead of resuming"
LAUNCHERS = ("pdsh", "ssh", "torchrun", "openmpi", "slurm")
TEMPLATES = ("slurm", "kubernetes", "skypilot", "pdsh")
DOCTOR = "look for what would make a run fail or compute wrong numbers, on this machine and others"
CONFIGS = "list the configs that come with sftmix, which CONFIG takes by name"
SCORES = {
    "show": "what a score table holds, and how it was made",
    "check": "whether a score table fits the data of a config",
    "merge": "one table of several: of other examples, or of other checkpoints",
    "export": "a folder with a dataset card, ready for the Hub",
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `sftmix`. Returns the exit code: 0 success, 2 a mistake that the user can fix,
    75 stopped on request with the state saved (start again to resume), 130 the same after
    Control-C, 1 anything else."""
    _open_closed_output()
    # The deepspeed launcher adds --local_rank to the command; the environment has the same value.
    given = [
        a
        for a in (sys.argv[1:] if arguments is None else arguments)
        if not a.startswith("--local_rank")
    ]
    parser = _parser()
    options, rest = parser.parse_known_args(given)
    if any(argument.startswith("-") for argument in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest  # overrides may follow an option
    try:
        code = _dispatch(options)
        sys.stdout.flush()  # report a full disk here, not when Python exits
        return code
    except StoppedError as stopped:
        if _is_main():
            print(f"sftmix: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("sftmix: interrupted. The same command resumes from what is saved.", file=sys.stderr)
        return INTERRUPTED
    except (
        SftmixError,
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:  # RuntimeError: torch's, out of memory
        is_lost = _forget_lost_output()
        # `sftmix inspect CONFIG | head`: the reader has closed the pipe
        if is_lost and isinstance(error, BrokenPipeError):
            return 1
        from sftmix.storage.failures import explain

        known = (
            error
            if isinstance(error, SftmixError)
            else explain(error, None if is_lost else getattr(options, "writes_to", None))
        )
        # neither the user nor the machine is the cause: a bug of sftmix
        if known is None or getattr(options, "debug", False):
            raise
        for line in str(known).splitlines() if _is_main() or not known.on_all_ranks else []:
            print(f"sftmix: error: {line}", file=sys.stderr)
        return 2


def _open_closed_output() -> None:
    """Replaces a closed stdout or stderr (`>&-`) by the null device: otherwise the next file that
    is opened would receive the output."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w"))


def _forget_lost_output() -> bool:
    """Returns whether stdout can no longer be written (a closed pipe, a full disk). Python would
    report that again on exit, so buffered and later output is discarded."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return False


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


class _Parser(argparse.ArgumentParser):
    """Argument parser whose error names only what is missing, with an example."""

    MISSING = "the following arguments are required: "

    def error(self, message: str) -> NoReturn:
        """Prints usage, error and example, and exits with 2."""
        if message.startswith(self.MISSING):
            names = message.removeprefix(self.MISSING).split(", ")
            needed = [name for name in names if name != "key=value"]  # of which none is needed
            what = " and ".join(needed) + (" is missing" if len(needed) == 1 else " are missing")
            if "CONFIG" in needed:
                what += " (CONFIG: a YAML file, or a name that `sftmix configs` lists)"
            message = f"{what}. {self.epilog}"
        super().error(message)


EXAMPLES = {
    "inspect": "inspect quickstart --num 1",
    "export": "export quickstart --to my-model",
    "launch": "launch recipes/llama3.1-8b-alpaca --hostfile hostfile",
    "doctor": "doctor quickstart",
    "configs": "configs",
    "scores": "scores show runs/quickstart/confidence",
    "scores show": "scores show runs/quickstart/confidence",
    "scores check": "scores check runs/quickstart/confidence quickstart",
    "scores merge": "scores merge runs/one/confidence runs/two/confidence --to runs/both",
    "scores export": "scores export runs/quickstart/confidence --to my-scores",
}


def _texts(name: str, text: str) -> dict[str, Any]:
    """Returns the help of a command in the list of all, and in its own help."""
    example = f"Example: sftmix {EXAMPLES.get(name, f'{name} quickstart')}"
    return {"help": text, "description": text[0].upper() + text[1:] + ".", "epilog": example}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sftmix",
        description="SFTMix: instruction tuning with a confidence-guided Mixup loss, on DeepSpeed.",
        epilog="Example: sftmix run quickstart train.epochs=2",
    )
    parser.add_argument("--version", action="version", version=f"sftmix {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {"run": OTHERS["run"], **STAGES, **OTHERS}.items():
        command = commands.add_parser(name, **_texts(name, text))
        _add_config(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name in STAGES or name == "run":
            command.add_argument("--restart", action="store_true", help=RESTART)
            again = "run the stage again, and " if name in STAGES else ""
            command.add_argument("--force", action="store_true", help=again + FORCE)
        if name == "inspect":
            command.add_argument(
                "--num", type=int, default=3, metavar="N", help="examples to show (default 3)"
            )
        if name == "export":
            command.add_argument(
                "--to", type=Path, required=True, metavar="FOLDER", help="a new folder"
            )
            command.add_argument("--which", default="sftmix", help="sftmix (default) or baseline")
            command.add_argument(
                "--adapter",
                action="store_true",
                help="the LoRA adapter alone, in peft's format, not merged",
            )
    _add_launch(commands.add_parser("launch", **_texts("launch", LAUNCH)))
    _add_doctor(commands.add_parser("doctor", **_texts("doctor", DOCTOR)))
    commands.add_parser("configs", **_texts("configs", CONFIGS))
    _add_scores(
        commands.add_parser(
            "scores", **_texts("scores", "show, check, merge or export score tables")
        )
    )
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config", metavar="CONFIG", help="YAML file, or a name that `sftmix configs` lists"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replaces a field, for example train.epochs=1",
    )


def _add_launch(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="the nodes: lines of `host slots=N`"
    )
    command.add_argument(
        "--launcher", choices=LAUNCHERS, default="pdsh", help="what starts the ranks (default pdsh)"
    )
    command.add_argument(
        "--stage", choices=STAGES, help="this stage alone, in place of the whole recipe"
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="show the command, and what each node would do; start nothing",
    )
    command.add_argument(
        "--node-rank",
        type=int,
        metavar="I",
        help="with ssh and torchrun: the part of node I alone, on this machine",
    )
    command.add_argument(
        "--master-addr", metavar="HOST", help="where the ranks meet (default: the first node)"
    )
    command.add_argument(
        "--master-port",
        type=int,
        metavar="PORT",
        help="and at which port (default 29500; slurm: by the job's number)",
    )
    command.add_argument(
        "--force", action="store_true", help=f"with --stage: run it again; {FORCE}"
    )
    command.add_argument("--restart", action="store_true", help=RESTART)
    command.add_argument(
        "--template",
        choices=TEMPLATES,
        help="print a file that starts this config there, and start nothing",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --template: its values, as nodes=2 gpus=8 or nodes=2,gpus=8",
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_doctor(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="also look at what this run needs: memory, disk, network",
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replaces a field, for example run.dir=/scratch/run",
    )
    command.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="also look at these nodes, over ssh, and compare them with this one",
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="leave out what starts ranks: the gradient test and the bandwidth",
    )
    command.add_argument("--fix", action="store_true", help="remove stale build locks")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # for the doctors of other nodes
    for name, kind in (("--nodes", int), ("--ranks", int), ("--look-for", Path)):
        command.add_argument(name, type=kind, help=argparse.SUPPRESS)


def _add_scores(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="scores_command", required=True, metavar="COMMAND")
    for name, text in SCORES.items():
        command = commands.add_parser(name, **_texts(f"scores {name}", text))
        if name == "merge":
            command.add_argument(
                "tables", nargs="+", metavar="TABLE", help="folder or Hub name; two or more"
            )
        else:
            command.add_argument("table", metavar="TABLE", help="folder, Parquet file, or Hub name")
        if name == "show":
            command.add_argument(
                "--num",
                type=int,
                default=5,
                metavar="N",
                help="examples to show at either end (default 5)",
            )
            command.add_argument(
                "--column", metavar="NAME", help="column to take for the confidence"
            )
        if name == "check":
            _add_config(command)
        if name in ("merge", "export"):
            command.add_argument(
                "--to", type=Path, required=True, metavar="FOLDER", help="a new folder"
            )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _list_configs() -> None:
    """Prints names and first lines of the package's configs: those that run, then the parts of
    others."""
    from sftmix.config.shipped import CONFIGS, describe_configs

    runs = describe_configs()
    parts = {
        name: runs.pop(name)
        for name in list(runs)
        if name.startswith(("bases/", "data/", "models/"))
    }
    for title, group in (("to run", runs), ("parts of a config of your own, under `base:`", parts)):
        width = max(map(len, group))
        print(
            f"{title}:",
            *(f"  {name:<{width}}  {text}" for name, text in group.items()),
            "",
            sep="\n",
        )
    names = sorted(f"  deepspeed/{file.name}" for file in CONFIGS.glob("deepspeed/*.json"))
    print("for engine.deepspeed:", *names, "", f"files: {CONFIGS}", sep="\n")


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "configs":
        _list_configs()
        return 0
    if options.command == "doctor":
        from sftmix.doctor.command import examine_machine

        return examine_machine(options)
    if options.command == "scores" and options.scores_command != "check":
        from sftmix.confidence.commands import run

        run(options)
        return 0
    from sftmix.config.reader import load_config

    if options.command == "launch":
        from sftmix.pipeline.launching import launch_on_nodes

        return launch_on_nodes(options)
    # Find launchers before the import of torch, which takes seconds: a launcher that ends in that
    # time must be noticed.
    place = launched_rank()
    launchers = processes.launchers() if place is not None else []
    if options.command == "scores":
        from sftmix.pipeline.preflight import check_scores

        print(check_scores(options.table, options.config, options.overrides))
        return 0
    config = load_config(options.config, options.overrides)
    if options.command == "export":
        from sftmix.pipeline.export import export

        print(export(config, which=options.which, to=options.to, adapter=options.adapter))
        return 0
    translate()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.umask(0o077)  # only the user may read data and weights
    if place is not None and place.is_on_many_nodes and options.command != "inspect":
        from sftmix.cluster import rank_log

        rank_log.start(config.run.dir / "logs", place.rank)
    if _is_main():
        from sftmix.pipeline.preflight import check

        check(config)
    if options.command == "inspect":
        from sftmix.data.inspect import inspect

        inspect(config, num_examples=options.num)
        return 0
    options.writes_to = config.run.dir
    only = None if options.command == "run" else options.command
    from sftmix.pipeline.run import Request, run_pipeline

    request = Request(only, options.force, options.restart)
    if config.engine.num_processes > 1 and place is None:
        from sftmix.pipeline.launching import launch_here

        return launch_here(config, options.config, options.overrides, request)
    run_pipeline(config, request, launchers=launchers)
    if only in (None, "report") and _is_main():
        _say_what_next(config)
    return 0


def _say_what_next(config: Config) -> None:
    """Prints where the model is, and commands for the next steps. They name the run folder instead
    of the config."""
    folder = config.run.dir
    export = [_found("sftmix"), "export", str(folder), "--to", "my-model"]
    board = [_found("tensorboard"), "--logdir", str(folder / "logs/tensorboard")]
    print(f"model:  {folder / 'sftmix/model'} (a Hugging Face folder)")
    if config.baseline.enabled:
        print(f"        {folder / 'baseline/model'} (the baseline beside it)")
    print(f"report: {folder / 'report/index.html'}")
    print(f"next:   {shlex.join(export)}")
    if config.log.tensorboard:
        print(f"        {shlex.join(board)}")


def _found(command: str) -> str:
    """Returns a command as the user can type it: with its folder if the environment is not
    activated."""
    beside = Path(sys.executable).with_name(command)
    if shutil.which(command) or not beside.is_file():
        return command
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


if __name__ == "__main__":
    sys.exit(main())
