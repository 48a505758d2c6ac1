"""`sftmix evaluate` of model folders, against transformers in float64."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from by_transformers import held_out_tokens
from processes import sftmix
from transformers import AutoTokenizer

from sftmix.confidence.calibration import binned, expected_calibration_error
from sftmix.config.reader import load_config
from sftmix.errors import ArtifactError
from sftmix.pipeline.order import needed_stages, stages_of


def by_transformers(model, data):
    """Returns the sum of the losses, the number of tokens, whether each example is exact, and the
    calibration error."""
    total, num_tokens, exact, table = 0.0, 0, [], 0
    for log_p, labels in held_out_tokens(model, data):
        match = log_p.argmax(-1) == labels
        total -= log_p.gather(1, labels[:, None]).sum().item()
        num_tokens += len(labels)
        exact.append(bool(match.all()))
        table += binned(-log_p.amax(-1), match)
    return total, num_tokens, exact, expected_calibration_error(table)


@pytest.mark.recipe
def test_a_model_folder_is_measured_on_any_file(trained, tmp_path):
    model, other = (trained / "run" / name / "model" for name in ("sftmix", "baseline"))
    given = [f"data.path={trained / 'data.json'}", f"run.dir={tmp_path / 'run'}"]
    given += ["data.max_length=128", "engine.precision=fp32"]
    done = sftmix("evaluate", str(model), *given, f"evaluation.models=[{{path: {other}}}]")
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert list(metrics) == [str(model), str(other)]
    rows = pq.read_table(tmp_path / "run" / "evaluation" / "per_example.parquet").to_pylist()
    for path, found in metrics.items():
        total, num_tokens, exact, error = by_transformers(path, tmp_path / "run" / "data")
        assert found["num_examples"] == len(exact) == 60
        assert found["loss_nats_per_token"] == pytest.approx(total / num_tokens, rel=1e-5)
        assert found["exact_match"] == sum(exact) / 60
        assert found["calibration"]["expected_error"] == pytest.approx(error, abs=1e-4)
        assert [row["is_exact"] for row in rows if row["model"] == path] == exact
        assert f"{found['loss_nats_per_token']:.4f}" in done.stdout
    # finished: nothing is measured again
    assert "evaluate: up to date" in sftmix("evaluate", str(tmp_path / "run")).stdout


@pytest.mark.recipe
def test_other_models_stand_beside_those_of_a_run(trained, tmp_path):
    folder, copy = tmp_path / "run", tmp_path / "same"
    shutil.copytree(trained / "run", folder)
    shutil.copytree(folder / "baseline" / "model", copy)
    sftmix("report", str(folder), f"evaluation.models=[{{path: {copy}}}]")
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert list(metrics) == ["baseline", "train", str(copy)]
    assert metrics[str(copy)] == metrics["baseline"] != metrics["train"]
    page = (folder / "report" / "index.html").read_text()
    assert page.count(f"<td>{copy}</td>") >= 2


@pytest.mark.recipe
def test_a_model_of_other_tokens_is_refused(trained, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained / "run", folder)
    shutil.copytree(folder / "baseline" / "model", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    used = tokenizer("red")["input_ids"][-1]
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    mine, last = tokenizer.convert_ids_to_tokens(used), max(vocabulary, key=vocabulary.get)
    vocabulary[mine], vocabulary[last] = vocabulary[last], vocabulary[mine]
    (other / "tokenizer.json").write_text(json.dumps(content))
    done = sftmix("evaluate", str(folder), f"evaluation.models=[{{path: {other}}}]", check=False)
    assert done.returncode == 2 and f"its token {used} is " in done.stderr


@pytest.mark.parametrize("stage", ["reference", "train", "report"])
def test_a_model_folder_is_only_measured(tmp_path, stage):
    (tmp_path / "config.json").write_text("{}")
    config = load_config(tmp_path, ["data.path=somewhere.json"])
    assert [each.name for each in stages_of(config)] == ["data", "evaluate"]
    with pytest.raises(ArtifactError, match=f"no stage '{stage}' here"):
        needed_stages(stages_of(config), stage)
