"""`sftmix tasks` against lm-evaluation-harness run by itself, and against transformers."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
import torch
import yaml
from processes import environment, sftmix
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.cli import main
from sftmix.errors import ConfigError, DataError
from sftmix.evaluation.models import models_of
from sftmix.evaluation.statistics import switched
from sftmix.evaluation.tasks.formats import read_task

lm_eval = pytest.importorskip("lm_eval", reason="needs sftmix[eval]")
pytestmark = pytest.mark.recipe
WORDS = "red green blue one two three four north south".split()


def medqa(number, options=4, right=None):
    texts = {letter: WORDS[(number + i) % 9] for i, letter in enumerate("ABCDE"[:options])}
    answer = "ABCDE"[number % options] if right is None else right
    return {
        "question": f"Say {number} {WORDS[number % 7]}?",
        "answer": texts.get(answer),
        "options": texts,
        "meta_info": "step1",
        "answer_idx": answer,
    }


def medmcqa(number, first):
    options = {f"op{letter}": WORDS[(number + i) % 9] for i, letter in enumerate("abcd")}
    return {
        "id": f"q{number}",
        "question": f"Which {number}?",
        **options,
        "cop": number % 4 + first,
    }


def pubmedqa(number):
    return {
        "QUESTION": f"Is {WORDS[number % 9]} {number}?",
        "CONTEXTS": [f"{WORDS[number % 5]} is {number}.", "four."],
        "LABELS": ["A", "B"],
        "final_decision": ("yes", "no", "maybe")[number % 3],
    }


def gsm8k(number):
    return {"question": f"{number} and 2?", "answer": f"<<{number}+2>> so\n#### {number + 2}"}


def lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """Returns a finished run whose two models have other, large random weights."""
    folder = tmp_path_factory.mktemp("tasks") / "run"
    shutil.copytree(trained / "run", folder)
    for seed, name in enumerate(("baseline", "sftmix")):
        network = AutoModelForCausalLM.from_pretrained(folder / name / "model")
        generator = torch.Generator().manual_seed(seed)
        for weights in network.parameters():
            torch.nn.init.normal_(weights, std=0.5, generator=generator)
        network.save_pretrained(folder / name / "model")
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def tasks(capsys):
    """Runs `sftmix tasks` in this process, with the harness loaded; returns what it printed."""

    def run_tasks(*arguments, code=0):
        assert main(["tasks", *map(str, arguments)]) == code
        return capsys.readouterr()

    return run_tasks


def items(folder, model, task):
    return json.loads((folder / model / f"{task}.json").read_text())["result"]["items"]


# what the harness's own data sets hold, written by hand
HUB_ROWS = {
    "medqa_4options": [
        {
            "sent1": f"Say {n} {WORDS[n % 7]}?",
            **{f"ending{i}": WORDS[(n + i) % 9] for i in range(4)},
            "label": n % 4,
        }
        for n in range(8)
    ],
    "medmcqa": [{**medmcqa(n, 0)} for n in range(8)],
    "pubmedqa": [pubmedqa(n) for n in range(8)],
    "gsm8k": [gsm8k(n) for n in range(8)],
}
GIVEN = {
    "medqa_4options": ("medqa", [medqa(n) for n in range(8)]),
    "medmcqa": ("medmcqa", [medmcqa(n, 1) for n in range(8)]),
    "gsm8k": ("gsm8k", HUB_ROWS["gsm8k"]),
}


def by_the_harness(model, folder):
    """Returns the samples and the figures of every task, by `lm_eval` as its own users start it."""
    definitions = []
    for task, given in HUB_ROWS.items():
        own = task.removesuffix("_4options")
        definition = {
            "include": f"{lm_eval.__path__[0]}/tasks/{own}/{own}.yaml",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(lines(folder / f"{task}.jsonl", given))}},
            "training_split": None,
            "validation_split": None,
            "fewshot_split": None,
            "test_split": "test",
            "num_fewshot": 0,
        }
        definitions.append(str(folder / f"{task}.yaml"))
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(definition))
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
            *("--model_args", f"pretrained={model}", "--tasks", ",".join(definitions)),
            *("--output_path", str(folder / "out"), "--log_samples", "--batch_size", "3"),
        ],
        env=environment(),
        check=True,
        capture_output=True,
        cwd=folder,
    )
    samples = {
        task: [
            json.loads(line)
            for line in next((folder / "out").rglob(f"samples_{task}_*")).read_text().splitlines()
        ]
        for task in HUB_ROWS
    }
    (figures,) = (folder / "out").rglob("results*")
    return samples, json.loads(figures.read_text())["results"]


def numbers(answers):
    """Returns the log-likelihoods of the choices."""
    return torch.tensor([float(each[0]) for each in answers])


def test_figures_and_answers_are_those_of_the_harness_by_itself(run, trained, tmp_path, tasks):
    files = [f"{n}={lines(tmp_path / f'{n}.in', rows)}" for n, rows in GIVEN.values()]
    folder = tmp_path / "pubmed"
    folder.mkdir()
    asked = {str(100 + n): pubmedqa(n) for n in range(20)}
    (folder / "ori_pqal.json").write_text(json.dumps(asked))
    truth = {str(100 + n): pubmedqa(n)["final_decision"] for n in range(8)}
    (folder / "test_ground_truth.json").write_text(json.dumps(truth))
    done = tasks(run, "--tasks", *files, f"pubmedqa={folder}")
    found = results(run / "tasks")
    assert found["models"] == ["NTP baseline", "SFTMix"] and set(found["tasks"]) == set(HUB_ROWS)
    samples, figures = by_the_harness(run / "sftmix" / "model", tmp_path)
    for task in HUB_ROWS:
        own = found["tasks"][task]["SFTMix"]
        assert own["num_items"] == 8
        for metric, value in own["metrics"].items():
            assert value["value"] == figures[task][metric], (task, metric)
        rows = items(run / "tasks", "SFTMix", task)
        for sample in samples[task]:
            answers = rows[sample["doc_id"]]["answers"][sample["filter"]]
            if task == "gsm8k":
                assert answers == sample["filtered_resps"]
            else:
                torch.testing.assert_close(
                    numbers(answers), numbers(sample["filtered_resps"]), rtol=1e-4, atol=1e-4
                )
        if task != "gsm8k":  # the answers depend on the question
            assert len({row["answers"]["none"][0][0] for row in rows}) == 8
    # the report shows the table
    assert f"in the report: sftmix report {run} --force" in done.out
    shown = tmp_path / "shown"  # with the weights that were trained: a report checks them
    shutil.copytree(trained / "run", shown)
    shutil.copytree(run / "tasks", shown / "tasks")
    (shown / "judged").mkdir()
    table = {"titles": ["model", "rating"], "rows": [["SFTMix", "<b>7"]], "note": "one judge"}
    (shown / "judged" / "judged.json").write_text(json.dumps({"table": table}))
    sftmix("report", str(shown), "--force")
    page = (shown / "report" / "index.html").read_text()
    assert "<h2>Ratings by a judge: judged</h2>" in page and "&lt;b&gt;7" in page
    assert "<h2>Confidence of the held-out examples, by model</h2>" in page
    assert "<h2>Tasks</h2>" in page and "medqa_4options" in (shown / "report/report.md").read_text()
    # the second start measures nothing
    before = {path: path.stat().st_mtime_ns for path in (run / "tasks").rglob("*.json")}
    again = tasks(run, "--tasks", *files, f"pubmedqa={folder}")
    assert "1 of" not in again.out and "Running" not in again.err
    unchanged = [p for p, t in before.items() if p.stat().st_mtime_ns == t]
    assert {p.name for p in before} - {p.name for p in unchanged} == {"results.json"}
    other = tasks(run, "--tasks", files[0], "--limit", 5, code=2)
    assert "limit: nothing before, 5 now" in other.err


def test_five_options_by_the_definition_in_float64(run, tmp_path, tasks):
    rows = [medqa(n, 5) for n in range(12)]
    path = lines(tmp_path / "five.jsonl", rows)
    model = run / "sftmix" / "model"
    tasks(model, "--tasks", f"medqa={path}", "--to", tmp_path / "out")
    found = results(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).double()
    right = []
    for row in rows:
        listed = "".join(f"{letter}. {text}\n" for letter, text in row["options"].items())
        prompt = f"Question: {row['question']}\n{listed}Answer:"
        context = tokenizer(prompt)["input_ids"]
        sums = []
        for letter in "ABCDE":
            ids = tokenizer(f"{prompt} {letter}")["input_ids"]
            logits = network(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logits[t - 1, ids[t]].item() for t in range(len(context), len(ids))))
        right.append("ABCDE"[max(range(5), key=sums.__getitem__)] == row["answer_idx"])
    (name,) = found["models"]
    value = found["tasks"]["medqa_5options"][name]["metrics"]["acc,none"]["value"]
    assert value == pytest.approx(sum(right) / 12)


def test_examples_come_before_a_question_and_models_are_compared_by_it(run, tmp_path, tasks):
    rows = lines(tmp_path / "test.jsonl", [medqa(n) for n in range(30)])
    shots = lines(tmp_path / "train.jsonl", [medqa(n + 100) for n in range(6)])
    arguments = ["--tasks", f"medqa={rows}", "--shots", "2", "--limit", "20"]
    models = [str(run / "baseline" / "model"), str(run / "sftmix" / "model")]
    refused = tasks(*models, *arguments, "--to", tmp_path / "out", code=2)
    assert "--shots-from NAME=FILE" in refused.err
    tasks(*models, *arguments, "--shots-from", f"medqa={shots}", "--to", tmp_path / "out")
    found = results(tmp_path / "out")
    (pair,) = found["differences"]
    assert found["tasks"]["medqa_4options"][models[0]]["shots"] == 2
    first, second = (
        [row["acc,none"] for row in items(tmp_path / "out", model.file_name, "medqa_4options")]
        for model in models_of(models)
    )
    assert pair["num_items"] == 20 == len(first)
    assert pair["difference"] == pytest.approx((sum(second) - sum(first)) / 20)
    expected = switched(*(torch.tensor(each).numpy() == 1 for each in (second, first)))
    assert (pair["only_this"], pair["only_control"]) == (
        expected.only_arm,
        expected.only_control,
    )
    assert pair["p"] == expected.p_value and pair["low"] < pair["difference"] < pair["high"]


def test_a_limit_draws_from_the_whole_file(run, tmp_path, tasks):
    rows = [pubmedqa(n) | {"final_decision": "yes" if n < 40 else "no"} for n in range(60)]
    (tmp_path / "ori_pqal.json").write_text(json.dumps({str(n): row for n, row in enumerate(rows)}))
    models = [run / "baseline" / "model", run / "sftmix" / "model"]
    tasks(*models, "--tasks", f"pubmedqa={tmp_path}", "--limit", 12, "--to", tmp_path / "out")
    found = [
        items(tmp_path / "out", m.file_name, "pubmedqa") for m in models_of([*map(str, models)])
    ]
    numbers = [int(row["item"]) for row in found[0]]
    assert numbers == [int(row["item"]) for row in found[1]] == sorted(set(numbers))
    assert len(numbers) == 12 and numbers[-1] >= 40 and numbers != list(range(12))


def test_a_killed_run_goes_on_and_asks_nothing_twice(run, tmp_path, tasks):
    rows = lines(tmp_path / "test.jsonl", [medqa(n) for n in range(500)])
    to = tmp_path / "out"
    model = str(run / "sftmix" / "model")
    command = [sys.executable, "-m", "sftmix.cli", "tasks", model, "--tasks", f"medqa={rows}"]
    command += ["--to", str(to), "--batch-size", "1"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kept = 0
    while kept < 10 and process.poll() is None:
        kept = sum(map(answers_in, to.rglob(".medqa*.db")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (cache,) = to.rglob(".medqa*.db")
    kept = answers_in(cache)
    assert 10 <= kept < 2000
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert (
        f"/{2000 - kept} [" in again.stderr
        and "/2000 [00" not in again.stderr.split("Running loglikelihood")[1]
    )
    assert not list(to.rglob("*.db"))
    undisturbed = tmp_path / "undisturbed"
    tasks(model, "--tasks", f"medqa={rows}", "--batch-size", 1, "--to", undisturbed)
    (name,) = [each.file_name for each in models_of([model])]
    assert items(to, name, "medqa_4options") == items(undisturbed, name, "medqa_4options")


def answers_in(cache):
    """Count the answers kept. Not read-only: a killed writer leaves a journal to roll back."""
    try:
        with closing(sqlite3.connect(f"file:{cache}?mode=rw", uri=True)) as database:
            return database.execute("select count(*) from unnamed").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet, or being written
        return 0


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("medqa", [medqa(0, 3)], "test.jsonl:1: `options` is ['A', 'B', 'C'], expected A to D"),
        ("medqa", [medqa(0), medqa(1, right="E")], "test.jsonl:2: `answer_idx` is 'E'"),
        ("medqa", [medqa(0), medqa(1, 5)], "some questions have 4 options and some 5"),
        ("medqa", [{"question": "a", "answer": "b"}], "found the keys question, answer, expected"),
        ("medqa", [], "no rows, expected questions of medqa"),
        ("medmcqa", [medmcqa(0, 1), medmcqa(1, 0)], "between 1 and 3 in all 2 rows"),
        ("medmcqa", [{**medmcqa(0, 0), "cop": -1}], "`cop` is -1, expected 0 to 3, or 1 to 4"),
        ("medmcqa", [medmcqa(0, 0), medmcqa(3, 1)], "has 0 and 4"),
        ("gsm8k", [{"question": "a", "answer": "4"}], "expected `#### number`"),
        ("arc", [], "arc has no reader of local files; known are medqa, pubmedqa"),
    ],
)
def test_rows_of_another_form_are_named(tmp_path, name, rows, said):
    with pytest.raises(DataError) as raised:
        read_task(name, lines(tmp_path / "test.jsonl", rows))
    assert said in str(raised.value)


def test_models_of_one_name_and_folders_without_a_model_are_refused(run, tmp_path, tasks):
    with pytest.raises(ConfigError, match="would share the files"):
        models_of([str(run), str(run)])
    done = tasks(tmp_path, "--tasks", "medqa=x", "--to", "y", code=2)
    assert "holds neither a model" in done.err
