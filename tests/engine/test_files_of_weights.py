"""Weights are read and written tensor by tensor, as transformers does it with a whole model."""

import json
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from naive import model_from
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import character_tokenizer
from transformers import AutoModelForCausalLM

from sftmix.config.schema import ModelConfig
from sftmix.data.template import ALPACA
from sftmix.engine.export import TensorFile, generation_settings, write_model, write_on_main
from sftmix.engine.loading import empty_model, hf_config, saved_tensors, tensors_of_files
from sftmix.errors import ArtifactError

SETTINGS = {name: settings for name, (settings, _) in FAMILIES.items()}
CONVERTED = ("mixtral-moe",)  # its experts are packed on loading
DTYPES = [torch.float32, torch.bfloat16]


def saved(folder, settings, dtype, **options):
    model_from(settings, dtype=dtype).save_pretrained(folder, **options)
    model = ModelConfig(path=str(folder))
    return model, hf_config(model)


def read(model, config, dtype):
    return tensors_of_files(model, config, empty_model(model, config, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_tensors_from_files_are_those_of_the_model_that_transformers_loads(tmp_path, name, dtype):
    model, config = saved(tmp_path, SETTINGS[name], torch.float32)
    found = read(model, config, dtype)
    assert (found is None) == (name in CONVERTED)
    if found is None:
        return
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    tensors = dict(expected.named_parameters()) | dict(expected.named_buffers())
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        # the model's own dtype is given when a tensor is copied
        assert torch.equal(found[key].to(tensor.dtype), tensor), key


def test_tensors_of_many_files(tmp_path):
    model, config = saved(tmp_path, SETTINGS["llama"], torch.float32, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = read(model, config, torch.float32)
    for key, tensor in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters():
        assert torch.equal(found[key], tensor), key


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_tied_head(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_adapters(folder):
    (folder / "adapter_config.json").write_text("{}")


def cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])


def quantised(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change", [without_a_tensor, with_a_tied_head, with_adapters, cut_off, quantised]
)
def test_transformers_loads_what_is_not_plain(tmp_path, change):
    saved(tmp_path, SETTINGS["llama-tied"], torch.float32)
    change(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    assert read(model, hf_config(model), torch.float32) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_an_exported_file_is_the_one_that_transformers_writes(tmp_path, name, dtype):
    model, config = saved(tmp_path / "whole", SETTINGS[name], dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype)
    shell = empty_model(model, config, dtype=dtype)
    tensors = iter(list(saved_tensors(loaded))[::-1])  # the order does not matter
    tokenizer = character_tokenizer(chat_template=ALPACA)
    write_model(tmp_path / "ours", shell, tensors, tokenizer, model)
    for path in (tmp_path / "whole").glob("*.safetensors*"):
        ours, theirs = (folder / path.name for folder in (tmp_path / "ours", tmp_path / "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), path.name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    for (key, tensor), (_, expected) in zip(
        saved_tensors(again), saved_tensors(loaded), strict=True
    ):
        assert torch.equal(tensor, expected), key


PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_the_generation_config_of_the_source_stays_and_the_ends_are_added(tmp_path):
    tokenizer = character_tokenizer(("<|end|>",), chat_template=PHI)
    config = SimpleNamespace(eos_token_id=2)
    given = {"do_sample": False, "temperature": 0.6, "eos_token_id": [40, 2], "pad_token_id": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    found = generation_settings(ModelConfig(path=str(tmp_path)), config, tokenizer)
    assert found == {**given, "eos_token_id": [40, 2, 3]}  # 3: what Phi writes behind an answer
    (tmp_path / "generation_config.json").unlink()
    found = generation_settings(ModelConfig(path=str(tmp_path)), config, tokenizer)
    assert found == {"eos_token_id": [2, 3], "pad_token_id": tokenizer.pad_token_id}


def test_a_file_with_tensors_of_several_dtypes(tmp_path):
    tensors = {
        "wide": torch.arange(3, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(2, 3).bfloat16(),
        "number": torch.tensor(7),
        "nothing": torch.empty(0, 4),
        "Ünïcode": torch.randn(5, 2).T,
    }
    announced = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with TensorFile(tmp_path / "file.safetensors", announced) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    found = load_file(tmp_path / "file.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3), torch.zeros(3, 2).bfloat16()])
def test_a_tensor_other_than_announced_is_refused(tmp_path, tensor):
    announced = {"a": torch.zeros(3, 2)}
    with (
        pytest.raises(ArtifactError, match=r"file: a is B?F\d\d \[\d, \d\], and .* F32 \[3, 2\]"),
        TensorFile(tmp_path / "file", announced) as file,
    ):
        file.write("a", tensor)


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    announced = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with (
        pytest.raises(ArtifactError, match=r"file: \['b'\] were not written"),
        TensorFile(tmp_path / "file", announced) as file,
    ):
        file.write("a", torch.zeros(2))


@pytest.mark.parametrize("is_main", [True, False])
def test_all_tensors_are_gathered_though_writing_fails(tmp_path, is_main):
    """Else the other ranks would wait in a collective call for ever."""
    gathered = []

    def tensors():
        for name in "abcd":
            gathered.append(name)
            yield name, torch.zeros(2**18)

    def write(given):
        next(given)
        raise OSError(28, "No space left on device")

    ranks = SimpleNamespace(
        is_main=is_main,
        agree=lambda flags: [True],
        text_from_main=lambda text: text or "told by rank 0",
    )
    message = r"No space left.*, 4\.0\d* MiB needed" if is_main else "told by rank 0"
    with pytest.raises(ArtifactError, match=message):
        write_on_main(ranks, tmp_path / "model", tensors(), write)
    assert gathered == list("abcd")
