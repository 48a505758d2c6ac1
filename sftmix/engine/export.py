"""Write an exported model as a Hugging Face folder, on rank 0; a failure is an error on all
ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from sftmix.data.template import marker_ids
from sftmix.engine.loading import quiet_transformers
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError
from sftmix.storage import faults
from sftmix.storage.failures import accessing, describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_on_main(
    ranks: Ranks, folder: Path, state: dict[str, Tensor], write: Callable[[], None]
) -> None:
    """Lets rank 0 write a folder. A failure is one error on all ranks, and no rank keeps waiting.
    An incomplete folder is removed."""
    problem = ""
    # transformers empties the dictionary
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if ranks.is_main:
        try:
            with accessing(folder):
                faults.point("export.write")
                write()
        except OSError as error:
            if isinstance(error.__cause__, SafetensorError):  # the error names no file
                error.filename = str(folder / "*.safetensors")
            problem = (
                f"the model could not be exported: {describe(error, folder, needed_bytes=needed)}"
            )
            shutil.rmtree(folder, ignore_errors=True)
        except ArtifactError as error:
            problem = str(error)
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.agree([bool(problem)])[0]:
        raise ArtifactError(ranks.text_from_main(problem), on_all_ranks=True)


def write_model(
    folder: Path, shell: Any, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes a Hugging Face folder. shell: the model on the meta device, which defines names and
    shards."""
    from transformers import GenerationConfig

    with quiet_transformers():
        generation = GenerationConfig.from_model_config(shell.config)
        generation.eos_token_id = generation_end_ids(tokenizer, shell.config)
        generation.pad_token_id = tokenizer.pad_token_id
        shell.generation_config = generation
        shell.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def generation_end_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> list[int]:
    """Returns the ids that end a response: the tokenizer's and the config's end of sequence, and
    the token that the chat template writes after an assistant's turn."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(config, "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [configured])
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt = tokenizer.apply_chat_template(
        conversation[:1], tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    special = marker_ids(tokenizer)
    turn = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    ends = [token for token in turn if token in special]
    ids.update(ends[-1:])
    return sorted(i for i in ids if i is not None)
