"""SFTMix: instruction tuning with a confidence-guided Mixup loss
(https://arxiv.org/abs/2410.05248)."""

__version__ = "0.1.0"
