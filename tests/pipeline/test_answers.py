"""`sftmix answers` against transformers' own generation, killed and resumed."""

import json
import shutil
import sys
import types

import pytest
import torch
from processes import sftmix
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sftmix.errors import ArtifactError
from sftmix.evaluation.judges import answers as answers_module
from sftmix.evaluation.judges.generation import Answer, TransformersWriter, VllmWriter
from sftmix.evaluation.judges.questions import read_questions

pytestmark = pytest.mark.recipe
WORDS = "red green blue one two three four north south".split()
CATEGORIES = ("writing", "math", "stem")


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):
    """Returns a model with large random weights, whose answers depend on every turn and which stops
    at some of them."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(trained / "run" / "sftmix" / "model", folder)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=False)
    network = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.5, generator=generator)
    network.generation_config.eos_token_id = list(range(3, 40))
    network.generation_config.do_sample = True
    network.generation_config.temperature = 1.5
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def mt_bench(tmp_path):
    rows = [
        {
            "question_id": 80 + n,
            "category": CATEGORIES[n % 3],
            "turns": [f"Say {' '.join(WORDS[: 1 + n % 5])} {n}", f"And {WORDS[n % 9]}"],
        }
        for n in range(9)
    ]
    path = tmp_path / "mt.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def run(model, questions, to, *more):
    return sftmix("answers", str(model), "--questions", str(questions), "--to", str(to), *more)


def written(folder):
    (path,) = (folder / "model_answer").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


def test_greedy_answers_of_a_batch_are_those_of_transformers_one_by_one(model, mt_bench, tmp_path):
    done = run(model, mt_bench, tmp_path / "out", "--temperature", "0", "--max-new-tokens", "12")
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    stops, num_cut = set(range(3, 40)), 0
    for row in read_questions(mt_bench).rows:
        said = []
        for turn in row.turns:
            said.append({"role": "user", "content": turn})
            ids = tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            tokens = network.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
            num_cut += tokens[-1].item() not in stops
            kept = [t for t in tokens.tolist() if t not in stops]
            text = tokenizer.decode(kept, skip_special_tokens=True).strip()
            said.append({"role": "assistant", "content": text})
        assert written(tmp_path / "out")[int(row.item)] == [said[1]["content"], said[3]["content"]]
    assert f"{num_cut} cut at 12 tokens" in done.stdout and 0 < num_cut < 18
    texts = [text for turns in written(tmp_path / "out").values() for text in turns]
    assert len(set(texts)) > 9


def test_the_temperature_is_that_of_the_category(model, mt_bench, tmp_path, monkeypatch):
    asked = {}

    class Noting(TransformersWriter):
        def answer(self, prompts, *, temperature, **how):
            found = super().answer(prompts, temperature=temperature, **how)
            for prompt in prompts:
                text = self._tokenizer.decode(prompt)
                asked[next(n for n in range(9) if f" {n}" in text)] = temperature
            return found

    monkeypatch.setitem(answers_module.WRITERS, "transformers", Noting)
    answers_module.write_all_answers(options(model, mt_bench, tmp_path / "out"))
    assert asked == {n: (0.7, 0.0, 0.1)[n % 3] for n in range(9)}


def options(model, questions, to, **changes):
    given = {
        "models": [str(model)],
        "questions": questions,
        "to": to,
        "limit": None,
        "max_new_tokens": 8,
        "temperature": None,
        "seed": 0,
        "batch_size": 2,
        "backend": "transformers",
        "force": False,
    }
    return types.SimpleNamespace(**(given | changes))


def test_a_killed_run_writes_the_sampled_answers_of_an_undisturbed_one(
    model, mt_bench, tmp_path, monkeypatch
):
    answers_module.write_all_answers(options(model, mt_bench, tmp_path / "whole"))
    whole = written(tmp_path / "whole")
    calls = []

    class Dying(TransformersWriter):
        def answer(self, prompts, **how):
            if len(calls) == 4:
                raise KeyboardInterrupt
            calls.append(len(prompts))
            torch.rand(3)  # nothing that was drawn before may matter
            return super().answer(prompts, **how)

    monkeypatch.setitem(answers_module.WRITERS, "transformers", Dying)
    with pytest.raises(KeyboardInterrupt):
        answers_module.write_all_answers(options(model, mt_bench, tmp_path / "cut"))
    assert not (tmp_path / "cut" / "model_answer").exists()
    monkeypatch.undo()
    again = []

    class Counting(TransformersWriter):
        def answer(self, prompts, **how):
            again.append(len(prompts))
            return super().answer(prompts, **how)

    monkeypatch.setitem(answers_module.WRITERS, "transformers", Counting)
    answers_module.write_all_answers(options(model, mt_bench, tmp_path / "cut"))
    assert written(tmp_path / "cut") == whole and sum(calls) + sum(again) == 18
    answers_module.write_all_answers(options(model, mt_bench, tmp_path / "cut"))
    assert sum(calls) + sum(again) == 18  # nothing was left to write
    with pytest.raises(ArtifactError, match="seed: 0 before, 1 now"):
        answers_module.write_all_answers(options(model, mt_bench, tmp_path / "cut", seed=1))
    answers_module.write_all_answers(options(model, mt_bench, tmp_path / "cut", seed=1, force=True))
    other = written(tmp_path / "cut")
    sampled = [80 + n for n in range(9) if n % 3 != 1]
    assert any(other[n] != whole[n] for n in sampled)
    assert all(other[n] == whole[n] for n in whole if n not in sampled)  # mathematics is greedy


def test_alpaca_eval_reads_its_outputs(model, trained, tmp_path):
    utils = pytest.importorskip("alpaca_eval.utils", reason="needs sftmix[eval]")
    rows = [{"instruction": f"Say {word}", "dataset": "own"} for word in WORDS]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    run(trained / "run", tmp_path / "alpaca.json", tmp_path / "out", "--max-new-tokens", "4")
    files = sorted((tmp_path / "out" / "model_outputs").iterdir())
    assert [file.stem for file in files] == ["NTP-baseline", "SFTMix"]
    table = utils.load_or_convert_to_dataframe(files[1])
    assert list(table["instruction"]) == [row["instruction"] for row in rows]
    assert set(table["generator"]) == {"SFTMix"} and set(table["dataset"]) == {"own"}
    assert table["output"].map(type).eq(str).all()


def test_a_prompt_that_fills_the_context_has_an_empty_answer_that_is_counted(
    model, tmp_path, capsys
):
    rows = [
        {"question_id": n, "category": "math", "turns": ["north " * (1 if n else 600)]}
        for n in range(3)
    ]
    (tmp_path / "mt.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    answers_module.write_all_answers(options(model, tmp_path / "mt.jsonl", tmp_path / "out"))
    assert written(tmp_path / "out")[0] == [""]
    assert "1 empty: the prompt fills the context" in capsys.readouterr().out


def test_a_template_that_reads_the_clock_is_told_one_day(model):
    writer = TransformersWriter(str(model))
    writer._tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    ids = writer.prompt_ids([{"role": "user", "content": "ab"}])
    assert writer._tokenizer.decode(ids).endswith("26 Jul 2024 ab")


def test_vllm_is_asked_for_the_same_prompts_and_settings(model, monkeypatch):
    """A stand-in with vLLM's interface: vLLM itself needs a GPU."""
    asked = []

    class Parameters:
        def __init__(self, **given):
            self.__dict__.update(given)

    class LLM:
        def __init__(self, model):
            self.llm_engine = types.SimpleNamespace(
                model_config=types.SimpleNamespace(max_model_len=50)
            )

        def get_default_sampling_params(self):
            return Parameters(temperature=0.6, top_p=0.9)

        def generate(self, prompts, parameters):
            asked.append((prompts, dict(parameters.__dict__)))
            outputs = [types.SimpleNamespace(text=" hi ", finish_reason="length")]
            return [types.SimpleNamespace(outputs=outputs) for _ in prompts]

    stand_in = types.SimpleNamespace(LLM=LLM, SamplingParams=Parameters)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    writer = VllmWriter(str(model))
    how = {"max_new_tokens": 9, "seed": 3}
    assert writer.prompt_ids([{"role": "user", "content": "a"}]) == TransformersWriter(
        str(model)
    ).prompt_ids([{"role": "user", "content": "a"}])
    found = writer.answer([[1, 2], [1] * 60, [3]], temperature=0.0, **how)
    assert found == [Answer("hi", "length"), Answer("", "no room"), Answer("hi", "length")]
    assert asked[0] == (
        [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}],
        {"temperature": 0.0, "max_tokens": 9, "seed": 3},
    )
    writer.answer([[1]], temperature=None, **how)
    assert asked[1][1] == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 9, "seed": 3}
