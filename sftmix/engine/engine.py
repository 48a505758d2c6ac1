"""One model on DeepSpeed. Every stage trains, scores and saves through this class.

DeepSpeed divides a loss by the number of micro-batches and averages gradients over ranks. Our
losses are already shares of a mean over the whole optimiser step. So the engine turns the division
off and multiplies by the number of ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sftmix.batches.collate import MicroBatch
from sftmix.batches.cut import StepCounts
from sftmix.batches.documents import Documents
from sftmix.batches.images import copy_processor
from sftmix.cluster.liveness.progress import Progress
from sftmix.config.deepspeed_json import deepspeed_config
from sftmix.config.schema import Config, ModelConfig, TrainConfig
from sftmix.engine.deepspeed_internals import (
    TimedCommunication,
    import_deepspeed,
    release_leftovers,
    whole_shape,
)
from sftmix.engine.export import Tensors, on_cpu, write_model, write_on_main
from sftmix.engine.loading import (
    build_model,
    empty_model,
    hf_config,
    persistent_buffers,
)
from sftmix.engine.lora import (
    adapted_layers,
    adapter_weights,
    add_adapters,
    checksum,
    is_adapter,
    merged_weight,
    write_adapter,
)
from sftmix.engine.precision import (
    DTYPES,
    ExpectedDtypes,
    check_device_computes_in,
    check_dtypes,
    check_exported,
    precision_of,
    resolve_precision,
)
from sftmix.engine.ranks import Ranks
from sftmix.engine.vision import freeze_vision, reads_images, vision_parameters
from sftmix.errors import DataError
from sftmix.loss.flops import flops_of
from sftmix.loss.head import CausalLMWithLoss, Timer, no_timer
from sftmix.loss.logit_transform import find_logit_transform
from sftmix.loss.objective import Objective, loss_request
from sftmix.loss.packed_attention import NAME as PACKED
from sftmix.loss.packed_attention import use_packed_attention, why_not_packed
from sftmix.loss.requests import LossResult, ScoreRequest, ScoreResult
from sftmix.storage.provenance import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftmix.engine.state import StateFiles

_said: set[str] = set()  # in this process: many engines may be made of one model


class Engine:
    """A model in training (`train` given) or for scoring only. Every method is collective, except
    `score` if the model is not sharded. `is_sharded`: for scoring only, whether ZeRO-3 shards the
    model; default: as `engine.zero_stage` says. progress: told of every step and micro-batch.
    timer: `timer(part)` is entered around "forward", "head" (a part of it), "backward",
    "optimiser", and "communication" (a part of all)."""

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        ranks: Ranks,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        train: TrainConfig | None = None,
        is_sharded: bool | None = None,
        progress: Progress | None = None,
        timer: Timer = no_timer,
    ):
        deepspeed = import_deepspeed()
        self.ranks = ranks
        self._progress = progress or Progress()
        self._timer = timer
        self.backend = (
            None if config.engine.kernel_backend == "auto" else config.engine.kernel_backend
        )
        precision = resolve_precision(config.engine.precision)
        check_device_computes_in(precision)
        self._dtype = DTYPES[precision]
        self.hf_config = hf_config(model, tokenizer)
        self._model_config = model
        self._is_dropped = False
        self._frozen_checksum = ""  # computed on first use: the weights do not change
        # a model for scoring has none
        self.has_adapters = train is not None and model.lora is not None
        settings = deepspeed_config(
            config,
            precision=precision,
            world_size=ranks.world_size,
            max_grad_norm=train.max_grad_norm if train else (config.train.max_grad_norm),
        )
        stage = config.engine.zero_stage
        if train is None and not (stage == 3 if is_sharded is None else is_sharded):
            # stages 1 and 2 shard only gradients and optimiser states
            settings["zero_optimization"] = {"stage": 0}
        elif train is None and stage < 3:
            settings["zero_optimization"] = {"stage": 3}
        self.zero_stage = settings["zero_optimization"]["stage"]
        module = build_model(
            model,
            self.hf_config,
            dtype=self._dtype,
            seed=config.run.seed,
            is_sharded=self.zero_stage == 3,
            deepspeed_config=settings,
        )
        self._reads_images = reads_images(self.hf_config)
        vision = {id(parameter) for parameter in vision_parameters(module)}
        if train is not None and self._reads_images and not model.train_vision:
            freeze_vision(module)
        if self.has_adapters:
            add_adapters(module, model, dtype=self._dtype, seed=config.run.seed, name="model")
        if train is not None and config.engine.activation_checkpointing:
            enable_activation_checkpointing(module)
        may_pack = config.engine.packing == "auto" and not self._reads_images
        own_attention = use_packed_attention(module) if may_pack else None
        self.packs = own_attention is not None
        self.module = CausalLMWithLoss(module)
        self.module.projection.timer = timer
        self.flops = flops_of(
            self.module,
            {id(p): tuple(whole_shape(p)) for p in self.module.parameters()},
            is_frozen=self.has_adapters,
            recomputes=train is not None and config.engine.activation_checkpointing,
            vision=vision,
        )
        optimizer = self._optimizer(train, settings) if train else None
        exact_buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self._deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=settings
        )
        self._communication = TimedCommunication(partial(timer, "communication"))
        if timer is not no_timer:
            self._communication.start()
        for name, buffer in self.module.named_buffers():
            # DeepSpeed casts buffers with the weights; rotary frequencies in bf16 are wrong at long
            # positions.
            buffer.data = exact_buffers[name].to(buffer.device)
        buffers = {name: buffer.dtype for name, buffer in exact_buffers.items()}
        self._expected = ExpectedDtypes.of(precision, settings, buffers)
        self._is_trained, self._is_stepped = train is not None, False
        self._check_dtypes("after DeepSpeed has started")
        self._deepspeed.eval()
        if own_attention is not None:
            self._check_packing(module, own_attention)
        elif config.engine.packing == "auto":
            reason = "it reads images" if self._reads_images else "its attention cannot be replaced"
            self._say_padded(reason)
        self.module.projection.transform = find_logit_transform(
            self._deepspeed, ranks.device, packs=self.packs
        )
        self._deepspeed.train(train is not None)

    def _check_packing(self, module: Any, own_attention: str) -> None:
        """Goes back to padding if the model does not compute the same packed."""

        def packed(ids: Tensor, documents: Documents) -> Tensor:
            module.set_attn_implementation(PACKED)
            logits: Tensor = self._deepspeed(ids, torch.ones_like(ids), None, documents)
            return logits

        def alone(ids: Tensor) -> Tensor:
            module.set_attn_implementation(own_attention)
            logits: Tensor = self._deepspeed(ids, torch.ones_like(ids), None)
            return logits

        size = self.hf_config.get_text_config().vocab_size
        reason = why_not_packed(packed, alone, size, self.ranks.device)
        reason = self.ranks.first_text(reason or "")
        if reason:
            module.set_attn_implementation(own_attention)
            self.packs = False
            self._say_padded(reason)
        else:
            module.set_attn_implementation(PACKED)

    def _say_padded(self, reason: str) -> None:
        text = f"{self.hf_config.model_type} is padded, not packed: {reason}"
        if self.ranks.is_main and text not in _said:
            _said.add(text)
            print(f"  {text}", flush=True)

    def _optimizer(self, train: TrainConfig, settings: dict[str, Any]) -> torch.optim.Optimizer:
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                # a sharded parameter is locally empty
                shape = whole_shape(parameter)
                (decayed if len(shape) >= 2 else plain).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": train.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        options: dict[str, Any] = {
            "lr": train.learning_rate,
            "betas": train.adam_betas,
            "eps": train.adam_eps,
        }
        if (
            settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
            != "none"
        ):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)  # type: ignore[no-any-return]
        return torch.optim.AdamW(groups, fused=True, **options)

    def start_step(self, *, seed: int, step: int) -> None:
        """Seeds dropout from (seed, step, rank), so that a resumed run repeats it."""
        self._progress.begin_step(step)
        key = (seed * 1_000_003 + step) * 65_537 + self.ranks.rank
        torch.manual_seed(key % 2**63)

    def forward_backward(
        self, batch: MicroBatch, counts: StepCounts, objective: Objective, *, is_last: bool
    ) -> LossResult:
        """Runs one micro-batch of a step and accumulates its gradients; `is_last`: the step ends
        with it."""
        self._progress.tick()
        batch = self._on_device(batch)
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        request = loss_request(objective, batch, counts, backend=self.backend)
        with self._timer("forward"):
            result: LossResult = self._deepspeed(
                batch.input_ids, batch.attention_mask, request, batch.documents, batch.images
            )
        with self._timer("backward"):
            self._deepspeed.backward(result.loss * self.ranks.world_size, scale_wrt_gas=False)
        return result.detached()

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        """Returns the micro-batch as the model takes it, whichever way it was built. Raises
        DataError for images where the model reads text only."""
        if batch.images is not None and not self._reads_images:
            raise DataError(
                f"the data has images, and a {self.hf_config.model_type} reads text only. Use a"
                " model of vision and language, or prepare the data with the tokenizer of a model"
                " of text."
            )
        if self.packs and batch.documents is None:
            batch = batch.packed()
        return batch.to(self.ranks.device)

    def step(self, *, learning_rate: float) -> float | Tensor:
        """Clips, updates and clears the gradients. Returns the global gradient norm before clipping
        (possibly a tensor on the device, which synchronises when read)."""
        with self._timer("optimiser"):
            return self._step(learning_rate)

    def _step(self, learning_rate: float) -> float | Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        # the only case in which DeepSpeed keeps no norm
        if self.zero_stage == 0 and self.precision == "fp32":
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.module.parameters() if p.grad is not None]
            )
            self._is_dropped = not is_finite(norm)  # nor does it look for NaN there
            if self._is_dropped:
                self.optimizer.zero_grad()
                self._deepspeed.zero_grad()
                return norm
        self._deepspeed.step()
        if not self._is_stepped:  # torch's optimisers create their states in the first step
            self._is_stepped = True
            self._check_dtypes("after the first step")
        if norm is None:
            norm = self._deepspeed.get_global_grad_norm()
        return norm if norm is not None else float("nan")

    def _check_dtypes(self, when: str) -> None:
        optimizer = self.optimizer if self._is_trained else None  # ZeRO-3 puts a placeholder there
        check_dtypes(self.ranks, self.module, optimizer, self._expected, when)

    @property
    def precision(self) -> str:
        """The dtype of the weights, read from the tensors: "bf16", "fp16" or "fp32"."""
        return precision_of(self.module)

    @property
    def is_sharded(self) -> bool:
        """Whether every forward gathers weights from all ranks."""
        return self.zero_stage == 3

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, adapters included; tied ones count once."""
        return sum(whole_shape(p).numel() for p in self.module.parameters())

    @property
    def num_trained_parameters(self) -> int:
        """Those that have a gradient and optimiser states: all, or with LoRA the adapters'."""
        return sum(whole_shape(p).numel() for p in self.module.parameters() if p.requires_grad)

    @property
    def was_step_skipped(self) -> bool:
        """Whether the last step was skipped because a gradient on any rank was not finite."""
        return self._is_dropped or not self._deepspeed.was_step_applied()

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> ScoreResult:
        """Returns the scores of a micro-batch's response tokens, on the CPU."""
        self._progress.tick()
        was_training = self.module.training
        self._deepspeed.eval()
        batch = self._on_device(batch)
        # A model that is whole on every rank is called without DeepSpeed, so ranks need not run in
        # lock step.
        forward = self._deepspeed if self.is_sharded else self.module
        scores: ScoreResult = forward(
            batch.input_ids,
            batch.attention_mask,
            ScoreRequest(batch.rows, batch.labels, self.backend),
            batch.documents,
            batch.images,
        )
        self._deepspeed.train(was_training)
        return scores.cpu()

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> Tensor:
        """Returns the (B, S, V) logits as the model itself gives them, (1, S, V) of a packed
        micro-batch. For tests and small inputs."""
        batch = self._on_device(batch)
        logits: Tensor = self._deepspeed(
            batch.input_ids, batch.attention_mask, None, batch.documents, batch.images
        )
        return logits

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, whole tensor) of every parameter and persistent buffer, one at
        a time.

        Tied parameters appear once. Adapters are merged into their weights. Under ZeRO-3 only one
        parameter, with its adapter, is gathered at a time.
        """
        import deepspeed

        layers = {f"{name}.base_layer.weight": layer for name, layer in adapted_layers(self.module)}
        for name, parameter in self.module.named_parameters():
            if is_adapter(name):
                continue
            layer = layers.get(name)
            gathered = (
                [parameter] if layer is None else [parameter, *adapter_weights(layer).values()]
            )
            with deepspeed.zero.GatheredParameters(gathered, enabled=self.zero_stage == 3):
                yield (
                    self.module.plain_name(name),
                    parameter.data if layer is None else merged_weight(layer),
                )
        for name, tensor in persistent_buffers(self.module):
            yield self.module.plain_name(name), tensor

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, whole gradient) of every trained parameter, before `step`. For
        the doctor and tests."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield self.module.plain_name(name), safe_get_full_grad(parameter)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a Hugging Face folder on rank 0: safetensors, config, generation config, tokenizer
        with template.

        transformers says, with a model on the meta device, which tensor belongs into which file
        under which name, so that `from_pretrained` reads it. Raises
        ArtifactError, on all ranks, if the folder cannot be written.
        """
        buffers = {
            self.module.plain_name(name): dtype for name, dtype in self._expected.buffers.items()
        }

        def write(tensors: Tensors) -> None:
            shell = empty_model(self._model_config, self.hf_config, dtype=self._dtype)
            write_model(folder, shell, tensors, tokenizer, self._model_config)
            if self._reads_images:
                copy_processor(tokenizer.name_or_path, folder)
            check_exported(folder, self._dtype, buffers)

        write_on_main(self.ranks, folder, self.named_tensors(), write)

    def named_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name of the module + `.lora_A.weight` or `.lora_B.weight`, whole tensor), one at
        a time; nothing without LoRA."""
        import deepspeed

        for name, layer in adapted_layers(self.module):
            for part, parameter in adapter_weights(layer).items():
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                    yield self.module.plain_name(f"{name}.{part}"), parameter.data

    def export_adapter(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the adapters alone on rank 0, in peft's format, with the tokenizer and its
        template. Raises as `export`."""

        def write(tensors: Tensors) -> None:
            write_adapter(folder, self.module.model, on_cpu(tensors))
            check_exported(folder, self._dtype, {})
            tokenizer.save_pretrained(folder)

        write_on_main(self.ranks, folder, self.named_adapters(), write)

    def frozen_checksum(self) -> str:
        """Returns a digest of the frozen weights, on every rank; "" if all weights are trained."""
        import deepspeed

        if all(parameter.requires_grad for parameter in self.module.parameters()):
            return ""
        if not self._frozen_checksum:
            found: list[str] = []
            for name, parameter in self.module.named_parameters():
                if not parameter.requires_grad:
                    with deepspeed.zero.GatheredParameters(
                        [parameter], enabled=self.zero_stage == 3
                    ):
                        found += (
                            [f"{name} {checksum(parameter.data)}"] if self.ranks.is_main else []
                        )
            self._frozen_checksum = self.ranks.text_from_main(fingerprint(found))
        return self._frozen_checksum

    @property
    def bytes_per_weight(self) -> int:
        return self._dtype.itemsize

    def save_state(self, folder: Path, *, in_background: bool = False) -> StateFiles:
        """Writes trained weights, optimiser and loss scaler into an existing folder, a few files
        per rank."""
        from sftmix.engine.state import save_state

        leads_own_disk = self.ranks.leads_storage and not self.ranks.is_main
        return save_state(
            self._deepspeed, folder, in_background=in_background, writes_shared=leads_own_disk
        )

    def load_state(self, folder: Path, *, is_universal: bool = False) -> None:
        """Loads what `save_state` wrote on as many ranks, or its universal form. The caller has
        verified the files. For a new engine only."""
        from sftmix.engine.state import load_state

        load_state(self._deepspeed, folder, is_universal=is_universal)
        self._check_dtypes(f"after {folder} was loaded")

    def close(self) -> None:
        """Frees the model, its optimiser and the hooks, so that the next engine of this process has
        memory."""
        self._communication.stop()
        self._deepspeed.destroy()
        release_leftovers(self.module)
        del self._deepspeed, self.optimizer, self.module
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def is_finite(norm: Tensor) -> bool:
    """Waits for the device."""
    return bool(torch.isfinite(norm))


def enable_activation_checkpointing(model: Any) -> None:
    """Turns activation checkpointing on in a transformers model. New releases have renamed the
    method, and warn about the old name."""
    has_new_name = hasattr(model, "activation_checkpointing_enable")
    enable = (
        model.activation_checkpointing_enable
        if has_new_name
        else model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
