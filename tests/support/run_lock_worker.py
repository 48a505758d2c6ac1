"""A process that claims a run folder: FOLDER hold|still|race [HOST].

hold: claims, prints the attempt and renews its lease until its input ends.  still: the same without
renewing. race: waits for a line, then claims as `hold` does; prints the error where it is refused.
"""

import socket
import sys
import threading
import time
from pathlib import Path

from sftmix.cluster.liveness import run_lock
from sftmix.errors import ArtifactError

folder, action = Path(sys.argv[1]), sys.argv[2]
if len(sys.argv) > 3:
    name = sys.argv[3]
    socket.gethostname = lambda: name


def renew(held):
    while True:
        held.renew()
        time.sleep(0.1)


if action == "race":
    print("ready", flush=True)
    sys.stdin.readline()
try:
    held = run_lock.claim(folder)
except ArtifactError as error:
    print(f"refused: {error}", flush=True)
else:
    if action != "still":
        threading.Thread(target=renew, args=(held,), daemon=True).start()
    print(f"attempt {held.attempt}", flush=True)
sys.stdin.read()
