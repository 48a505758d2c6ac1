"""The whole recipe through the command line, on real files and processes. The specification of the
pipeline."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from processes import ROOT, sftmix
from safetensors import safe_open
from tiny import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.batches.examples import TokenisedExamples
from sftmix.errors import ConfigError
from sftmix.storage.artifacts import verify
from sftmix.train.log import MIXUP, NTP, read_metrics

pytestmark = pytest.mark.recipe
QUICKSTART = "configs/quickstart.yaml"
STAGES = ["data", "reference", "score", "split", "baseline", "train", "evaluate", "report"]
FOLDERS = [
    "data",
    "reference",
    "confidence",
    "pairing",
    "baseline",
    "sftmix",
    "evaluation",
    "report",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of the whole recipe, and what was printed."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    done = sftmix("run", QUICKSTART, *TINY, f"run.dir={folder}")
    return folder, done.stdout


@pytest.fixture
def copy_of(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    return folder


def stages_run(output):
    """Returns the stages that worked, and those that were up to date."""
    worked = re.findall(r"^\[\d/\d\] (\w+): [\d.]+ s$", output, re.M)
    return worked, re.findall(r"^\[\d/\d\] (\w+): up to date$", output, re.M)


def test_every_stage_publishes_a_folder_that_verifies(finished):
    folder, output = finished
    assert stages_run(output) == (STAGES, [])
    for name in FOLDERS:
        verify(folder / name)
    assert (folder / "config.yaml").is_file() and any(
        (folder / "logs" / "tensorboard").rglob("events.*")
    )
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_the_table_and_the_path_of_the_report_are_printed_last(finished):
    folder, output = finished
    tail = output[output.index("SFTMix beside next-token prediction") :]
    for word in (
        "NTP baseline",
        "SFTMix",
        "loss",
        "ppl",
        "exact",
        "tokens/s",
        "minutes",
        "report:",
    ):
        assert word in tail
    assert (
        len(
            re.findall(
                r"^  [\d.]+ min: training [\d.]+, evaluation [\d.]+, checkpoints and exports"
                r" [\d.]+, start and end [\d.]+$",
                output,
                re.M,
            )
        )
        == 3
    )
    page = (folder / "report" / "index.html").read_text()
    assert "that gained most from SFTMix" in page and "held-out loss is" in page


def test_a_run_ends_with_the_model_and_with_commands_that_work(finished, tmp_path):
    folder, output = finished
    lines = output.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("model:"))
    model, baseline, report, export, board = lines[at:]
    assert model.split()[1] == str(folder / "sftmix/model") and baseline.split()[0] == str(
        folder / "baseline/model"
    )
    assert all(
        Path(line.split()[place]).exists()
        for line, place in ((model, 1), (baseline, 0), (report, 1))
    )
    words = shlex.split(export.removeprefix("next:"))
    assert Path(words[0]).name == "sftmix"
    sftmix(*words[1:-1], str(tmp_path / "my-model"))
    assert (tmp_path / "my-model/config.json").is_file()
    assert any(Path(shlex.split(board)[2]).rglob("events.*"))


def test_scores_and_split_cover_every_training_example_once(finished):
    folder, _ = finished
    perplexity = pq.read_table(folder / "confidence" / "perplexity.parquet").to_pydict()
    steps = sorted(set(perplexity["checkpoint"]))
    assert len(steps) == 3 and len(perplexity["example_id"]) == 3 * 61
    split = pq.read_table(folder / "pairing" / "split.parquet").to_pydict()
    assert len(set(split["example_id"])) == 61
    assert [split["part"].count(p) for p in ("confident", "middle", "unconfident")] == [30, 1, 30]


def test_perplexities_equal_a_plain_loop_over_the_saved_checkpoints(finished):
    folder, _ = finished
    import datasets

    rows = datasets.Dataset.from_file(str(folder / "data" / "train.arrow"))
    table = pq.read_table(folder / "confidence" / "perplexity.parquet").to_pandas()
    for checkpoint in sorted((folder / "reference" / "checkpoints").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        scores = table[table["checkpoint"] == int(checkpoint.name.removeprefix("step_"))].set_index(
            "example_id"
        )
        for row in rows.select(range(0, 61, 7)):
            ids = torch.tensor(row["input_ids"])[None]
            labels = torch.where(torch.tensor(row["response_mask"])[None], ids, -100)
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels).loss
            assert scores.loc[row["example_id"], "perplexity"] == pytest.approx(
                loss.exp().item(), rel=1e-5
            )


def test_metrics_have_losses_rates_and_lam(finished):
    folder, _ = finished
    lines = read_metrics(folder / "sftmix" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    expected = {
        "step",
        "epoch",
        NTP,
        MIXUP,
        "mixup/lam (mean)",
        "mixup/coverage (share)",
        "ranks/useful (share)",
        "ranks/slowest (ratio)",
        "tokens/real per rank (tokens/s)",
        "flops/model per rank (TFLOP/s)",
        "flops/hardware per rank (TFLOP/s)",
        "memory/peak (GiB)",
        "time/forward (s)",
        "time/head (s)",
        "time/backward (s)",
        "time/optimiser (s)",
        "time/communication (s)",
        "time/waiting for batches (s)",
        "time/garbage collection (s)",
        "grad_norm",
        "learning_rate",
        "tokens/real (tokens/s)",
        "tokens/response (tokens/s)",
        "tokens/padded (tokens/s)",
        "steps/skipped (steps)",
        "time/training (s)",
    }
    assert set(lines[0]) == expected
    for line in lines:
        assert (
            line["tokens/response (tokens/s)"]
            < line["tokens/real (tokens/s)"]
            == line["tokens/padded (tokens/s)"]  # packed
            == line["tokens/real per rank (tokens/s)"]
        )
        assert 0 < line["mixup/coverage (share)"] <= 1
        assert line["ranks/useful (share)"] == line["ranks/slowest (ratio)"] == 1  # one rank
        parts = sum(line[f"time/{part} (s)"] for part in ("forward", "backward", "optimiser"))
        assert 0 < line["time/head (s)"] < line["time/forward (s)"] < parts
        assert parts <= line["time/training (s)"]
        assert 0 <= line["time/communication (s)"] < parts
        assert 0 < line["flops/model per rank (TFLOP/s)"] < 1
    assert MIXUP not in read_metrics(folder / "baseline" / "metrics.jsonl")[0]


def test_padded_runs_have_the_losses_and_scores_of_packed_ones(copy_of):
    """The same steps, to rounding, and more tokens to compute."""
    before = {
        name: read_metrics(copy_of / name / "metrics.jsonl") for name in ("reference", "sftmix")
    }
    scores = pq.read_table(copy_of / "confidence" / "perplexity.parquet")
    metrics = json.loads((copy_of / "evaluation" / "metrics.json").read_text())
    options = [QUICKSTART, *TINY, f"run.dir={copy_of}", "engine.packing=off", "--force"]
    for stage in ("reference", "score", "split", "train", "evaluate"):
        sftmix(stage, *options)
    for name, packed in before.items():
        padded = read_metrics(copy_of / name / "metrics.jsonl")
        for key in (NTP, MIXUP, "grad_norm"):
            if key in packed[0]:
                assert [line[key] for line in padded] == [
                    pytest.approx(line[key], rel=1e-4) for line in packed
                ]
        assert all(
            line["tokens/padded (tokens/s)"] > line["tokens/real (tokens/s)"] for line in padded
        )
    after = pq.read_table(copy_of / "confidence" / "perplexity.parquet")
    assert after["nll_sum"].to_pylist() == pytest.approx(scores["nll_sum"].to_pylist(), rel=1e-4)
    again = json.loads((copy_of / "evaluation" / "metrics.json").read_text())
    # the baseline was not made again
    for name, rel in (("baseline", 1e-5), ("train", 1e-4)):
        loss = metrics[name]["loss_nats_per_token"]
        assert again[name]["loss_nats_per_token"] == pytest.approx(loss, rel=rel)


def test_a_trace_is_written_where_it_is_asked_for(copy_of):
    sftmix("train", QUICKSTART, *TINY, f"run.dir={copy_of}", "log.profile_steps=[2, 3]", "--force")
    assert (copy_of / "logs" / "traces" / "sftmix_rank_0000.json.gz").stat().st_size > 1000


def test_exported_models_load_with_plain_transformers_and_stop(finished):
    folder, _ = finished
    for name in ("baseline", "sftmix"):
        model = AutoModelForCausalLM.from_pretrained(folder / name / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / name / "model")
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tokenizer.eos_token_id in model.generation_config.eos_token_id
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Add 1 and 2."}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        assert (
            model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1]
            > inputs["input_ids"].shape[1]
        )
        card = (folder / name / "model" / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers") and ("lam ~ Beta" in card) == (
            name == "sftmix"
        )


def test_exact_match_is_what_greedy_generation_writes(finished):
    folder, _ = finished
    import datasets

    scores = pq.read_table(folder / "evaluation" / "per_example.parquet").to_pandas()
    scores = scores[scores["model"] == "SFTMix"].set_index("example_id")
    model = AutoModelForCausalLM.from_pretrained(folder / "sftmix" / "model")
    for row in datasets.Dataset.from_file(str(folder / "data" / "held_out.arrow")):
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["response_mask"])
        prompt, response = ids[: mask.int().argmax()], ids[mask]
        written = model.generate(
            prompt[None], max_new_tokens=len(response), do_sample=False, pad_token_id=3
        )[0, len(prompt) :]
        assert torch.equal(written, response) == scores.loc[row["example_id"], "is_exact"]


def test_a_second_run_does_nothing(copy_of):
    output = sftmix("run", QUICKSTART, *TINY, f"run.dir={copy_of}").stdout
    assert stages_run(output) == ([], STAGES)


def test_a_run_folder_stands_for_its_own_config_wherever_it_lies(copy_of):
    output = sftmix("run", str(copy_of)).stdout  # no overrides, and it was copied
    assert stages_run(output) == ([], STAGES)


def test_a_stage_runs_the_earlier_ones_that_are_missing_and_no_later_one(copy_of):
    for name in ("pairing", "sftmix"):
        shutil.rmtree(copy_of / name)
    output = sftmix("train", str(copy_of)).stdout
    assert stages_run(output) == (["split", "train"], [])


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("mixup.weight=0.5", ["train", "evaluate", "report"]),
        ("split.confident_share=0.3", ["split", "baseline", "train", "evaluate", "report"]),
    ],
)
def test_a_changed_setting_runs_again_only_what_depends_on_it(copy_of, override, again):
    key, value = override.split("=")
    before = sftmix("run", QUICKSTART, *TINY, f"run.dir={copy_of}", override, check=False)
    assert (
        before.returncode == 2
        and f"{key}: " in before.stderr
        and f" before, {value} now" in before.stderr
    )
    assert stages_run(before.stdout) == ([], []) and "--force" in before.stderr
    output = sftmix("run", QUICKSTART, *TINY, f"run.dir={copy_of}", override, "--force").stdout
    assert stages_run(output) == (again, [stage for stage in STAGES if stage not in again])


def test_damaged_output_is_refused_and_named(copy_of):
    file = copy_of / "confidence" / "confidence.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = sftmix("run", QUICKSTART, *TINY, f"run.dir={copy_of}", check=False)
    assert (
        done.returncode == 2 and "confidence.parquet differs from what was written" in done.stderr
    )


def test_mixup_weight_zero_is_plain_sft_to_the_last_bit(copy_of):
    sftmix("train", QUICKSTART, *TINY, f"run.dir={copy_of}", "mixup.weight=0", "--force")
    ours, plain = (
        copy_of / name / "model" / "model.safetensors" for name in ("sftmix", "baseline")
    )
    assert ours.read_bytes() == plain.read_bytes()
    losses = [
        [line[NTP] for line in read_metrics(copy_of / name / "metrics.jsonl")]
        for name in ("sftmix", "baseline")
    ]
    assert losses[0] == losses[1]


def test_mixing_at_the_input_embeddings_trains_another_model_with_the_same_ntp_at_first(
    finished, copy_of
):
    sftmix(
        "train", QUICKSTART, *TINY, f"run.dir={copy_of}", "mixup.site=input_embeddings", "--force"
    )
    lines, at_head = (
        read_metrics(folder / "sftmix" / "metrics.jsonl") for folder in (copy_of, finished[0])
    )
    assert (
        lines[0][NTP] == pytest.approx(at_head[0][NTP], rel=1e-2)
        and lines[0][MIXUP] != at_head[0][MIXUP]
    )
    assert lines[-1][MIXUP] < lines[0][MIXUP]
    assert (
        "interpolated at the input embeddings"
        in (copy_of / "sftmix" / "model" / "README.md").read_text()
    )


def test_other_splits_and_matching_by_length(copy_of):
    options = [
        QUICKSTART,
        *TINY,
        f"run.dir={copy_of}",
        "split.column=variability",
        "split.highest_is_confident=false",
    ]
    options += [
        "split.stratify_by=group",
        "split.confident_share=0.3",
        "split.unconfident_share=0.3",
    ]
    output = sftmix("split", *options, "--force").stdout
    random, by_length = map(
        float, re.search(r"mix coverage.*?([\d.]+)% random, ([\d.]+)% length", output).groups()
    )
    assert by_length >= random > 0
    scores = (
        pq.read_table(copy_of / "confidence" / "confidence.parquet")
        .to_pandas()
        .set_index("example_id")["variability"]
    )
    parts = (
        pq.read_table(copy_of / "pairing" / "split.parquet")
        .to_pandas()
        .set_index("example_id")["part"]
    )
    groups = (
        TokenisedExamples(copy_of / "data" / "train.arrow")
        .table.to_pandas()
        .set_index("example_id")["group"]
    )
    for group in set(groups):
        inside = parts[groups == group]
        assert (
            (inside == "confident").sum()
            == (inside == "unconfident").sum()
            == int(0.3 * len(inside))
        )
        assert (
            scores[inside[inside == "confident"].index].max()
            <= scores[inside[inside == "unconfident"].index].min()
        )
    # does not need the baseline, which is of the other split
    sftmix("train", *options, "mixup.matching=length", "--force")
    refused = sftmix(
        "split",
        QUICKSTART,
        *TINY,
        f"run.dir={copy_of}",
        "split.column=quality",
        "--force",
        check=False,
    )
    assert refused.returncode == 2 and "no column 'quality'" in refused.stderr


def test_mixup_changes_the_model(finished):  # the test of the test
    ours, plain = (
        finished[0] / name / "model" / "model.safetensors" for name in ("sftmix", "baseline")
    )
    assert ours.read_bytes() != plain.read_bytes()


LAUNCHERS = {
    "sftmix": lambda arguments: ["-m", "sftmix.cli", "train", *arguments, "engine.num_processes=2"],
    "deepspeed": lambda arguments: [
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        "29871",
        "launch/run.py",
        *arguments,
        "--stage",
        "train",
    ],
    "torchrun": lambda arguments: [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29872",
        "launch/run.py",
        *arguments,
        "--stage",
        "train",
    ],
}


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(launcher, marks=pytest.mark.torture if launcher == "torchrun" else ())
        for launcher in LAUNCHERS
    ],
)
def test_two_processes_of_any_launcher_train_as_one_does(finished, copy_of, launcher):
    import os

    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [QUICKSTART, *TINY, f"run.dir={copy_of}", "--force"]
    command = [sys.executable, *LAUNCHERS[launcher](arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    manifest = json.loads((copy_of / "sftmix" / "manifest.json").read_text())
    assert manifest["facts"]["world_size"] == 2
    one, two = (
        read_metrics(folder / "sftmix" / "metrics.jsonl") for folder in (finished[0], copy_of)
    )
    for a, b in zip(one, two, strict=True):
        assert (b[NTP], b[MIXUP], b["grad_norm"]) == pytest.approx(
            (a[NTP], a[MIXUP], a["grad_norm"]), rel=2e-4
        )
        assert b["time/communication (s)"] > 0


def test_no_baseline_and_no_held_out_examples(tmp_path):
    sources = tmp_path / "data.jsonl"
    rows = [
        {"question": f"Q{n} <script>alert({n})</script>?", "answer": f"answer {n % 7} & more"}
        for n in range(40)
    ]
    sources.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        *TINY,
        f"data.path={sources}",
        "data.generator=",
        "tokenizer.train={vocab_size: 320}",
        "data.held_out_share=0",
    ]
    overrides += ["baseline.enabled=false"]
    done = sftmix("run", QUICKSTART, *overrides, f"run.dir={tmp_path / 'run'}")
    assert stages_run(done.stdout)[0] == [stage for stage in STAGES if stage != "baseline"]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(" in page  # data is escaped
    refused = sftmix("baseline", QUICKSTART, *overrides, f"run.dir={tmp_path / 'run'}", check=False)
    assert refused.returncode == 2 and "switched off" in refused.stderr


def test_inspect_shows_tokens_and_touches_nothing(tmp_path):
    done = sftmix(
        "inspect",
        QUICKSTART,
        *TINY,
        f"run.dir={tmp_path / 'run'}",
        "--num",
        "2",
        "data.max_length=24",
    )
    assert (
        "% truncated to 24 tokens" in done.stdout
        and len(re.findall(r"loss on \d+ of \d+ tokens", done.stdout)) == 2
    )
    assert done.stdout.count("<<\n") == 2  # marks stand in for colours where there is no terminal
    assert not (tmp_path / "run").exists()


def test_export_copies_a_verified_model(finished, tmp_path):
    folder, _ = finished
    target = tmp_path / "model"
    sftmix(
        "export", QUICKSTART, *TINY, f"run.dir={folder}", "--to", str(target), "--which", "baseline"
    )
    assert (target / "model.safetensors").read_bytes() == (
        folder / "baseline" / "model" / "model.safetensors"
    ).read_bytes()
    again = sftmix(
        "export", QUICKSTART, *TINY, f"run.dir={folder}", "--to", str(target), check=False
    )
    assert again.returncode == 2 and "not an empty folder" in again.stderr


def names_in(folder):
    """Returns the names of the tensors of a folder's safetensors files."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def test_adapters_are_trained_merged_scored_and_exported(finished, tmp_path):
    from peft import AutoPeftModelForCausalLM

    folder, start = tmp_path / "run", finished[0] / "baseline" / "model"
    options = [
        *TINY,
        f"model.path={start}",
        "model.architecture=",
        "model.lora={rank: 4}",
        "train.learning_rate=0.01",
    ]
    options += ["baseline.enabled=false", "tokenizer.train=", f"run.dir={folder}"]
    output = sftmix("run", QUICKSTART, *options).stdout
    assert "score" in stages_run(output)[0] and not (folder / "reference" / "adapter").exists()
    sftmix("export", QUICKSTART, *options, "--to", str(tmp_path / "merged"))
    sftmix("export", QUICKSTART, *options, "--to", str(tmp_path / "adapter"), "--adapter")
    # What vLLM's loaders read (vllm/lora/peft_helper.py, vllm/lora/utils.py and
    # vllm/model_executor/model_loader/weight_utils.py): the source's names of weights, and an
    # adapter without whole modules beside it.
    assert names_in(tmp_path / "merged") == names_in(start)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] and settings["bias"] == "none"
    assert not settings["modules_to_save"] and not settings["use_dora"]
    layers = {name.removesuffix(".weight") for name in names_in(start)}
    for name in names_in(tmp_path / "adapter"):
        layer = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)[1]
        assert layer in layers and layer.split(".")[-1] in str(settings["target_modules"])
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before, merged, adapted = (
            model(ids).logits
            for model in (
                AutoModelForCausalLM.from_pretrained(start),
                AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
                AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
            )
        )
    assert (
        torch.allclose(merged, adapted, rtol=1e-4, atol=1e-5)
        and (merged - before).abs().max() > 1e-2
    )
    base, checkpoint = (
        AutoModelForCausalLM.from_pretrained(f)
        for f in (start, next((folder / "reference/checkpoints").iterdir()))
    )
    same = {n for n, p in base.named_parameters() if torch.equal(p, checkpoint.get_parameter(n))}
    assert same == {n for n, _ in base.named_parameters() if "proj" not in n}
    facts = json.loads((folder / "sftmix" / "manifest.json").read_text())["facts"]
    assert (
        facts["num_trained_parameters"]
        == 4 * (4 * (32 + 32) + 3 * (32 + 48))
        < facts["num_parameters"]
    )
    assert (
        f"{facts['num_trained_parameters']:,} of them trained"
        in (folder / "report" / "index.html").read_text()
    )
    for name, words in (("merged", "merged into the weights"), ("adapter", "library_name: peft")):
        assert words in (tmp_path / name / "README.md").read_text()
    whole = [*TINY, f"run.dir={finished[0]}"]
    refused = sftmix(
        "export", QUICKSTART, *whole, "--to", str(tmp_path / "none"), "--adapter", check=False
    )
    assert (
        refused.returncode == 2
        and "holds no adapter, since all weights were trained" in refused.stderr
    )


def test_a_trained_model_can_be_the_start_and_a_smaller_one_the_reference(finished, tmp_path):
    start = finished[0] / "sftmix" / "model"
    reference = (
        "reference.model={architecture: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2,"
        " n_positions: 128}}"
    )
    overrides = [
        *TINY,
        f"model.path={start}",
        "model.architecture=",
        "tokenizer.train=",
        "data.generator={num_train: 24, num_held_out: 4}",
    ]
    sftmix(
        "run",
        QUICKSTART,
        *overrides,
        reference,
        "baseline.enabled=false",
        "data.max_length=100",
        f"run.dir={tmp_path / 'run'}",
    )
    config = json.loads(
        (tmp_path / "run" / "reference" / "checkpoints" / "step_000001" / "config.json").read_text()
    )
    assert config["model_type"] == "gpt2"


def has_fp16():
    from sftmix.engine.precision import check_device_computes_in

    try:
        check_device_computes_in("fp16")
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(tmp_path, precision):
    if precision == "fp16" and not has_fp16():
        pytest.skip("this machine does not compute in fp16")
    sftmix("data", QUICKSTART, *TINY, f"run.dir={tmp_path}", f"engine.precision={precision}")
    sftmix(
        "reference",
        QUICKSTART,
        *TINY,
        f"run.dir={tmp_path}",
        f"engine.precision={precision}",
        "engine.activation_checkpointing=true",
    )
    lines = read_metrics(tmp_path / "reference" / "metrics.jsonl")
    assert lines[-1][NTP] < lines[0][NTP] and all(
        line["grad_norm"] is not None for line in lines if line["steps/skipped (steps)"] == 0
    )


def test_stage_0_with_low_precision_is_refused(tmp_path):
    sftmix("data", QUICKSTART, *TINY, f"run.dir={tmp_path}", "engine.precision=bf16")
    done = sftmix(
        "reference",
        QUICKSTART,
        *TINY,
        f"run.dir={tmp_path}",
        "engine.precision=bf16",
        "engine.zero_stage=0",
        check=False,
    )
    assert done.returncode == 2 and "Use engine.zero_stage=1" in done.stderr


CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", [c for c in CONFIGS if c != QUICKSTART])
def test_every_config_runs_when_shrunk(config, tmp_path):
    sftmix(
        "run",
        config,
        *TINY,
        f"run.dir={tmp_path / 'run'}",
        "baseline.enabled=false",
        "reference.num_checkpoints=1",
    )
    verify(tmp_path / "run" / "report")


def readme_commands():
    """Returns the lines of the README's shell blocks that call the project's commands."""
    blocks = re.findall(
        r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("sftmix ", "deepspeed ", "torchrun "))]


def test_the_readme_names_commands():
    assert len(readme_commands()) >= 5


@pytest.mark.parametrize("line", readme_commands())
def test_the_readmes_commands_are_understood(line, tmp_path):
    """Parses each command, loads its config with its overrides, and looks up the script that a
    launcher would start."""
    from sftmix.cli import _parser
    from sftmix.config.reader import load_config
    from sftmix.config.shipped import packaged
    from sftmix.config.study import load_study

    words = shlex.split(line)
    if words[0] != "sftmix":
        script = words.index("launch/run.py")
        sys.path.insert(0, str(ROOT / "launch"))
        try:
            from run import as_command
        finally:
            sys.path.pop(0)
        words = ["sftmix", *as_command(words[script + 1 :])]
    options = _parser().parse_args(words[1:])
    if options.command not in ("scores", "configs"):
        assert packaged(options.config), f"{options.config} is not in the repository"
        load = load_study if options.command == "study" else load_config
        load(options.config, options.overrides)


def test_pages_name_only_files_that_exist():
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_probe_of_stages_would_notice_a_missing_one():  # the test of the test
    assert stages_run("[1/8] data: 0.1 s\n[2/8] reference: up to date\n") == (
        ["data"],
        ["reference"],
    )


def test_the_shared_folder_of_configs_is_found():
    assert QUICKSTART in CONFIGS and Path(ROOT / QUICKSTART).is_file()
