"""What the tests of the doctor share."""

import os
import sys


def only(findings):
    assert len(findings) == 1, findings
    return findings[0]


def stand_in(folder, monkeypatch, name, text):
    """Puts a command of our own, in Python, before that of the same name on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    if not os.environ["PATH"].startswith(str(folder)):
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
