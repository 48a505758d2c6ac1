"""Builds and loads the model, sharded from the start under ZeRO-3.

Every rank builds an empty, sharded model, and receives the tensors one by one from rank 0. Rank 0
reads them one by one from their files. Where it cannot, it holds a whole model on the CPU first:
random weights, so that they are equal for every ZeRO stage and number of ranks, and weights that
transformers converts on loading. Nothing depends on the ZeRO branch of transformers' loader.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from sftmix.config.schema import ModelConfig
from sftmix.data.tokenizer import NOT_LOADED, why_not_loaded
from sftmix.engine.deepspeed_internals import whole_shape
from sftmix.engine.vision import auto_class, is_known
from sftmix.errors import ConfigError, counted, did_you_mean, first_line
from sftmix.storage.files import looks_local

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

M_MMAP_THRESHOLD = -3  # of glibc's mallopt
Source = Mapping[str, Tensor]  # parameters and buffers by their names in the model
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ATTENTION = (
    "sdpa",
    "eager",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)


def hf_config(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str = "model",
    needs_weights: bool = True,
) -> PretrainedConfig:
    """Returns the transformers config of a model; an architecture is completed from the tokenizer.
    needs_weights: a folder must hold them.

    Raises ConfigError for a folder without config or weights, an unknown model type, or a value
    that transformers refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if model.path is not None:
        check_model_folder(model.path, name=name, needs_weights=needs_weights)
        try:
            return AutoConfig.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        except (*NOT_LOADED, StrictDataclassError) as error:
            raise ConfigError(
                f"{name}.path: {model.path} cannot be loaded: {why_not_loaded(model.path, error)}"
                " Give a folder."
            ) from None
    assert model.architecture is not None, "the schema wants one of path and architecture"
    values = dict(model.architecture)
    if tokenizer is not None:
        values.setdefault("vocab_size", len(tokenizer))
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            values.setdefault(token, getattr(tokenizer, token))
    model_type = values.pop("model_type")
    where = f"{name}.architecture (model_type {model_type!r})"
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        cause = error.__cause__ or error  # the error that transformers wraps is one line
        raise ConfigError(
            f"{where}: {' '.join(str(cause).split())[:300]} Correct the value."
        ) from None
    if not is_known(config):
        raise ConfigError(
            f"{where} is not a causal language model of transformers. Name one, for example llama."
        )
    read = _words_of_model_code(type(config))
    for key in model.architecture:
        if key not in read and key not in config.attribute_map and key != "model_type":
            remedy = did_you_mean(key, type(config)().to_dict(), "Remove it.")
            raise ConfigError(
                f"{where}: `{key}` is not a key of {type(config).__name__}, which would ignore it."
                f" {remedy}"
            )
    return config


def _words_of_model_code(config_class: type) -> set[str]:
    """Returns every word in the code that reads a config of this class. transformers silently keeps
    unknown keys, and has no list of known ones: some are old names, some are read with a default
    elsewhere in the code."""
    modules = (
        config_class.__module__,
        config_class.__module__.replace(".configuration_", ".modeling_"),
        "transformers.configuration_utils",
        "transformers.modeling_rope_utils",
    )
    words: set[str] = set()
    for module in modules:
        found = importlib.util.find_spec(module)
        if found is not None and found.origin is not None:
            words.update(re.findall(r"\w+", Path(found.origin).read_text(encoding="utf-8")))
    return words


def check_model_folder(path: str, *, name: str = "model", needs_weights: bool = True) -> None:
    """Raises ConfigError for a local folder that does not exist, or has no config or, if they are
    needed, no safetensors weights."""
    folder = Path(path)
    if not folder.is_dir():
        if looks_local(path):
            raise ConfigError(
                f"{name}.path: {path} does not exist. Give a folder, or a Hub name such as"
                " `owner/name`."
            )
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name}.path: {path} holds no config.json. Give the folder of a Hugging Face model."
        )
    if needs_weights and not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise ConfigError(
            f"{name}.path: {path} holds no weights (*.safetensors); it holds {found}. Complete the"
            " folder; pickled weights (*.bin) are not read: convert them with transformers'"
            " save_pretrained."
        )


def check_weights(path: str, config: PretrainedConfig, shell: nn.Module, *, name: str) -> None:
    """Raises ConfigError for weights of a local folder that are missing, truncated, not
    safetensors, or of another shape than the model's.

    Reads only the headers. shell: the model on the meta device. `load_source` handles what
    transformers renames or packs on loading.
    """
    from safetensors import SafetensorError

    expected = {
        key: tuple(tensor.shape) for key, tensor in shell.state_dict(keep_vars=True).items()
    }
    prefix = getattr(shell, "base_model_prefix", "")
    is_packed = getattr(config, "quantization_config", None) is not None
    for file in _weight_files(Path(path), name=name):
        try:
            shapes = shapes_of(file)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{name}.path: {file} cannot be read as safetensors: {first_line(error)} Copy or"
                " download it again."
            ) from None
        for key, shape in shapes.items():
            wanted = expected.get(key, expected.get(f"{prefix}.{key}"))
            if wanted is not None and not is_packed and math.prod(shape) != math.prod(wanted):
                raise _other_shape(f"{name}.path: {file}", key, shape, wanted)


def _weight_files(folder: Path, *, name: str) -> list[Path]:
    """Returns the files from which transformers loads a folder's weights. Raises ConfigError for an
    index that does not name them."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []
    index = folder / INDEX
    try:
        names = sorted(
            {
                str(file)
                for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{name}.path: {index} is not an index of weights (JSON with a `weight_map`). Copy or"
            " download it again."
        ) from None
    missing = [file for file in names if not (folder / file).is_file()]
    if missing:
        raise ConfigError(
            f"{name}.path: {index} names {len(names)} files, of which {len(missing)} are missing,"
            f" first {missing[0]}. Copy or download them."
        )
    return [folder / file for file in names]


def _other_shape(
    where: str, key: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> ConfigError:
    empty = (
        " A save under ZeRO-3 that did not gather the weights leaves such tensors."
        if 0 in found
        else ""
    )
    return ConfigError(
        f"{where}: {key} has shape {list(found)}, the model's has {list(wanted)}.{empty} Save the"
        " model again, or correct config.json."
    )


def check_attention(
    model: ModelConfig, config: PretrainedConfig, *, precision: str, is_on_gpu: bool, name: str
) -> None:
    """Raises ConfigError for an attention implementation that cannot be used here: unknown, not
    installed, or not supported by this model."""
    wanted = model.attn_implementation
    if wanted is None:
        return
    problem = None
    try:
        with quiet_transformers(), torch.device("meta"):
            auto_class(config).from_config(
                config, attn_implementation=wanted, trust_remote_code=model.trust_remote_code
            )
    except (*NOT_LOADED, RuntimeError) as error:
        problem = first_line(error).split(". ")[0].rstrip(".") + "."
    if problem is None and not is_on_gpu and wanted.startswith(("flash_", "flex_")):
        problem = "It needs a GPU, and there is none here."
    if problem is None and precision == "fp32" and wanted.startswith("flash_"):
        problem = "It computes in bf16 or fp16, and engine.precision is fp32."
    if problem is not None:
        remedy = "Install what is missing, or use sdpa or eager."
        remedy = remedy if wanted in ATTENTION else did_you_mean(wanted, ATTENTION, remedy)
        raise ConfigError(
            f"{name}.attn_implementation: {wanted} cannot be used here: {problem} {remedy}"
        )


def check_fit(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, max_length: int, name: str
) -> None:
    """Raises ConfigError for a tokenizer larger than the embedding, or examples longer than the
    model's context."""
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ConfigError(
            f"{name}: the tokenizer has {counted(len(tokenizer), 'token')}, the model's embedding"
            f" {counted(size, 'row')}, so some ids would be out of range. Use the"
            " model's own tokenizer (tokenizer.path), or a model with a larger vocabulary."
        )
    check_context(config, max_length=max_length, name=name)


def check_context(config: PretrainedConfig, *, max_length: int, name: str) -> None:
    """Raises ConfigError for examples that may be longer than the model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ConfigError(
            f"data.max_length is {max_length}, but the context of {name} is"
            f" {counted(context, 'token')}. Lower data.max_length."
        )


def load_source(
    model: ModelConfig, config: PretrainedConfig, *, dtype: torch.dtype, seed: int
) -> Any:
    """Returns an ordinary transformers model on the CPU, with its weights or with seeded random
    ones."""
    from safetensors import SafetensorError

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    if model.path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Drawn in float32 and then rounded: the same start for every precision.
            random_model: Any = auto_class(config).from_config(
                config, **{**options, "dtype": torch.float32}
            )
        for parameter in random_model.parameters():
            parameter.data = parameter.data.to(dtype)
        # Do not call `.to(dtype)`: rotary frequencies stay in float32, Gemma's scale does not.
        expected = buffer_dtypes(model, config, dtype=dtype)
        for name, buffer in random_model.named_buffers():
            buffer.data = buffer.data.to(expected[name])
        return random_model
    with quiet_transformers():
        loaded: Any
        report: Any
        try:
            # Do not ignore other shapes: our report names them; the error of transformers does not.
            loaded, report = auto_class(config).from_pretrained(
                model.path,
                config=config,
                revision=model.revision,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )  # type: ignore[misc]
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"model.path: {model.path} cannot be loaded: {first_line(error)} Copy or download"
                " it again."
            ) from error
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise _other_shape(f"model.path: {model.path}", key, tuple(found), tuple(wanted))
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"model.path: {model.path} lacks {counted(len(missing), 'tensor')} of a"
            f" {type(loaded).__name__}, first {missing[0]!r}; random ones would take their place."
            " Complete the folder, or correct its config.json."
        )
    return loaded


@contextlib.contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Makes glibc return freed blocks of more than 128 KiB to the system at once.

    It keeps those of up to 32 MiB. Tensors that come and go one by one leave gaps that the next do
    not fit into, and in the end a rank would hold as much as a whole model. No effect with another
    allocator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(M_MMAP_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # what glibc itself arrives at after a while


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars and advice while a model loads. Errors are still raised."""
    from transformers.utils import logging as hf_logging

    before, had_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
        if had_bars:
            hf_logging.enable_progress_bar()


def empty_model(
    model: ModelConfig, config: PretrainedConfig, *, dtype: torch.dtype = torch.float32
) -> Any:
    """Returns a transformers model on the meta device: only names, shapes and types."""
    with quiet_transformers(), torch.device("meta"):
        return auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=model.trust_remote_code
        )


def buffer_dtypes(
    model: ModelConfig, config: PretrainedConfig, *, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Returns the dtype that transformers gives each buffer of a model whose weights are
    `dtype`."""
    named = empty_model(model, config, dtype=dtype).named_buffers()
    return {name: buffer.dtype for name, buffer in named}


@returning_freed_memory()
def build_model(
    model: ModelConfig,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    is_sharded: bool,
    deepspeed_config: dict[str, Any],
) -> Any:
    """Returns the model for `deepspeed.initialize`: whole, or sharded under ZeRO-3. Collective: all
    ranks must call it."""
    if not is_sharded:
        return load_source(model, config, dtype=dtype, seed=seed)
    import deepspeed
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    options = (
        {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    )
    # It also imports the model's code before zero.Init wraps constructors: a class defined inside
    # loses what decorators did to its __init__ (Mixtral's experts lose their config).
    empty = empty_model(model, config, dtype=dtype)
    # zero.Init reads the dtype from the config; its `dtype` argument is broken (precision.py).
    init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)
    with no_init_weights(), prevent_arange_dtype_change(), init:
        shell = auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=model.trust_remote_code, **options
        )
    shell.tie_weights()  # no_init_weights does not do it
    for module in owners_of_experts(shell):
        deepspeed.utils.set_z3_leaf_module(module, True)
    source: Source | None = None
    if torch.distributed.get_rank() == 0:
        source = tensors_of_files(model, config, empty, dtype=dtype)
        if source is None:
            whole = load_source(model, config, dtype=dtype, seed=seed)
            source = dict(whole.named_parameters()) | dict(whole.named_buffers())
    copy_weights(source, shell, {name: buffer.dtype for name, buffer in empty.named_buffers()})
    return shell


def layout_of(shell: Any, folder: Path | None = None) -> dict[str, dict[str, str]] | None:
    """Returns, for every file in which transformers saves the weights of a model, each tensor's
    name in the file and its name in the model; None if a tensor would be converted, and so is not
    in a file as it is in the model. Writes all but the weights (config, index) to `folder`, if one
    is given.

    shell: the model on the meta device. transformers loads as it saves, the other way round.
    """
    tensors = {name: tensor.detach() for name, tensor in saved_tensors(shell)}
    names = {id(tensor): name for name, tensor in tensors.items()}
    files: dict[str, dict[str, str | None]] = {}

    def note(saved: dict[str, Tensor], path: str, metadata: object = None) -> None:
        files[Path(path).name] = {key: names.get(id(tensor)) for key, tensor in saved.items()}

    # the last thing that save_pretrained calls, with what it would write
    with (
        quiet_transformers(),
        mock.patch("transformers.modeling_utils.safe_save_file", note),
        tempfile.TemporaryDirectory() as scratch,
    ):
        shell.save_pretrained(folder or scratch, state_dict=dict(tensors))
    if not files or any(None in file.values() for file in files.values()):
        return None
    return {
        path: {key: name for key, name in file.items() if name is not None}
        for path, file in files.items()
    }


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every parameter, tied ones once, and every persistent buffer."""
    yield from model.named_parameters()
    yield from persistent_buffers(model)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every buffer that belongs to the saved model."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in parameters and isinstance(tensor, Tensor):
            yield name, tensor


class TensorsOfFiles(Mapping[str, Tensor]):
    """Tensors by their name in the model, each read when it is asked for. places: name -> file and
    name there. computed: those that are in no file."""

    def __init__(self, places: dict[str, tuple[Path, str]], computed: dict[str, Tensor]):
        self._places, self._computed = places, computed

    def __getitem__(self, name: str) -> Tensor:
        if name in self._places:
            return read_tensor(*self._places[name])
        return self._computed[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._computed, **self._places})

    def __len__(self) -> int:
        return len({**self._computed, **self._places})


def tensors_of_files(
    model: ModelConfig, config: PretrainedConfig, empty: Any, *, dtype: torch.dtype
) -> TensorsOfFiles | None:
    """Returns the parameters and buffers of a model that can be read from its files one by one;
    None if it must be loaded as a whole: random or quantised weights, those that transformers
    converts, and those of which something is missing, about which `load_source` knows more.

    empty: the model on the meta device, with weights of `dtype`."""
    from safetensors import SafetensorError

    folder = _folder_of_weights(model, config)
    if folder is None:
        return None
    layout = layout_of(empty)
    if layout is None:
        print(
            f"  transformers converts the weights of a {config.model_type}: rank 0 holds the whole"
            " model while it is loaded",
            flush=True,
        )
        return None
    try:
        found = {
            key: (file, shape)
            for file in _weight_files(folder, name="model")
            for key, shape in shapes_of(file).items()
        }
    except (SafetensorError, OSError):
        return None
    expected = {key: name for file in layout.values() for key, name in file.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(empty)}
    aliases = set(empty.state_dict()) - set(shapes)  # of tied weights: transformers compares them
    if aliases & set(found) or any(
        key not in found or found[key][1] != shapes[name] for key, name in expected.items()
    ):
        return None
    places = {name: (found[key][0], key) for key, name in expected.items()}
    return TensorsOfFiles(places, _computed_buffers(model, config, dtype=dtype))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of a safetensors file, from its header. Raises OSError or
    SafetensorError."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  (no mapping)


def read_tensor(path: Path, name: str) -> Tensor:
    """Returns one tensor, on the CPU. The file is closed again, so that its pages do not stay in
    this process's memory longer than the tensor."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        found: Tensor = tensors.get_tensor(name)
    return found


def _folder_of_weights(model: ModelConfig, config: PretrainedConfig) -> Path | None:
    """Returns the folder of the weights, after a download from the Hub; None where they are not
    plain: random, quantised, or with adapters that transformers adds."""
    from huggingface_hub import snapshot_download

    if model.path is None or getattr(config, "quantization_config", None) is not None:
        return None
    folder = Path(model.path)
    if not folder.is_dir():
        files = [WEIGHTS, "model-*.safetensors", INDEX, "adapter_config.json"]
        try:
            folder = Path(
                snapshot_download(model.path, revision=model.revision, allow_patterns=files)
            )
        except (OSError, ValueError):  # transformers says it better
            return None
    return None if (folder / "adapter_config.json").exists() else folder


def _computed_buffers(
    model: ModelConfig, config: PretrainedConfig, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the buffers that the constructor of a model computes, without memory for its
    parameters."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with (
        quiet_transformers(),
        no_init_weights(),
        mock.patch.object(nn.Module, "register_parameter", register_on_meta),
    ):
        built = auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=model.trust_remote_code
        )
    return dict(built.named_buffers())


def owners_of_experts(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of a mixture of experts whose experts are modules of their own.

    Such a module calls only the experts that a token has chosen. ZeRO-3 gathers weights module by
    module, on all ranks together, so a rank that skips an expert would leave the others waiting.
    Its weights must be gathered with those of its owner (a leaf module of ZeRO-3). DeepSpeed knows
    three families by name; here they are found by structure: a list of modules with parameters of
    equal shapes, inside a module of another list (the layers). transformers 5 packs experts into
    single parameters, which need nothing.
    """

    def shapes(module: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(whole_shape(parameter)) for parameter in module.parameters()]

    found = []
    for layers in model.modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        for owner in layers.modules():
            for child in owner.children() if owner is not layers else ():
                kinds = [shapes(module) for module in child.children()]
                is_list = isinstance(child, nn.ModuleList) and len(kinds) > 1
                if is_list and kinds[0] and all(kind == kinds[0] for kind in kinds):
                    found.append(owner)
    return found


def copy_weights(source: Source | None, target: nn.Module, buffers: dict[str, torch.dtype]) -> None:
    """Fills a sharded model from rank 0's `source` (None elsewhere), one tensor at a time, and
    gives each buffer its dtype in `buffers`, because zero.Init casts some. Collective: all ranks
    must call it."""
    import deepspeed
    import torch.distributed as dist

    names = {name for name, _ in [*target.named_parameters(), *target.named_buffers()]}
    if source is not None and set(source) != names:
        raise ConfigError(
            "the loaded model and its sharded shell differ in"
            f" {sorted(set(source) ^ names)[:4]}: a transformers bug"
        )
    for name, parameter in target.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if source is not None:
                parameter.data.copy_(source[name].data)
    for name, buffer in target.named_buffers():
        buffer.data = buffer.data.to(buffers[name])
        if source is not None:
            buffer.data.copy_(source[name].data)
        dist.broadcast(buffer.data, src=0)
