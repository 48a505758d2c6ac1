"""`sftmix scores`: check, show, merge and export from the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from score_tables import OTHERS, table

from sftmix.cli import main
from sftmix.errors import ConfigError
from sftmix.storage import artifacts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config whose data stage has run; returns (config, ids of its training examples,
    fingerprints of its table)."""
    from sftmix.batches.examples import TokenisedExamples
    from sftmix.engine.precision import resolve_precision

    folder = tmp_path_factory.mktemp("run")
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "architecture": {
                "model_type": "llama",
                "hidden_size": 8,
                "num_attention_heads": 2,
                "max_position_embeddings": 256,
            }
        },
        "tokenizer": {"train": {"vocab_size": 330}},
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 256},
        "confidence": {"mode": "live", "compare": ["online"]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    assert main(["data", str(folder / "run.yaml")]) == 0
    facts = artifacts.verify(folder / "run" / "data").facts
    ids = TokenisedExamples(folder / "run" / "data" / "train.arrow").example_ids.to_pylist()
    return folder / "run.yaml", ids, {**facts["fingerprints"], "dtype": resolve_precision("auto")}


def fitting(folder, ids, fingerprints):
    return table(
        folder,
        ids=ids,
        counts=[2] * len(ids),
        sums={5: np.arange(len(ids)) / 9},
        fingerprints=fingerprints,
    )


def command(capsys, *arguments):
    code = main(["scores", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


def test_check_ends_with_0_where_the_table_fits_and_with_2_where_not(run, tmp_path, capsys):
    config, ids, fingerprints = run
    good = fitting(tmp_path / "good", ids[::-1], fingerprints)
    code, out, _ = command(capsys, "check", good, config)
    assert code == 0 and f"{good} fits the {len(ids)} training examples" in out
    other = fitting(tmp_path / "other", ids, {**fingerprints, "template": "p"})
    code, _, err = command(capsys, "check", other, config)
    assert (
        code == 2
        and "template is 'p' in the table" in err
        and "confidence.allow_differences=[template]" in err
    )
    code, out, _ = command(
        capsys, "check", other, config, "confidence.allow_differences=[template]"
    )
    assert code == 0
    code, _, err = command(
        capsys, "check", fitting(tmp_path / "more", [*ids, "x"], fingerprints), config
    )
    report = config.parent / "run" / "scores_that_do_not_fit.jsonl"
    assert (
        code == 2
        and "1 score has no example (first 'x')" in err
        and str(report) in err
        and report.is_file()
    )


def test_check_needs_the_data_stage_of_this_very_config(run, tmp_path, capsys):
    config, ids, fingerprints = run
    good = fitting(tmp_path / "good", ids, fingerprints)
    for override, words in (
        ("data.max_length=128", "data.max_length: "),
        (f"run.dir={tmp_path / 'elsewhere'}", "is missing. Run `sftmix data"),
    ):
        code, _, err = command(capsys, "check", good, config, override)
        assert code == 2 and words in err


def test_check_says_that_the_data_stage_has_left_no_fingerprints(run, tmp_path, capsys):
    config, ids, fingerprints = run
    manifest = config.parent / "run" / "data" / "manifest.json"
    before = manifest.read_text()
    content = json.loads(before)
    del content["facts"]["fingerprints"]
    manifest.write_text(json.dumps(content))
    try:
        code, _, err = command(
            capsys, "check", fitting(tmp_path / "good", ids, fingerprints), config
        )
    finally:
        manifest.write_text(before)
    assert code == 2 and "manifest.json has no fingerprints" in err and "--force" in err


def test_tables_are_shown_merged_and_exported_from_the_command_line(tmp_path, capsys):
    a, b = table(tmp_path / "a"), table(tmp_path / "b", **OTHERS)
    code, out, _ = command(capsys, "merge", a, b, "--to", tmp_path / "merged")
    assert code == 0 and "merged: 6 examples, 2 checkpoints" in out
    code, out, _ = command(capsys, "show", tmp_path / "merged", "--num", 1)
    assert code == 0 and "6 examples" in out and "most confident:" in out
    code, out, _ = command(capsys, "export", tmp_path / "merged", "--to", tmp_path / "hub")
    assert (
        code == 0
        and out.strip() == str(tmp_path / "hub")
        and (tmp_path / "hub" / "README.md").is_file()
    )
    code, _, err = command(capsys, "merge", a, a, "--to", tmp_path / "new")
    assert code == 2 and err.startswith("sftmix: error: scores merge")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scores"], "COMMAND"),
        (["scores", "show"], "TABLE"),
        (["scores", "merge", "a", "b"], "--to"),
        (["scores", "show", "a", "train.epochs=1"], "unrecognized arguments: train.epochs=1"),
        (["scores", "check", "a"], "CONFIG"),
        (["scores", "check", "a", "b", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_command_line_of_scores_ends_with_usage_and_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_overrides_of_check_may_stand_behind_an_option(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="Did you mean `epochs`"):
        main(["scores", "check", str(tmp_path), str(run[0]), "--debug", "train.epohcs=1"])
    code, _, err = command(capsys, "check", tmp_path, run[0], "train.epohcs=1")
    assert code == 2 and "Did you mean `epochs`?" in err


def test_help_and_show_do_not_load_torch(tmp_path):
    folder = table(tmp_path / "t")
    script = (
        "import sys, sftmix.cli\ntry:\n    sftmix.cli.main(['scores', '--help'])\nexcept"
        " SystemExit:\n    pass\nfirst = set(sys.modules)\nassert 'numpy' not in first and"
        " 'pyarrow' not in first\nassert sftmix.cli.main(['scores', 'show', sys.argv[1]]) =="
        " 0\nassert 'pyarrow' in sys.modules and not {'torch', 'transformers', 'datasets',"
        " 'pydantic'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)
