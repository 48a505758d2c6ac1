"""TRL's trainer with the method: its loss, pairs and figures beside those of the engine."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from naive import model_from, ours_of
from peft import LoraConfig
from processes import ROOT, run_ranks
from safetensors.torch import load_file
from score_tables import table as score_table
from tokenizers_for_tests import character_tokenizer

pytest.importorskip("trl")

from trl_runs import MU, settings, tokenised, trainer_of

from sftmix.batches.collate import build_micro_batch
from sftmix.config.schema import DataSource
from sftmix.data.conversations import content_hash
from sftmix.data.formats import Columns, read_row
from sftmix.data.readers import BadRows, read_rows
from sftmix.errors import ArtifactError, ConfigError, DataError
from sftmix.integrations.trl import PairSampler, SFTMixTrainer, with_confidence
from sftmix.loss.requests import LossRequest
from sftmix.pairing.matching import Matching

WORKER = Path(__file__).parents[1] / "support/trl_runs.py"


def engine_results(wrapped, rows, drawn):
    """Returns the engine's result for each unit of a step, as a micro-batch."""
    batches = []
    for unit, lam in zip(drawn.units.tolist(), drawn.lam, strict=True):
        labels = [np.array(rows[index]["labels"]) for index in unit]
        ids = [np.array(rows[index]["input_ids"], np.int32) for index in unit]
        tokens = list(zip(ids, (found != -100 for found in labels), strict=True))
        batches.append(
            build_micro_batch(tokens, [(0, 1, float(lam))], indices=tuple(unit), pad_id=2)
        )
    counts = [sum(len(getattr(batch, name)) for batch in batches) for name in ("labels", "pairs")]
    return [
        wrapped(
            batch.input_ids,
            batch.attention_mask,
            LossRequest(batch.rows, batch.labels, batch.pairs, batch.lam, *counts, MU),
        )
        for batch in batches
    ]


# plain; a soft-cap; a scale; a mixture of experts with its auxiliary loss
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere-scaled-logits", "mixtral-moe"])
def test_a_step_has_the_loss_and_the_gradients_of_the_engine(family, tmp_path):
    make = partial(model_from, FAMILIES[family][0], dtype=torch.float32)
    trainer = trainer_of(make(), tmp_path)
    drawn = trainer.sampler.matching.units(0, 0, 4)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()

    wrapped = ours_of(make()).train()
    results = engine_results(wrapped, tokenised(), drawn)
    loss, ntp, mixup = (sum(values) for values in list(zip(*results, strict=True))[:3])
    loss.backward()
    logged = next(entry for entry in trainer.state.log_history if "ntp_loss" in entry)
    assert logged["ntp_loss"] == pytest.approx(float(ntp), rel=1e-5)
    assert logged["mixup_loss"] == pytest.approx(float(mixup), rel=1e-5)
    assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    gradients = {wrapped.plain_name(name): p.grad for name, p in wrapped.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        moved = before[name] - parameter.detach()  # SGD with a rate of 1: the gradient
        torch.testing.assert_close(moved, gradients[name], rtol=1e-4, atol=1e-5)


def test_the_model_is_as_it_was_and_evaluated_by_trl(tmp_path):
    """Without Mixup the trainer's loss is TRL's, and the head is the model's own again."""
    model = model_from(FAMILIES["llama"][0], dtype=torch.float32)
    names, head = set(model.state_dict()), model.get_output_embeddings()
    trainer = trainer_of(model, tmp_path, mixup_weight=0.0, learning_rate=0.0)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "ntp_loss" in entry)
    found = trainer.evaluate(trainer.train_dataset)
    assert logged["loss"] == pytest.approx(logged["ntp_loss"]) and "eval_entropy" in found
    losses = []
    for row in tokenised():
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels).loss
        losses.append((float(loss.detach()), int((labels != -100).sum())))
    mean = np.average([loss for loss, _ in losses], weights=[count for _, count in losses])
    assert logged["loss"] == pytest.approx(mean, rel=1e-5)
    assert set(model.state_dict()) == names and model.get_output_embeddings() is head
    assert "forward" not in vars(head) and model(input_ids=ids).logits.shape[-1] == 97


def test_adapters_are_trained_and_start_from_the_same_loss(tmp_path):
    whole, adapted = (
        trainer_of(
            model_from(FAMILIES["llama"][0], dtype=torch.float32), tmp_path / name, **options
        )
        for name, options in (("whole", {}), ("adapted", {"peft_config": LoraConfig(r=4)}))
    )
    before = {name: p.detach().clone() for name, p in adapted.model.named_parameters()}
    losses = []
    for trainer in (whole, adapted):
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "ntp_loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # adapters begin at nothing
    moved = {n for n, p in adapted.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_B" in name for name in moved)


def test_pairs_are_neighbours_at_even_places_and_new_in_each_epoch():
    """Seven examples: three pairs and a single one; ten of which four are in the middle."""
    for confident, middle, unconfident in ((3, 0, 4), (3, 4, 3), (2, 1, 5)):
        ids = np.arange(confident + middle + unconfident)
        parts = ids[:confident], ids[confident + middle :], ids[confident : confident + middle]
        matching = Matching(*parts, seed=3)
        orders = []
        for epoch in (0, 1):
            sampler = PairSampler(matching, lambda epoch=epoch: epoch)
            order = list(sampler)
            assert sorted(order) == ids.tolist() and len(sampler) == len(order)
            drawn = matching.units(epoch, 0, matching.num_units)
            pairs = {tuple(unit) for unit in drawn.units.tolist() if unit[1] >= 0}
            # no batch of two divides a pair
            assert pairs <= set(zip(order[::2], order[1::2], strict=False))
            assert {(a, b) for a in order if (b := int(sampler.partner[a])) >= 0} == pairs
            for (first, _), lam in zip(drawn.units.tolist(), drawn.lam, strict=True):
                assert sampler.lam[first] == lam
            orders.append(order)
        assert orders[0] != orders[1]


def conversations(num):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}{'.' * (n % 3 + 1)}"},
            ]
        }
        for n in range(num)
    ]


def ids_of(rows):
    return [content_hash(tuple(row["messages"])) for row in rows]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def test_scores_of_the_engine_train_conversations_and_a_stopped_run_resumes_alike(tmp_path):
    rows = conversations(10)
    ids = ids_of(rows)
    # a table with a row more, in another order
    order = np.random.default_rng(0).permutation(10)
    table = score_table(
        tmp_path / "scores",
        ids=[*(ids[n] for n in order), "f" * 32],
        counts=[4] * 11,
        sums={10: np.array([n + 1.0 for n in order] + [1.0])},
    )
    data = with_confidence(Dataset.from_list(rows), table)
    assert data["example_id"][:] == ids
    assert np.argsort(data["confidence"]).tolist() == list(range(9, -1, -1))

    def run(name, *, until=None, resume=None):
        trainer = SFTMixTrainer(
            model_from({**FAMILIES["llama"][0], "vocab_size": 120}, dtype=torch.float32),
            settings(
                tmp_path / "run",
                gradient_accumulation_steps=1,
                per_device_train_batch_size=4,
                num_train_epochs=2,
                learning_rate=0.01,
                optim="adamw_torch",
                assistant_only_loss=True,
                max_steps=until or -1,
                save_strategy="steps",
                save_steps=2,
            ),
            train_dataset=data,
            processing_class=character_tokenizer(chat_template=TEMPLATE),
        )
        assert sorted(trainer.sampler.matching.confident) == list(range(5)), name
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    # in the middle of the second of two epochs of three steps
    again = run("again", resume=str(tmp_path / "run/checkpoint-4"))
    assert whole.state.global_step == again.state.global_step == 6
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    mixed = [entry["mixup_loss"] for entry in whole.state.log_history if "mixup_loss" in entry]
    assert len(mixed) == 6 and min(mixed[:2]) > 0


def test_a_data_set_of_arrow_has_the_ids_of_its_file(tmp_path):
    """Arrow gives each call the arguments of all, without values."""
    rows = conversations(3)
    for row, arguments in zip(rows, ({"a": 1}, {"b": 2}, {}), strict=True):
        call = {"function": {"name": "f", "arguments": arguments}}
        answers = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "r"}]
        row["messages"][1]["tool_calls"] = [call]
        row["messages"] += answers
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns({}, (), ())
    ids = [
        read_row(row, "messages", columns).content_id
        for _, row in read_rows(DataSource(path=str(file)), BadRows())
    ]
    sums = {10: np.arange(3.0)}
    table = score_table(tmp_path / "scores", ids=ids, counts=[4] * 3, sums=sums)
    found = with_confidence(Dataset.from_list(rows), table)
    assert found["example_id"][:] == ids


def test_examples_without_a_score_and_unreadable_rows_are_refused(tmp_path):
    rows = conversations(4)
    table = score_table(
        tmp_path / "scores", ids=ids_of(rows[:3]), counts=[4] * 3, sums={10: np.arange(3.0)}
    )
    with pytest.raises(ArtifactError, match="no score for 1 example of 4"):
        with_confidence(Dataset.from_list(rows), table)
    rows[2]["messages"][1]["role"] = "narrator"
    with pytest.raises(DataError, match="dataset:row 3: .*narrator"):
        with_confidence(Dataset.from_list(rows), table)


def test_what_the_method_excludes_is_refused(tmp_path):
    for changes, said in (
        ({"packing": True}, "packing: not with SFTMixTrainer"),
        ({"per_device_train_batch_size": 3}, "is 3, expected an even number"),
        ({"mixup_weight": -1.0}, "mixup_weight is -1.0, expected at least 0"),
        ({"kernel_backend": "cuda"}, "kernel_backend is 'cuda'; expected auto, torch, triton"),
    ):
        with pytest.raises(ValueError, match=said):
            settings(tmp_path, **changes)
    model = model_from(FAMILIES["llama"][0], dtype=torch.float32)
    with pytest.raises(DataError, match="expected a datasets.Dataset with the column 'confidence'"):
        trainer_of(model, tmp_path, tokenised().remove_columns("confidence"))
    with pytest.raises(ConfigError, match="takes the place of the method's loss"):
        SFTMixTrainer(
            model, settings(tmp_path), train_dataset=tokenised(), compute_loss_func=lambda *_: 0
        )
    infinite = tokenised().remove_columns("confidence").add_column("confidence", [1.0, -np.inf] * 4)
    with pytest.raises(DataError, match="confidence of 4 examples of train_dataset is missing"):
        trainer_of(model, tmp_path, infinite)


def test_the_code_of_the_docs_runs(tmp_path, monkeypatch):
    """Also TRL's default of bfloat16 by autocast, over weights in float32."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/trl.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = model_from({**FAMILIES["llama"][0], "vocab_size": 120}, dtype=torch.float32)
    model.save_pretrained("my/llama")
    character_tokenizer(chat_template=TEMPLATE).save_pretrained("my/llama")
    rows = conversations(8)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = {10: np.arange(8.0)}
    score_table(tmp_path / "runs/mine/confidence", ids=ids_of(rows), counts=[4] * 8, sums=sums)
    names: dict = {}
    block = block.replace('output_dir="out"', 'output_dir="out", use_cpu=True')
    exec(compile(block, "docs/trl.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.args.bf16 and next(trainer.model.parameters()).dtype == torch.float32
    assert trainer.state.global_step == 3
    for parameter in trainer.model.parameters():
        assert torch.isfinite(parameter).all()


ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def trained_by_ranks(folder, num_ranks, *arguments):
    folder.mkdir()
    run_ranks(WORKER, num_ranks, str(folder), *arguments)
    return load_file(folder / "model.safetensors"), torch.load(folder / "logged.pt")


@pytest.fixture(scope="module")
def trained_by_one(tmp_path_factory):
    return trained_by_ranks(tmp_path_factory.mktemp("one") / "run", 1)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["ZeRO-3", pytest.param("DDP", marks=pytest.mark.torture)])
def test_two_processes_train_as_one(trained_by_one, tmp_path, layout):
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps(ZERO_3))
    arguments = [str(zero)] if layout == "ZeRO-3" else []
    weights, logged = trained_by_one
    other_weights, other_logged = trained_by_ranks(tmp_path / "run", 2, *arguments)
    assert set(other_weights) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-5)
    for name in ("loss", "ntp_loss", "mixup_loss", "num_tokens"):
        assert other_logged[name] == pytest.approx(logged[name], rel=1e-5), name
