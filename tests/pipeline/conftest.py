import json

import pytest
from processes import sftmix
from tiny import TINY_MODEL, TINY_TRAINING

QUICKSTART = "configs/quickstart.yaml"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Returns a folder with a data file and a finished run on it."""
    folder = tmp_path_factory.mktemp("evaluate")
    words = "red green blue one two three four north south".split()
    rows = [
        {"instruction": f"Say {words[n % 9]} {n}", "output": f"{words[n % 9]} {words[n % 7]}."}
        for n in range(60)
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    options = [*TINY_TRAINING, *TINY_MODEL, "data.generator=", "tokenizer.train={vocab_size: 300}"]
    given = [f"data.path={folder / 'data.json'}", "data.held_out_share=0.3"]
    sftmix("evaluate", QUICKSTART, *options, *given, f"run.dir={folder / 'run'}")
    return folder
