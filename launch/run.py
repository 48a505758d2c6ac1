"""What a launcher starts on every rank: the whole recipe, or one stage.

deepspeed --hostfile HOSTFILE launch/run.py CONFIG [key=value ...] [--stage NAME]
torchrun --nproc-per-node 8 launch/run.py CONFIG [key=value ...]
"""

import sys

from sftmix.cli import main


def as_command(arguments: list[str]) -> list[str]:
    """Returns the arguments of the `sftmix` command line: `--stage NAME` names the command, `run`
    by default."""
    rest = list(arguments)
    command = "run"
    if "--stage" in rest:
        at = rest.index("--stage")
        if at + 1 >= len(rest):
            raise SystemExit("run.py: --stage needs the name of a stage")
        command = rest[at + 1]
        del rest[at : at + 2]
    return [command, *rest]


if __name__ == "__main__":
    sys.exit(main(as_command(sys.argv[1:])))
