"""A tokenizer whose tokens can be counted by hand: one per character, and the special tokens of a
template."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]


def character_tokenizer(special_tokens=(), *, bos="<s>", eos="</s>", chat_template=None):
    """Returns a fast tokenizer: id 0 unknown, then bos, eos, the special tokens, then printable
    ASCII and newline."""
    specials = ["<unk>", bos, eos, *[t for t in special_tokens if t not in (bos, eos)]]
    vocabulary = {token: number for number, token in enumerate([*specials, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=specials[3:],
    )
    tokenizer.pad_token = eos
    tokenizer.chat_template = chat_template
    return tokenizer
