"""One rank under watch, told what to do by the lines of its input (the cases at the end of this
file).

FOLDER RANK WORLD PORT TOKEN [name=value ...] of Watch's seconds, `place=NAME` for a machine of its
own. Rank 0 takes any port; each prints port and pid, and answers each line when it is done.
"""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

from sftmix.cluster.liveness import processes
from sftmix.cluster.liveness.heartbeats import Watch, listen
from sftmix.cluster.liveness.progress import Position

folder, rank, world, port, token, *options = sys.argv[1:]
settings = dict(option.split("=") for option in options)
if "place" in settings:
    name = settings.pop("place")
    processes.namespace = lambda: {"host": name, "boot_id": name, "pid_namespace": name}
broken = threading.Event()


def on_beat():
    if broken.is_set():
        raise OSError("the lease cannot be written")


def hold_the_gil():
    mutex = ctypes.create_string_buffer(64)  # of zeros: unlocked
    for _ in range(2):  # the second waits for ever; a sleep would end with the first signal
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


listener = None
if rank == "0":
    listener, port = listen("127.0.0.1")
watch = Watch(
    rank=int(rank),
    world_size=int(world),
    address=("127.0.0.1", int(port)),
    token=token,
    folder=Path(folder),
    listener=listener,
    on_beat=on_beat,
    **{name: float(value) for name, value in settings.items()},
)
watch.start()
print(port, os.getpid(), flush=True)
for command in sys.stdin:
    match command.split():
        case ["at", phase, step]:
            watch.progress.position = Position(phase, int(step))
        case ["knows", number, phase, step]:  # waits until the peer is known to be there
            deadline = time.monotonic() + 60
            while not any(
                int(number) == r and p.position == Position(phase, int(step))
                for r, p in list(watch._peers.items())
            ):
                if time.monotonic() > deadline:
                    sys.exit(f"rank {number} was never seen in {phase}, step {step}")
                time.sleep(0.01)
        case ["code", code]:
            watch.exit_code = int(code)
        case ["fail", *words]:
            watch.fail(" ".join(words))
        case ["break"]:
            broken.set()
        case ["gil"]:
            hold_the_gil()
        case ["fork"]:
            if os.fork() == 0:
                os.closerange(0, 3)
                time.sleep(20)
                os._exit(0)
        case ["exit"]:
            os._exit(0)
        case ["close"]:
            watch.close()
            break
    print(command.strip(), flush=True)
