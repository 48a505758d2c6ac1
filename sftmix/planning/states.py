"""What a config's model needs by formula, without a trace: states of a rank, bytes on disk and
through the network. Lower bounds without activations, and an independent check of the traced
states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sftmix.config.deepspeed_json import offload_of
from sftmix.config.schema import Config, ModelConfig
from sftmix.errors import counted, gib
from sftmix.storage.checkpoints import ADAM_BYTES
from sftmix.train.plan import num_reference_checkpoints

SUM_BYTES = 4  # float32 sum of its gradients


def with_vocabulary(config: Config, model: ModelConfig) -> ModelConfig:
    """Returns the model with a size of its vocabulary, which an architecture may leave to the
    tokenizer."""
    given = model.architecture
    if given is None or "vocab_size" in given:
        return model
    if config.tokenizer.train is not None:
        size = config.tokenizer.train.vocab_size
    else:
        from sftmix.data.tokenizer import load_tokenizer

        size = len(load_tokenizer(config))
    return model.model_copy(update={"architecture": {**given, "vocab_size": size}})


@dataclass(frozen=True)
class Need:
    """num_ranks: of the run, over all nodes. local_ranks: on this machine."""

    config: Config
    num_ranks: int
    local_ranks: int

    @cached_property
    def _empty_target(self) -> Any:
        """The target on the meta device."""
        from sftmix.engine.loading import empty_model, hf_config

        model = with_vocabulary(self.config, self.config.model)
        return empty_model(model, hf_config(model))

    @cached_property
    def num_parameters(self) -> int:
        """Those of the target. Tied ones count once."""
        return sum(parameter.numel() for parameter in self._empty_target.parameters())

    @cached_property
    def num_adapter_parameters(self) -> int:
        """Those of LoRA, beside the model's own; 0 where all weights are trained. Raises
        ConfigError for targets that the model does not have."""
        from sftmix.engine.lora import num_adapter_parameters

        lora = self.config.model.lora
        return num_adapter_parameters(self._empty_target, lora, name="model") if lora else 0

    @property
    def num_trained_parameters(self) -> int:
        """Those with gradients and optimiser states."""
        return self.num_adapter_parameters or self.num_parameters

    @property
    def described(self) -> str:
        adapters = (
            f", {self.num_adapter_parameters:,} more of adapters"
            if self.num_adapter_parameters
            else ""
        )
        return f"{counted(self.num_parameters, 'parameter')}{adapters}"

    @cached_property
    def bytes_per_weight(self) -> int:
        from sftmix.engine.precision import resolve_precision

        return 4 if resolve_precision(self.config.engine.precision) == "fp32" else 2

    @cached_property
    def offload(self) -> dict[str, bool]:
        """Returns whether the DeepSpeed JSON moves `optimizer` states and `param`eters to the
        host."""
        return offload_of(self.config)

    def _shard(self, num_bytes: int, *, from_stage: int) -> int:
        """Returns a rank's part of bytes that a ZeRO stage and those above it shard."""
        return (
            -(-num_bytes // self.num_ranks)
            if self.config.engine.zero_stage >= from_stage
            else num_bytes
        )

    @property
    def states_per_rank(self) -> int:
        """Bytes of gradient sums, float32 weights and moments."""
        master = 4 if self.bytes_per_weight < 4 else 0
        trained = self.num_trained_parameters
        return self._shard(SUM_BYTES * trained, from_stage=2) + self._shard(
            (8 + master) * trained, from_stage=1
        )

    @property
    def weights_per_rank(self) -> int:
        return self._shard(
            (self.num_parameters + self.num_adapter_parameters) * self.bytes_per_weight,
            from_stage=3,
        )

    @property
    def gpu_bytes(self) -> int:
        states = 0 if self.offload["optimizer"] else self.states_per_rank
        return states + (0 if self.offload["param"] else self.weights_per_rank)

    def host_bytes(self, *, has_gpu: bool) -> int:
        states = 0 if has_gpu and not self.offload["optimizer"] else self.states_per_rank
        weights = 0 if has_gpu and not self.offload["param"] else self.weights_per_rank
        whole = self.num_parameters * self.bytes_per_weight if self.is_loaded_whole else 0
        return self.local_ranks * (states + weights) + whole

    @cached_property
    def is_loaded_whole(self) -> bool:
        """Whether rank 0 holds the whole model while it is loaded: below ZeRO-3, with random
        weights, and with weights that transformers converts."""
        from sftmix.engine.loading import layout_of

        if self.config.engine.zero_stage < 3 or self.config.model.path is None:
            return True
        return layout_of(self._empty_target) is None

    @property
    def disk_bytes(self) -> int:
        """Training checkpoints, one more than are kept, and the exported models of all stages,
        whole ones with LoRA too."""
        state = self.num_trained_parameters * (self.bytes_per_weight + ADAM_BYTES)
        return (
            state * (self.config.checkpoint.keep_last + 1)
            + self.num_parameters * self.bytes_per_weight * self.num_exports
        )

    @property
    def num_exports(self) -> int:
        config = self.config
        exports = 1 + config.baseline.enabled
        if "checkpoints" in config.confidence.modes:
            epochs = config.reference_train.epochs
            exports += num_reference_checkpoints(epochs, config.reference.num_checkpoints)
        return exports

    @property
    def num_micro_batches(self) -> int:
        """Returns the number of forwards of a rank per step if all examples have maximum length."""
        train = self.config.train
        # a pair is never divided
        per_forward = max(2, train.micro_batch_tokens // self.config.data.max_length)
        return -(-train.batch_size // (per_forward * self.num_ranks))

    @property
    def step_traffic(self) -> dict[str, int]:
        """Returns the bytes that a step gathers and reduces, whole tensors. ZeRO-3 gathers weights
        in every forward and backward; stages 1 and 2 once after the update; stage 0 is an
        all-reduce, which is both."""
        weights = (self.num_parameters + self.num_adapter_parameters) * self.bytes_per_weight
        trained = self.num_trained_parameters * self.bytes_per_weight
        if self.config.engine.zero_stage == 3:
            return {
                "gather": 2 * weights * self.num_micro_batches,
                "reduce": trained * self.num_micro_batches,
            }
        reductions = self.num_micro_batches if self.config.engine.zero_stage == 2 else 1
        return {"gather": trained, "reduce": trained * reductions}


def why_too_large(need: Need, *, gpu_bytes: int | None, machine: int) -> str | None:
    """Returns why the states alone are too large; None if they are not. gpu_bytes: of the smallest
    GPU here; None without one. machine: bytes of this machine's memory."""
    ranks = counted(need.num_ranks, "rank")
    if gpu_bytes is not None and need.gpu_bytes > gpu_bytes:
        return (
            f"each of {ranks} keeps {gib(need.gpu_bytes)} of weights, gradients and optimiser"
            f" states, without activations, and a GPU here has {gib(gpu_bytes)}"
        )
    needed = need.host_bytes(has_gpu=gpu_bytes is not None)
    if needed > machine:
        return (
            f"the model ({need.described}) needs {gib(needed)} of this machine's memory for"
            f" {ranks}, without activations, and it has {gib(machine)}"
        )
    return None
