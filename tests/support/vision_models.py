"""Small random models of vision and language in Hugging Face folders, with processor, tokenizer and
chat template, and pictures for them."""

import io

import numpy as np
import torch
from PIL import Image
from tokenizers_for_tests import character_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from sftmix.storage.files import write_json

QWEN_TEMPLATE = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for p in m.content -%}"
    "{%- if p.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ p.text }}{%- endif -%}{%- endfor -%}{%- endif -%}<|im_end|>{{ '\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
).replace("{{ m.role }}\n", "{{ m.role + '\n' }}")
# Only texts that are parts are written.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{%- for m in messages -%}{{ m.role | capitalize }}:"
    "{%- for p in m.content -%}"
    "{%- if p.type == 'image' -%}<image>{%- elif p.type == 'text' -%}"
    "{{ ' ' + p.text }}{%- endif -%}"
    "{%- endfor -%}<end_of_utterance>{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}Assistant:{%- endif -%}"
)
SPECIALS = {
    "qwen2_5_vl": [
        *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|image_pad|>", "<|video_pad|>"),
    ],
    "smolvlm": [
        *("<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>"),
        *("<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))),
    ],
}
FAMILIES = tuple(SPECIALS)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough for positions to show in a loss
}
PATCH = 4  # pixels; of merged patches, each a token: 8
TOWER = {"hidden_size": 32, "intermediate_size": 48, "patch_size": PATCH}


def save_model(folder, family, seed=0):
    """Writes the folder of a random model; returns it."""
    template = QWEN_TEMPLATE if family == "qwen2_5_vl" else SMOLVLM_TEMPLATE
    end = "<|im_end|>" if family == "qwen2_5_vl" else "<end_of_utterance>"
    tokenizer = character_tokenizer(SPECIALS[family], eos=end, chat_template=template)
    config = config_of(family, tokenizer)
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Files as older versions of transformers wrote them, and most models on the Hub have them.
    images = image_processor(family).to_dict()
    images["processor_class"] = (
        Qwen2_5_VLProcessor.__name__ if family == "qwen2_5_vl" else "SmolVLMProcessor"
    )
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    write_json(folder / "preprocessor_config.json", images)
    if family == "smolvlm":
        settings = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
        write_json(folder / "processor_config.json", settings)
    return folder


def config_of(family, tokenizer):
    text = {**TEXT, "vocab_size": len(tokenizer)}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}

    def number(token):
        return tokenizer.convert_tokens_to_ids(token)

    if family == "smolvlm":
        tower = {**TOWER, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
        return AutoConfig.for_model(
            family,
            text_config={"model_type": "llama", **text},
            vision_config=tower,
            scale_factor=2,
            image_token_id=number("<image>"),
        )
    tower = {**TOWER, "depth": 2, "num_heads": 2, "out_hidden_size": 32}
    tower |= {"window_size": 16, "fullatt_block_indexes": [1]}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    }
    return AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=tower,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )


def image_processor(family):
    if family == "smolvlm":
        return SmolVLMImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        )
    size = {"shortest_edge": 64, "longest_edge": 1024}
    return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=size)


def picture(number, width=16, height=8):
    """Returns the bytes of a PNG file, of other pixels for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def expected_text(family, width=16, height=8):
    """Returns what stands for a picture in a rendered text, by hand: Qwen's tower gives a feature
    for 8 x 8 pixels; SmolVLM's image has its longer side enlarged to 32 pixels, both sides to
    multiples of 16, is cut into tiles of 16 x 16, and is followed by the whole in one tile; a tile
    has 4 features."""
    if family == "qwen2_5_vl":
        return "<|image_pad|>" * (width // 8 * (height // 8))
    assert (width, height) == (16, 8)  # enlarged to 32 x 16
    tiles = "".join(
        f"<fake_token_around_image><row_1_col_{column}>" + "<image>" * 4 for column in (1, 2)
    )
    whole = "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"
    return f"{tiles}\n\n{whole}"
