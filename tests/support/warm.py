"""Python processes that start in a tenth of a second.

Importing torch, transformers and deepspeed takes 6 CPU seconds, and the tests start hundreds of
processes. A server imports them once. For each request it forks a handler, which forks the process
itself, reports its pid and its exit code, and kills it when the connection is closed. So a process
has memory, files, signals and an exit code of its own, as one that is started anew.

Not for tests of what happens at start-up, and not for those that find processes by their command
line: it is that of the server.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# read when Python or a library starts: a process that needs other values is started anew
READ_AT_START = ("OMP_", "MKL_", "OPENBLAS_", "LD_", "PYTHON", "TRITON_", "DS_ACCELERATOR", "CUDA_")
PRELOADED = (
    "datasets",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # brings torch._inductor
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "matplotlib.figure",
    "pandas",
    "peft",
    "polars",
    "sentencepiece",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "sftmix.evaluation.report",
    "sftmix.pipeline.run",
    "sftmix.pipeline.stages.data",
    "sftmix.pipeline.stages.evaluate",
    "sftmix.pipeline.stages.reference",
    "sftmix.pipeline.stages.score",
    "sftmix.pipeline.stages.split",
    "sftmix.pipeline.stages.target",
)


class WarmProcess:
    """The part of `subprocess.Popen` that tests need. stdout, stderr: open files, or the same."""

    def __init__(self, arguments, *, env, cwd, stdout, stderr):
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        request = {"arguments": list(arguments), "env": dict(env), "cwd": str(cwd)}
        socket.send_fds(self._connection, [b"files"], [file.fileno() for file in (stdout, stderr)])
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._lines = self._connection.makefile()
        self.pid = int(self._lines.readline())
        self.returncode = None

    def poll(self):
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout)
            self.returncode = int(self._lines.readline())
            self._connection.close()
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def can_start(env):
    """Returns whether the server has the values that are read at the start."""
    names = {name for name in (*env, *_ENVIRONMENT) if name.startswith(READ_AT_START)}
    return all(env.get(name) == _ENVIRONMENT.get(name) for name in names)


def start(arguments, *, env, cwd, stdout, stderr):
    """Starts `python ARGUMENTS`, from the server where that makes no difference."""
    if can_start(env):
        return WarmProcess(arguments, env=env, cwd=cwd, stdout=stdout, stderr=stderr)
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
    )


_ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
_running = {}  # of this process: a forked one starts its own server


def _server():
    if os.getpid() not in _running:
        folder = Path(tempfile.mkdtemp(prefix="warm"))
        address = str(folder / "socket")
        process = subprocess.Popen(
            [sys.executable, __file__, address],
            env={**_ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"ready\n"
        _running[os.getpid()] = address

        def stop():
            process.stdin.close()  # the server ends
            process.wait()
            (folder / "socket").unlink()
            folder.rmdir()

        atexit.register(stop)
    return _running[os.getpid()]


def _serve(address):
    """Returns a request, in the process that shall execute it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes handlers that have ended
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, files, _, _ = socket.recv_fds(connection, 5, 2)
        request = json.loads(connection.makefile().readline())
        pid = os.fork()
        if not pid:
            connection.close()
            for target, file in enumerate(files, start=1):
                os.dup2(file, target)
                os.close(file)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            return request
        for file in files:
            os.close(file)
        _handle(connection, pid)
        os._exit(0)


def _handle(connection, pid):
    connection.sendall(b"%d\n" % pid)
    watched = os.pidfd_open(pid)
    if connection in select.select([connection, watched], [], [])[0]:  # closed: nobody waits
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % code)


def _execute(request):
    import gc
    import runpy

    atexit.register(gc.unfreeze)  # what libraries find frozen at the end, they report as leaks
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    arguments = request["arguments"]
    while arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        arguments = arguments[1:]
    if arguments[0] == "-m":
        sys.path.insert(0, request["cwd"])
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    import gc
    import importlib

    sys.path.pop(0)  # tests/support: the scripts put their own folder there
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that no process looks through what all of them share
    _execute(_serve(sys.argv[1]))
