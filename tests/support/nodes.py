"""Nodes for tests: an `ssh` that runs its command on this machine, in /, with an environment of its
own, as a login there would."""

import os
import sys
from pathlib import Path

SSH = """
import os, sys
words = iter(sys.argv[1:])
host = None
for word in words:
    if word in ("-o", "-l", "-p"):
        next(words)
    elif not word.startswith("-"):
        host = word
        break
command = " ".join(words)  # as ssh does
with open(os.environ["SSH_LOG"], "a") as log:
    log.write(host + " " + command.replace("\\n", " ") + "\\n")
if host == "gone":
    sys.exit("ssh: connect to host gone port 22: No route to host")
child = os.fork()  # what runs on a node does not end with the connection
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
os.setsid()
os.chdir("/")
names = ("PATH", "SSH_LOG", "PYTHONDONTWRITEBYTECODE")
environment = {name: os.environ[name] for name in names if name in os.environ}
# A shell between, as sshd is: no launcher that ranks would miss.
os.execvpe("sh", ["sh", "-c", "(eval \\"$0\\"); exit $?", command],
            {**environment, "HOME": "/nowhere", "NODE": host})
"""


def script(folder: Path, name: str, code: str) -> None:
    """Puts a command of this name into `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable} -I\n{code}")
    (folder / name).chmod(0o755)


def nodes_on_this_machine(folder: Path) -> dict[str, str]:
    """Returns variables for whoever is to find these nodes; what ssh was asked is in
    `folder`/ssh.log."""
    script(folder / "bin", "ssh", SSH)
    return {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SSH_LOG": str(folder / "ssh.log"),
    }
