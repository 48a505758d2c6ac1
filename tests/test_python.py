"""What `import sftmix` offers, and docs/python.md, whose code is run."""

import inspect
import re
import subprocess
import sys

import pytest
import torch
from naive import PARTNERS, make_examples
from processes import ROOT
from tokenizers_for_tests import character_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import sftmix
from sftmix.batches.collate import build_micro_batch
from sftmix.errors import StoppedError, TrainingError

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, `my/llama`, in which the blocks of the page run."""
    monkeypatch.chdir(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(settings).save_pretrained("my/llama")
    tokenizer.save_pretrained("my/llama")
    return tmp_path


def test_the_loop_of_the_page_learns(here, capsys):
    torch.manual_seed(0)
    exec(compile(BLOCKS[0], "docs/python.md", "exec"), {})
    losses = re.findall(r"NTP ([\d.]+), Mixup ([\d.]+) nats", capsys.readouterr().out)
    assert len(losses) == 3 and float(losses[-1][0]) < float(losses[0][0])


def test_pair_rows_are_those_of_a_micro_batch():
    """Of sequences of unlike lengths, padded on the right; several turns in one response."""
    examples = make_examples()
    examples[0][1][1] = True  # a first turn, apart from the last
    batch = build_micro_batch(examples, PARTNERS, indices=tuple(range(len(examples))), pad_id=0)
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, (_, response) in zip(mask, examples, strict=True):
        row[: len(response)] = torch.as_tensor(response)
    pairs = torch.tensor([[a, b] for a, b, _ in PARTNERS])
    lam = torch.tensor([share for _, _, share in PARTNERS])
    found = sftmix.pair_rows(batch.input_ids, mask, pairs, lam)
    for name in ("rows", "labels", "pairs", "lam"):
        assert torch.equal(getattr(found, name), getattr(batch, name)), name


def test_rows_are_counted_by_hand():
    """Three examples of width 4, the last alone; the pair mixes two positions."""
    input_ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 0], [9, 4, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    found = sftmix.pair_rows(input_ids, mask, torch.tensor([[1, 0]]), torch.tensor([0.25]))
    assert found.rows.tolist() == [0, 1, 2, 4, 5, 8]
    assert found.labels.tolist() == [6, 7, 8, 2, 3, 4]
    assert found.pairs.tolist() == [[3, 0], [4, 1]] and found.lam.tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_mask": torch.ones(2, 5)}, "expected \\(B, S\\) for both"),
        ({"pairs": torch.tensor([0, 1])}, "expected \\(P, 2\\) and \\(P,\\)"),
        ({"pairs": torch.tensor([[0, 0]])}, "an example is in two pairs"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change, message):
    fits = {
        "input_ids": torch.ones(2, 4, dtype=torch.int64),
        "response_mask": torch.ones(2, 4, dtype=torch.bool),
        "pairs": torch.tensor([[0, 1]]),
        "lam": torch.tensor([0.5]),
    }
    with pytest.raises(ValueError, match=message):
        sftmix.pair_rows(**fits | change)


def test_the_names_are_lazy_and_documented():
    code = "import sftmix, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pydantic"} & set(done.stdout.split())
    assert set(sftmix.__all__) <= set(dir(sftmix))
    for name in sftmix.__all__:
        assert callable(getattr(sftmix, name)) and inspect.getdoc(getattr(sftmix, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sftmix.nothing  # noqa: B018


@pytest.mark.parametrize(("code", "error"), [(75, StoppedError), (3, TrainingError)])
def test_ranks_that_fail_or_stop_are_errors(code, error, here, monkeypatch):
    from sftmix.pipeline import launching

    given = {}

    def launch(config, path, overrides, request):
        given.update(path=path, config=sftmix.load_config(path), request=request)
        return code

    monkeypatch.setattr(launching, "launch_here", launch)
    with pytest.raises(error):
        sftmix.run("quickstart", ["engine.num_processes=2", "run.seed=5"], stage="data")
    assert given["config"].run.seed == 5 and given["request"].only == "data"
