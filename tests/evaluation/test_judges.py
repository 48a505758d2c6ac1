"""A judge that answers well, fails, stalls and lies; the verdicts in the readers of FastChat and
alpaca_eval."""

import argparse
import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from stub_judge import STALL, StubJudge, completion

from sftmix.errors import ArtifactError, ConfigError, DataError, MachineError
from sftmix.evaluation.judges import mt_bench
from sftmix.evaluation.judges.command import judge_answers
from sftmix.evaluation.judges.journal import Journal
from sftmix.evaluation.judges.questions import Questions, read_questions, write_answers
from sftmix.evaluation.statistics import item_difference

pytest.importorskip("openai", reason="needs sftmix[eval]")
pytest.importorskip("alpaca_eval", reason="needs sftmix[eval]")

CATEGORIES = ("writing", "math", "stem")
KEY = "secret-of-the-test"


def mt_questions(count=6):
    return [
        {
            "question_id": 100 + n,
            "category": CATEGORIES[n % 3],
            "turns": [f"Ask {n}?", f"And {n}, with {{braces}}?"],
        }
        for n in range(count)
    ]


def alpaca_questions(count=12):
    return [{"instruction": f"Do {n}.", "dataset": "own"} for n in range(count)]


def answered(folder, rows, models):
    """Writes a folder as `sftmix answers` leaves it. models: name -> (number, turn) -> text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    questions = read_questions(folder / "questions.jsonl")
    for name, text in models.items():
        turns = {
            row.item: [text(n, turn) for turn in range(len(row.turns))]
            for n, row in enumerate(questions.rows)
        }
        write_answers(folder, questions, name, turns)
    return questions


def options(folder, stub, **changes):
    given = {
        "folder": folder,
        "judge": "stub",
        "endpoint": stub.url,
        "key_variable": "STUB_KEY",
        "price": (1.0, 2.0),
        "yes": True,
        "control": None,
        "parallel": 3,
        "timeout": 5.0,
        "retries": 3,
        "prompts": None,
        "references": None,
        "against": None,
        "annotator": "weighted_alpaca_eval_gpt4_turbo",
        "length_data": None,
    }
    return argparse.Namespace(**(given | changes))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("STUB_KEY", KEY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path):
    answered(
        tmp_path / "answers",
        mt_questions(),
        {
            "first": lambda n, turn: f"score {3 + n % 4 + turn}.",
            "second": lambda n, turn: f"score {5 + n % 3}.",
        },
    )
    return tmp_path / "answers"


def rate(body, _):
    """The rating that the answer itself names: of the last turn that is shown."""
    shown = re.findall(r"score (\d+)", body["messages"][-1]["content"])
    return completion(f"Because. [[{shown[-1]}]]")


def judged(folder):
    return json.loads((folder / "judged.json").read_text())


def test_ratings_their_means_and_their_files(folder, capsys):
    with StubJudge(rate) as stub:
        judge_answers(options(folder, stub))
    first = {f"{100 + n}/{turn + 1}": 3 + n % 4 + turn for n in range(6) for turn in range(2)}
    second = {f"{100 + n}/{turn + 1}": 5 + n % 3 for n in range(6) for turn in range(2)}
    found = judged(folder)
    assert found["items"] == {"first": first, "second": second}
    assert stub.keys == {f"Bearer {KEY}"} and len(stub.asked) == 24
    values = [np.array(list(each.values()), float) for each in (second, first)]
    pair = item_difference(*values)
    row = dict(zip(found["table"]["titles"], found["table"]["rows"][1], strict=True))
    assert row["rating"] == f"{values[0].mean():.2f}" and row["no rating"] == "0"
    assert row["difference"] == f"{pair.mean:+.2f} [{pair.low:+.2f}, {pair.high:+.2f}]"
    assert found["categories"]["first"]["math"] == f"{np.mean([4, 5, 3, 4]):.2f}"
    assert found["usd"] == pytest.approx(24 * (7 * 1 + 3 * 2) / 1e6)
    assert found["answered_by"] == ["stub-2026"]
    assert "prompts are sftmix's own" in found["table"]["note"]
    assert "8 answers of mathematics" in found["table"]["note"]
    # the price was said before anything was asked
    out = capsys.readouterr().out
    assert re.match(r"stub: 24 requests, about \d[\d,]+ tokens of prompts, at most 49,152", out)
    # a key is written nowhere
    written = [p.read_text() for p in folder.rglob("*") if p.is_file()]
    assert written and not [text for text in written if KEY in text]


def fastchat():
    pytest.importorskip("fastchat", reason="needs fschat")
    # its reader stands in a file that imports the clients of two vendors
    sys.modules.setdefault("anthropic", types.ModuleType("anthropic"))
    from fastchat.llm_judge import common

    return common


def test_fastchat_reads_answers_and_ratings(folder):
    common = fastchat()
    with StubJudge(rate) as stub:
        judge_answers(options(folder, stub))
    answers = common.load_model_answers(str(folder / "model_answer"))
    common.check_data(
        common.load_questions(str(folder / "questions.jsonl"), None, None),
        answers,
        {},
        ["first", "second"],
        {},
    )
    assert answers["first"][103]["choices"][0]["turns"] == ["score 6.", "score 7."]
    ratings = common.load_single_model_judgments(folder / "model_judgment" / "stub_single.jsonl")
    # it keeps the last turn of a question under each prompt
    assert ratings["stub", "single-v1"][103, "first"]["score"] == 6
    assert ratings["stub", "single-v1-multi-turn"][103, "first"]["score"] == 7


def test_prompts_and_correct_answers_of_a_file_are_used(folder, tmp_path):
    prompts = [
        {
            "name": name,
            "system_prompt": "",
            "prompt_template": f"{name}: {fields}",
        }
        for name, fields in (
            ("single-v1", "{question} {answer}"),
            ("single-math-v1", "{question} {ref_answer_1} {answer}"),
            ("single-v1-multi-turn", "{question_2} {answer_1} {answer_2}"),
            ("single-math-v1-multi-turn", "{question_2} {ref_answer_2} {answer_2}"),
        )
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in prompts))
    correct = [
        {"question_id": 100 + n, "choices": [{"turns": ["right 1", "right 2"]}]} for n in (1, 4)
    ]
    (tmp_path / "gpt-4.jsonl").write_text("".join(f"{json.dumps(c)}\n" for c in correct))
    with StubJudge(rate) as stub:
        judge_answers(
            options(
                folder,
                stub,
                prompts=tmp_path / "prompts.jsonl",
                references=tmp_path / "gpt-4.jsonl",
            )
        )
    asked = {body["messages"][-1]["content"] for body in stub.asked}
    assert "single-math-v1: Ask 1? right 1 score 4." in asked
    assert "single-math-v1-multi-turn: And 1, with {braces}? right 2 score 5." in asked
    assert "single-v1-multi-turn: And 0, with {braces}? score 3. score 4." in asked
    assert {len(body["messages"]) for body in stub.asked} == {1}
    note = judged(folder)["table"]["note"]
    assert "own" not in note and "without a correct" not in note
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompts[0]))
    with StubJudge(rate) as stub, pytest.raises(DataError, match="no prompt of the name single-"):
        judge_answers(options(folder, stub, prompts=tmp_path / "prompts.jsonl"))
    assert not stub.asked


def test_nothing_is_asked_without_consent_or_key(folder, monkeypatch):
    with StubJudge(rate) as stub:
        with pytest.raises(ConfigError, match="Nothing was asked. --yes agrees"):
            judge_answers(options(folder, stub, yes=False))
        monkeypatch.delenv("STUB_KEY")
        with pytest.raises(ConfigError, match="STUB_KEY is not set"):
            judge_answers(options(folder, stub))
    assert not stub.asked and not (folder / "judged.json").exists()


@pytest.mark.parametrize(
    "failure",
    [
        (500, {"error": "overloaded"}),
        (429, {"error": "slow down"}),
        (200, "<html>maintenance</html>"),
        (200, {"object": "error", "message": "quota"}),
        (200, {"choices": []}),
    ],
    ids=["500", "429", "page", "error with 200", "no choices"],
)
def test_a_failure_that_passes_changes_nothing(folder, failure):
    with StubJudge(rate) as stub:
        judge_answers(options(folder, stub))
    expected = judged(folder)["items"]
    (folder / ".judged").rename(folder / ".earlier")
    with StubJudge(lambda body, n: failure if n % 4 == 1 else rate(body, n)) as stub:
        judge_answers(options(folder, stub, parallel=1))
    assert judged(folder)["items"] == expected and len(stub.asked) > 24


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        ((500, {"error": "broken"}), MachineError, "does not answer"),
        (STALL, MachineError, "timed out"),
        ((200, "<html>maintenance</html>"), MachineError, "no chat completion, but '<html>"),
        ((401, {"error": {"message": "bad key"}}), ConfigError, "refuses the key"),
        ((404, {"error": {"message": "no such model"}}), ConfigError, "refuses the request for"),
    ],
    ids=["500", "stalls", "page", "401", "404"],
)
def test_a_failure_that_stays_is_said_and_what_was_paid_for_is_kept(folder, failure, error, said):
    with StubJudge(lambda body, n: rate(body, n) if n <= 5 else failure) as stub:
        with pytest.raises(error, match=re.escape(said)) as raised:
            judge_answers(options(folder, stub, parallel=1, retries=1, timeout=0.3))
        assert KEY not in str(raised.value)
    assert not (folder / "judged.json").exists()
    (cache,) = (folder / ".judged").iterdir()
    assert len(cache.read_text().splitlines()) == 6
    # the same endpoint again: the five are not asked for again
    port = stub.url
    with StubJudge(rate) as later:
        lines = cache.read_text().splitlines()
        head = json.loads(lines[0])
        endpoint = options(folder, later).endpoint
        moved = cache.with_name(f"{label(endpoint)}.jsonl")
        head["endpoint"] = fingerprint(endpoint)
        cache.unlink()
        moved.write_text("\n".join([json.dumps(head), *lines[1:]]) + "\n")
        judge_answers(options(folder, later))
    assert len(later.asked) == 24 - 5 and port != later.url


def fingerprint(content):
    from sftmix.storage import provenance

    return provenance.fingerprint(content)


def label(endpoint):
    return fingerprint(["stub", endpoint])[:8]


def test_answers_without_a_rating_are_asked_for_again_then_counted(folder):
    """The judge lies: no rating, or one that is not on the scale."""
    seen = {}

    def reply(body, number):
        asked = body["messages"][-1]["content"]
        seen[asked] = seen.get(asked, 0) + 1
        if "Ask 1?" in asked and "And 1" not in asked:
            return completion("[[11]]" if seen[asked] % 2 else "I would rather not say.")
        if "Ask 2?" in asked and seen[asked] == 1:
            return completion(None)
        return rate(body, number)

    with StubJudge(reply) as stub:
        judge_answers(options(folder, stub))
    found = judged(folder)
    for name in ("first", "second"):
        items = found["items"][name]
        assert items["101/1"] is None and None not in [items["102/1"], items["102/2"]]
        row = dict(zip(found["table"]["titles"], rows_by_model(found)[name], strict=True))
        assert row["no rating"] == "1"
        given = [value for value in items.values() if value is not None]
        assert row["rating"] == f"{np.mean(given):.2f}"
    # two answers of "Ask 1?" three times each; "Ask 2?" twice, for both turns of both models
    assert len(stub.asked) == 24 + 2 * 2 + 4
    lines = (folder / "model_judgment" / "stub_single.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["score"] == -1 for line in lines) == 2


def rows_by_model(found):
    return {row[0]: row for row in found["table"]["rows"]}


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("[[7]]", 7),
        ("so [[6.5]]", 6.5),
        ("[8]", 8),
        ("[[0]]", None),
        ("9", None),
        (None, None),
    ],
)
def test_a_rating_is_a_number_in_brackets_from_1_to_10(text, rating):
    assert mt_bench.rating_of(text) == rating


def prefer_longer(body, _):
    """Prefers the longer output, with certainty 0.8; `m` is the one that is shown first."""
    shown = re.findall(r'"output": """(.*?)"""', body["messages"][-1]["content"], re.DOTALL)
    first = 0.8 if len(shown[0]) > len(shown[1]) else 0.2
    top = [
        {"token": t, "bytes": None, "logprob": math.log(p)}
        for t, p in (("m", first), ("M", 1 - first))
    ]
    assert body["max_tokens"] == 1 and body["logprobs"] is True and body["model"] == "stub"
    content = [{**max(top, key=lambda each: each["logprob"]), "top_logprobs": top}]
    return completion("m", {"content": content, "refusal": None})


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    questions = answered(
        folder,
        alpaca_questions(),
        {
            "long": lambda n, _: "x" * (20 if n < 9 else 2),
            "short": lambda n, _: "x" * (1 if n < 9 else 30),
        },
    )
    reference = [
        {"instruction": row.row["instruction"], "output": "y" * 10, "generator": "gpt4_turbo"}
        for row in questions.rows
    ]
    (tmp_path / "gpt4_turbo.json").write_text(json.dumps(reference[::-1]))
    return folder


def test_win_rates_are_those_of_alpaca_eval(outputs):
    from alpaca_eval import metrics

    against = outputs.parent / "gpt4_turbo.json"
    with StubJudge(prefer_longer) as stub:
        with pytest.raises(ConfigError, match="--against FILE is missing"):
            judge_answers(options(outputs, stub))
        judge_answers(options(outputs, stub, against=against))
        found = judged(outputs)
        assert len(stub.asked) == 24
        judge_answers(options(outputs, stub, against=against, yes=False))  # nothing is left to ask
        assert len(stub.asked) == 24 and judged(outputs)["items"] == found["items"]
    expected = {n: 0.8 if n < 9 else 0.2 for n in range(12)}
    assert list(found["items"]["long"].values()) == pytest.approx(list(expected.values()))
    assert found["win_rates"]["long"]["win_rate"] == pytest.approx(100 * (9 * 0.8 + 3 * 0.2) / 12)
    for name in ("long", "short"):
        annotations = json.loads((outputs / "annotations" / f"{name}.json").read_text())
        by_package = metrics.get_winrate(annotations)
        assert found["win_rates"][name] == pytest.approx(
            {k: float(v) for k, v in by_package.items()}
        )
    note = found["table"]["note"]
    assert "12 of AlpacaEval's 805 instructions" in note and "annotator weighted_alpaca" in note


def test_a_verdict_that_is_none_is_counted(outputs):
    def reply(body, number):
        if "Do 3." in body["messages"][-1]["content"]:
            return completion("no idea", None)
        return prefer_longer(body, number)

    with StubJudge(reply) as stub:
        judge_answers(options(outputs, stub, against=outputs.parent / "gpt4_turbo.json"))
    found = judged(outputs)
    assert found["items"]["long"]["4"] is None
    assert rows_by_model(found)["long"][-1] == "1"
    assert found["win_rates"]["long"]["n_total"] == 11


def test_the_length_controlled_rate_is_that_of_alpaca_eval(tmp_path, monkeypatch):
    from alpaca_eval.metrics import get_length_controlled_winrate, glm_winrate

    rng = np.random.default_rng(0)
    rows = [
        f"{i},gamed_{kind},{rng.normal():.4f},{rng.integers(0, 2)},{rng.normal():.4f},False"
        for kind in (1, 2)
        for i in range(805)
    ]
    header = "index,model,std_delta_len,preference,instruction_difficulty,not_gamed_baseline"
    gamed = tmp_path / "df_gamed.csv"
    gamed.write_text("\n".join([header, *rows]) + "\n")
    lengths = rng.integers(15, 60, 805)
    folder = tmp_path / "all"
    answered(folder, alpaca_questions(805), {"mine": lambda n, _: "x" * int(lengths[n])})
    answered(tmp_path / "other", alpaca_questions(805), {"ref": lambda n, _: "y" * 20})
    against = tmp_path / "other" / "model_outputs" / "ref.json"
    with StubJudge(prefer_longer) as stub:
        judge_answers(options(folder, stub, against=against, length_data=gamed))
        without = options(folder, stub, against=against)
        found = judged(folder)
        judge_answers(without)
    assert "df_gamed.csv of tatsu-lab/alpaca_eval cannot be had" in judged(folder)["table"]["note"]
    annotations = json.loads((folder / "annotations" / "mine.json").read_text())
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(gamed))
    expected = get_length_controlled_winrate(annotations, save_weights_dir=None)
    rate_of = found["win_rates"]["mine"]["length_controlled_winrate"]
    assert rate_of == pytest.approx(float(expected["length_controlled_winrate"]))
    assert abs(rate_of - found["win_rates"]["mine"]["win_rate"]) > 1


def test_a_journal_drops_a_line_that_a_kill_has_cut_and_refuses_other_settings(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"seed": 0}).add([{"item": "a"}, {"item": "b"}])
    with path.open("a") as file:
        file.write('{"item": "c", "te')
    again = Journal(path, {"seed": 0})
    assert [row["item"] for row in again.rows] == ["a", "b"]
    again.add([{"item": "c"}])
    assert [row["item"] for row in Journal(path, {"seed": 0}).rows] == ["a", "b", "c"]
    with pytest.raises(ArtifactError, match="seed: 0 before, 1 now"):
        Journal(path, {"seed": 1})
    assert Journal(path, {"seed": 1}, force=True).rows == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no questions"),
        ([{"question_id": 1, "turns": []}], "question 1: expected turns of text"),
        ([{"question_id": 1, "turns": ["a"]}, {"turns": ["b"]}], "question 2 has not the keys"),
        ([{"question_id": 1, "turns": ["a"]}] * 2, "stands twice"),
        ([{"prompt": "a"}], "question 1 has not the keys instruction"),
    ],
)
def test_questions_of_another_form_are_named(tmp_path, rows, said):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match=said):
        read_questions(path)


def test_missing_answers_and_folders_are_named(tmp_path, folder):
    with StubJudge(rate) as stub:
        with pytest.raises(ConfigError, match=r"holds no questions.jsonl"):
            judge_answers(options(tmp_path, stub))
        with pytest.raises(ConfigError, match="there are answers of first, second"):
            judge_answers(options(folder, stub, control="third"))
        path: Path = folder / "model_answer" / "first.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
        with pytest.raises(DataError, match="2 of 6 questions have no answer"):
            judge_answers(options(folder, stub))
    assert not stub.asked
    assert isinstance(read_questions(folder / "questions.jsonl"), Questions)
