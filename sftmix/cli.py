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
from sftmix.cluster.liveness import processes
from sftmix.errors import INTERRUPTED, SftmixError, StoppedError

if TYPE_CHECKING:
    from sftmix.config.schema import Config

STAGES = {
    "data": "read, check and encode the examples",
    "reference": "train the reference model, keeping checkpoints",
    "score": "confidence of every example over the checkpoints",
    "split": "divide the examples into confident and unconfident",
    "baseline": "train the target with next-token prediction alone",
    "train": "train the target with SFTMix",
    "evaluate": "measure the trained models, or a model folder, on held-out examples",
    "report": "write the HTML report and print its table",
}
FORCE = "replace finished work that was made with other settings"
LAUNCHERS = ("pdsh", "ssh", "torchrun", "openmpi", "slurm")
TEMPLATES = ("slurm", "kubernetes", "skypilot", "pdsh")

# of argparse: the names of arguments, and what `add_argument` is told of them
Arguments = dict[str, dict[str, Any]]
CONFIG: Arguments = {
    "config": {
        "metavar": "CONFIG",
        "help": "YAML file, or a name that `sftmix configs` lists",
    },
    "overrides": {
        "nargs": "*",
        "metavar": "key=value",
        "help": "replaces a field, for example train.epochs=1",
    },
}
DEBUG: Arguments = {"--debug": {"action": "store_true", "help": "show the traceback of an error"}}
RESTART: Arguments = {
    "--restart": {"action": "store_true", "help": "discard saved progress instead of resuming"}
}
RUN: Arguments = {
    **CONFIG,
    **DEBUG,
    **RESTART,
    "--force": {"action": "store_true", "help": FORCE},
}
STAGE: Arguments = {
    **RUN,
    "--force": {"action": "store_true", "help": f"run the stage again, and {FORCE}"},
}
TO: Arguments = {
    "--to": {"type": Path, "required": True, "metavar": "FOLDER", "help": "a new folder"}
}
EXPORT: Arguments = {
    "--to": {"type": Path, "metavar": "FOLDER", "help": "a new folder"},
    "--push": {
        "metavar": "OWNER/NAME",
        "help": "a repository on the Hugging Face Hub, private; made where it does not exist",
    },
    "--public": {"action": "store_true", "help": "with --push: for everybody to see"},
    "--replace": {
        "action": "store_true",
        "help": "with --push: take the place of files that the repository holds",
    },
}
TABLE: Arguments = {
    "table": {"metavar": "TABLE", "help": "folder, Parquet file, or Hub name"},
}

MODEL: dict[str, Any] = {
    "metavar": "MODEL",
    "help": "Hugging Face folder, finished run folder, or Hub name",
}


def _at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected 1 or more")
    return number


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}, expected more than 0")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}, expected 0 or more")
    return value


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"{text}, expected key=value")
    return name, yaml.safe_load(value)


# command -> its line in the list of all, and its arguments in the order of its help
COMMANDS: dict[str, tuple[str, Arguments]] = {
    "run": ("the whole recipe; stages that are up to date are not run again", RUN),
    **{stage: (text, STAGE) for stage, text in STAGES.items()},
    "study": (
        "several arms, several seeds each: run what is missing, and say what differs",
        {
            **RUN,
            "--only-seeds": {
                "type": int,
                "nargs": "+",
                "metavar": "SEED",
                "help": "these seeds alone, for example one per job of an array",
            },
            "--jobs": {
                "type": _at_least_one,
                "default": 1,
                "metavar": "N",
                "help": "processes side by side, each with its share of the seeds (default 1)",
            },
            "--output": {"type": Path, "help": argparse.SUPPRESS},  # of a job
        },
    ),
    "inspect": (
        "show examples with their tokens coloured by the response mask",
        {
            **CONFIG,
            **DEBUG,
            "--num": {
                "type": _at_least_one,
                "default": 3,
                "metavar": "N",
                "help": "examples to show (default 3)",
            },
        },
    ),
    "export": (
        "copy a trained model to a folder of your own, or to the Hugging Face Hub",
        {
            **CONFIG,
            **DEBUG,
            **EXPORT,
            "--which": {"default": "sftmix", "help": "sftmix (default) or baseline"},
            "--adapter": {
                "action": "store_true",
                "help": "the LoRA adapter alone, in peft's format, not merged",
            },
        },
    ),
    "chat": (
        "talk to a model in the terminal, or to two side by side",
        {
            "model": MODEL,
            "--against": {"metavar": "MODEL", "help": "a second model, beside the first"},
            "--system": {"metavar": "TEXT", "help": "the system prompt (default: none)"},
            "--max-new-tokens": {
                "type": _at_least_one,
                "default": 512,
                "metavar": "N",
                "help": "most tokens of an answer (default 512)",
            },
            "--temperature": {
                "type": _temperature,
                "metavar": "T",
                "help": "0: always the likeliest token (default: the model's own settings)",
            },
            **DEBUG,
        },
    ),
    "tasks": (
        "published tasks (MedQA, PubMedQA, MedMCQA, GSM8K) by lm-evaluation-harness, models side by"
        " side",
        {
            "models": {"nargs": "+", **MODEL},
            "--tasks": {
                "nargs": "+",
                "required": True,
                "metavar": "NAME[=FILE]",
                "help": "medqa, pubmedqa, medmcqa or gsm8k with their published file; other names"
                " of the harness, which loads them from the Hub",
            },
            "--to": {
                "type": Path,
                "metavar": "FOLDER",
                "help": "for the results (default: `tasks` in a run folder that is given alone)",
            },
            "--limit": {
                "type": _at_least_one,
                "metavar": "N",
                "help": "N questions of each task, drawn from its file (by name: the first)",
            },
            "--shots": {
                "type": int,
                "metavar": "N",
                "help": "examples before each question (default: none with a file)",
            },
            "--shots-from": {
                "nargs": "+",
                "default": [],
                "metavar": "NAME=FILE",
                "help": "where the examples of a task with a file come from",
            },
            "--chat-template": {
                "action": "store_true",
                "help": "put each question into the model's chat template",
            },
            "--batch-size": {
                "default": "8",
                "metavar": "N",
                "help": "requests per forward, or auto (default 8)",
            },
            "--backend": {
                "default": "hf",
                "metavar": "NAME",
                "help": "a model class of the harness, for example vllm (default hf)",
            },
            "--model-args": {
                "nargs": "+",
                "default": [],
                "type": _setting,
                "metavar": "key=value",
                "help": "further arguments of it, for example parallelize=true",
            },
            "--force": {"action": "store_true", "help": FORCE},
            **DEBUG,
        },
    ),
    "answers": (
        "write a model's answers to MT-Bench or AlpacaEval, for FastChat and alpaca_eval",
        {
            "models": {"nargs": "+", **MODEL},
            "--questions": {
                "type": Path,
                "required": True,
                "metavar": "FILE",
                "help": "mt_bench_questions.jsonl, or AlpacaEval's list of instructions",
            },
            **TO,
            "--limit": {
                "type": _at_least_one,
                "metavar": "N",
                "help": "first N questions alone",
            },
            "--max-new-tokens": {
                "type": _at_least_one,
                "default": 1024,
                "metavar": "N",
                "help": "most tokens of an answer (default 1024)",
            },
            "--temperature": {
                "type": _temperature,
                "metavar": "T",
                "help": "0: greedy (default: MT-Bench by category, else the model's settings)",
            },
            "--seed": {"type": int, "default": 0, "help": "of sampled answers (default 0)"},
            "--batch-size": {"type": _at_least_one, "metavar": "N", "help": "answers at once"},
            "--backend": {
                "choices": ("transformers", "vllm"),
                "default": "transformers",
                "help": "what generates (default transformers)",
            },
            "--force": {"action": "store_true", "help": FORCE},
            **DEBUG,
        },
    ),
    "judge": (
        "rate the answers of a folder by a judge behind an OpenAI-compatible endpoint",
        {
            "folder": {"type": Path, "metavar": "FOLDER", "help": "of `sftmix answers`"},
            "--judge": {"required": True, "metavar": "NAME", "help": "the judge's name there"},
            "--endpoint": {"metavar": "URL", "help": "up to /v1 (default: OpenAI's)"},
            "--key-variable": {
                "default": "OPENAI_API_KEY",
                "metavar": "NAME",
                "help": "environment variable of the API key (default OPENAI_API_KEY)",
            },
            "--price": {
                "type": float,
                "nargs": 2,
                "metavar": ("PROMPT", "ANSWER"),
                "help": "USD per million tokens, to say what it costs before it is asked",
            },
            "--yes": {"action": "store_true", "help": "agree to the price"},
            "--control": {"metavar": "NAME", "help": "the model that others are compared with"},
            "--parallel": {"type": _at_least_one, "default": 8, "help": "requests at once (8)"},
            "--timeout": {"type": float, "default": 120.0, "help": "seconds for an answer (120)"},
            "--retries": {"type": int, "default": 5, "help": "after a failure that may pass (5)"},
            "--prompts": {
                "type": Path,
                "metavar": "FILE",
                "help": "MT-Bench: FastChat's judge_prompts.jsonl (default: prompts of our own)",
            },
            "--references": {
                "type": Path,
                "metavar": "FILE",
                "help": "MT-Bench: FastChat's reference_answer/gpt-4.jsonl",
            },
            "--against": {
                "type": Path,
                "metavar": "FILE",
                "help": "AlpacaEval: outputs of the reference model",
            },
            "--annotator": {
                "default": "weighted_alpaca_eval_gpt4_turbo",
                "metavar": "NAME",
                "help": "AlpacaEval: an annotator of alpaca_eval (default: AlpacaEval 2's)",
            },
            "--length-data": {
                "type": Path,
                "metavar": "FILE",
                "help": "AlpacaEval: df_gamed.csv, where the Hub cannot be reached",
            },
            **DEBUG,
        },
    ),
    "launch": (
        "run on the nodes of a hostfile, through DeepSpeed's launchers; or write a batch script,"
        " with --template",
        {
            **CONFIG,
            "--hostfile": {
                "type": Path,
                "metavar": "FILE",
                "help": "the nodes: lines of `host slots=N`",
            },
            "--launcher": {
                "choices": LAUNCHERS,
                "default": "pdsh",
                "help": "what starts the ranks (default pdsh)",
            },
            "--stage": {
                "choices": STAGES,
                "help": "this stage alone, in place of the whole recipe",
            },
            "--dry-run": {
                "action": "store_true",
                "help": "show the command, and what each node would do; start nothing",
            },
            "--node-rank": {
                "type": int,
                "metavar": "I",
                "help": "with ssh and torchrun: the part of node I alone, on this machine",
            },
            "--master-addr": {
                "metavar": "HOST",
                "help": "where the ranks meet (default: the first node)",
            },
            "--master-port": {
                "type": int,
                "metavar": "PORT",
                "help": "and at which port (default 29500; slurm: by the job's number)",
            },
            "--force": {"action": "store_true", "help": f"with --stage: run it again; {FORCE}"},
            **RESTART,
            "--template": {
                "choices": TEMPLATES,
                "help": "print a file that starts this config there, and start nothing",
            },
            "--set": {
                "action": "append",
                "default": [],
                "metavar": "NAME=VALUE",
                "help": "with --template: its values, as nodes=2 gpus=8 or nodes=2,gpus=8",
            },
            **DEBUG,
        },
    ),
    "plan": (
        "what a run needs, before it starts: memory, network, time, price, disk",
        {
            "config": {**CONFIG["config"], "nargs": "?"},
            "overrides": CONFIG["overrides"],
            "--gpus": {
                "type": _at_least_one,
                "default": 8,
                "metavar": "N",
                "help": "GPUs of the run (default 8)",
            },
            "--gpu": {
                "default": "H100",
                "metavar": "TYPE",
                "help": "H100 (default), H200, A100, ..., or a file of --calibrate",
            },
            "--nodes": {
                "type": _at_least_one,
                "metavar": "K",
                "help": "over which they are spread (default: 8 GPUs each)",
            },
            "--interconnect": {
                "type": _positive,
                "default": 3200.0,
                "metavar": "GBPS",
                "help": "network of a node in Gb/s (default 3200: eight adapters of 400)",
            },
            "--price": {"type": _positive, "metavar": "USD", "help": "of a GPU for an hour"},
            "--examples": {
                "type": _at_least_one,
                "metavar": "N",
                "help": "examples, where the data are not prepared",
            },
            "--tokens": {
                "type": _positive,
                "metavar": "MEAN",
                "help": "tokens of an example, where the data are not prepared",
            },
            "--sweep": {"metavar": "gpus=8,16,...,1024", "help": "a line for each number of GPUs"},
            "--to": {"type": Path, "metavar": "FOLDER", "help": "also write plan.json and a page"},
            "--json": {"action": "store_true", "help": "print one JSON object instead of lines"},
            "--calibrate": {
                "type": Path,
                "metavar": "FILE",
                "help": "measure --gpus ranks of this machine's CPU instead, for --gpu FILE",
            },
            **DEBUG,
        },
    ),
    "scale": (
        "how far a step goes: simulated over GPUs, models, layouts and networks",
        {**CONFIG, **DEBUG},
    ),
    "doctor": (
        "look for what would make a run fail or compute wrong numbers, on this machine and others",
        {
            "config": {
                "nargs": "?",
                "metavar": "CONFIG",
                "help": "also look at what this run needs: memory, disk, network",
            },
            "overrides": {
                "nargs": "*",
                "metavar": "key=value",
                "help": "replaces a field, for example run.dir=/scratch/run",
            },
            "--hostfile": {
                "type": Path,
                "metavar": "FILE",
                "help": "also look at these nodes, over ssh, and compare them with this one",
            },
            "--json": {
                "action": "store_true",
                "help": "print one JSON object instead of lines",
            },
            "--quick": {
                "action": "store_true",
                "help": "leave out what starts ranks: the gradient test and the bandwidth",
            },
            "--fix": {"action": "store_true", "help": "remove stale build locks"},
            **DEBUG,
            # for the doctors of other nodes
            "--nodes": {"type": int, "help": argparse.SUPPRESS},
            "--ranks": {"type": int, "help": argparse.SUPPRESS},
            "--look-for": {"type": Path, "help": argparse.SUPPRESS},
        },
    ),
    "configs": ("list the configs that come with sftmix, which CONFIG takes by name", {}),
    "config": (
        "print the JSON schema of a config, for editors that complete and check YAML",
        {"what": {"choices": ["schema"]}},
    ),
    "scores": ("show, check, merge or export score tables", {}),
}
SCORES: dict[str, tuple[str, Arguments]] = {
    "scores show": (
        "what a score table holds, and how it was made",
        {
            **TABLE,
            "--num": {
                "type": _at_least_one,
                "default": 5,
                "metavar": "N",
                "help": "examples to show at either end (default 5)",
            },
            "--column": {"metavar": "NAME", "help": "column to take for the confidence"},
            **DEBUG,
        },
    ),
    "scores check": (
        "whether a score table fits the data of a config",
        {**TABLE, **CONFIG, **DEBUG},
    ),
    "scores merge": (
        "one table of several: of other examples, or of other checkpoints",
        {
            "tables": {
                "nargs": "+",
                "metavar": "TABLE",
                "help": "folder or Hub name; two or more",
            },
            **TO,
            **DEBUG,
        },
    ),
    "scores export": (
        "a folder with a dataset card, ready for the Hub or pushed to it",
        {**TABLE, **EXPORT, **DEBUG},
    ),
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
    "scale": "scale scaling/networks",
    "plan": "plan recipes/llama3.1-8b-alpaca --gpus 8 --gpu H100",
    "launch": "launch recipes/llama3.1-8b-alpaca --hostfile hostfile",
    "study": "study studies/quickstart",
    "chat": "chat runs/quickstart --against runs/quickstart/baseline/model",
    "tasks": "tasks runs/quickstart --tasks gsm8k=test.jsonl --limit 200",
    "answers": "answers runs/quickstart --questions mt_bench_questions.jsonl --to answers",
    "judge": "judge answers --judge gpt-4 --price 30 60",
    "configs": "configs",
    "config": "config schema > sftmix.schema.json",
    "scores": "scores show runs/quickstart/confidence",
    "scores show": "scores show runs/quickstart/confidence",
    "scores check": "scores check runs/quickstart/confidence quickstart",
    "scores merge": "scores merge runs/one/confidence runs/two/confidence --to runs/both",
    "scores export": "scores export runs/quickstart/confidence --to my-scores",
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sftmix",
        description="SFTMix: instruction tuning with a confidence-guided Mixup loss, on DeepSpeed.",
        epilog="Example: sftmix run quickstart train.epochs=2",
    )
    parser.add_argument("--version", action="version", version=f"sftmix {__version__}")
    scores = _add_commands(parser, "command", COMMANDS)["scores"]
    _add_commands(scores, "scores_command", SCORES)
    return parser


def _add_commands(
    parser: argparse.ArgumentParser, dest: str, commands: dict[str, tuple[str, Arguments]]
) -> dict[str, argparse.ArgumentParser]:
    """Adds commands with their help to a parser. Returns their parsers, by name."""
    group = parser.add_subparsers(dest=dest, required=True, metavar="COMMAND")
    for name, (text, arguments) in commands.items():
        command = group.add_parser(
            name.removeprefix("scores "),
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"Example: sftmix {EXAMPLES.get(name, f'{name} quickstart')}",
        )
        for argument, settings in arguments.items():
            command.add_argument(argument, **settings)
    return group.choices


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
    studies = {name: runs.pop(name) for name in list(runs) if name.startswith("studies/")}
    scaling = {name: runs.pop(name) for name in list(runs) if name.startswith("scaling/")}
    for title, group in (
        ("to run", runs),
        ("for `sftmix study`", studies),
        ("for `sftmix scale`", scaling),
        ("parts of a config of your own, under `base:`", parts),
    ):
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
    if options.command == "config":
        import json

        from sftmix.config.shipped import json_schema

        print(json.dumps(json_schema(), indent=2))
        return 0
    if options.command == "doctor":
        from sftmix.doctor.command import examine_machine

        return examine_machine(options)
    if options.command == "scores" and options.scores_command != "check":
        from sftmix.confidence.commands import run

        run(options)
        return 0
    if options.command == "chat":
        from sftmix.evaluation.chat import chat

        chat(
            [model for model in (options.model, options.against) if model is not None],
            system=options.system,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
        )
        return 0
    if options.command == "tasks":
        from sftmix.evaluation.tasks.command import run_tasks

        run_tasks(options)
        return 0
    if options.command == "plan":
        from sftmix.planning.command import plan_run

        return plan_run(options)
    if options.command == "scale":
        from sftmix.planning.scaling import scale

        scale(options)
        return 0
    if options.command == "answers":
        from sftmix.evaluation.judges.answers import write_all_answers

        write_all_answers(options)
        return 0
    if options.command == "judge":
        from sftmix.evaluation.judges.command import judge_answers

        judge_answers(options)
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
    if options.command == "study":
        from sftmix.studies.command import run_study

        translate()
        return run_study(options)
    config = load_config(options.config, options.overrides)
    if options.command == "export":
        from sftmix.pipeline.export import export
        from sftmix.storage.hub import Target, deliver

        def write(to: Path) -> Path:
            return export(config, which=options.which, to=to, adapter=options.adapter)

        print(deliver(write, Target.of(options), beside=config.run.dir))
        return 0
    translate()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.umask(0o077)  # only the user may read data and weights
    if place is not None and place.is_on_many_nodes and options.command != "inspect":
        from sftmix.cluster import rank_log

        rank_log.start(config.run.dir / "logs", place.rank)
    if _is_main():
        from sftmix.pipeline.preflight import TRAIN_TARGET, check, check_memory

        check(config)
        if options.command in ("run", *TRAIN_TARGET):
            check_memory(config)
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
    if only in (None, "report") and config.evaluation.trained and _is_main():
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
