"""The one schema. One YAML file describes a run. It is validated here before anything starts.

Every field is named, typed and described below; an unknown key is refused. `sftmix run CONFIG
key=value` overrides single fields by their dotted name. Reading the file is in
`sftmix/config/reader.py`.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

TEMPLATE_DATE = "2024-07-26"


def _off(value: Any) -> Any:
    """YAML reads `off` as False."""
    return "off" if value is False else value


def _no_bool(value: Any) -> Any:
    """Rejects booleans: YAML `yes` becomes True, which Python accepts as 1."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]
DecayRate = Annotated[Float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True
    )


class RunConfig(Section):
    dir: Path = Field(description="Run folder: everything that the run makes goes here.")
    seed: Int = Field(
        0, ge=0, lt=2**63, description="Seeds initial weights, data order, pairs and lam."
    )


def _module_names(value: Any) -> Any:
    is_list = (
        isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
    )
    if value != "all-linear" and not is_list:
        raise PydanticCustomError(
            "module_names",
            "expected `all-linear` or a list of names of modules, for example [q_proj, v_proj]",
        )
    return value


class LoraConfig(Section):
    rank: Int = Field(
        16, ge=1, description="Inner size of an adapter: its product B A has this rank."
    )
    alpha: Float = Field(32.0, gt=0, description="The product is scaled by alpha / rank.")
    dropout: DecayRate = Field(
        0.0, description="Share of an adapter's inputs that is set to zero in training."
    )
    target_modules: Annotated[Literal["all-linear"] | list[str], PlainValidator(_module_names)] = (
        Field(
            "all-linear",
            description=(
                "Ends of names of linear modules (`[q_proj, v_proj]`); default: every linear module"
                " but the head."
            ),
        )
    )


class ModelConfig(Section):
    path: str | None = Field(
        None,
        description=(
            "Folder or Hub name of a Hugging Face causal language model, or of one that also reads"
            " images."
        ),
    )
    architecture: dict[str, Any] | None = Field(
        None,
        description=(
            "Instead of a path: a Hugging Face config (`model_type: llama`, sizes) with random"
            " weights. `vocab_size` and token ids are filled in from the tokenizer where they are"
            " not given."
        ),
    )
    revision: str | None = Field(None, description="Commit, tag or branch on the Hub.")
    trust_remote_code: bool = Field(
        False, description="Run model code that comes with the weights. Off unless you trust it."
    )
    attn_implementation: str | None = Field(
        None, description="Attention of transformers: sdpa, eager, flash_attention_2, ..."
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train low-rank adapters beside frozen weights; default: train all weights.",
    )

    train_vision: bool = Field(
        False,
        description=(
            "Of a model that reads images: also train its vision tower and what connects it to the"
            " language model; default: the language model alone."
        ),
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                "give exactly one of `path` (weights) and `architecture` (random weights)"
            )
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("`architecture` needs a `model_type`, for example `llama`")
        if self.train_vision and self.lora is not None:
            raise ValueError(
                "`lora` trains adapters in the language model alone; remove it or `train_vision`"
            )
        return self


class TokenizerTrainConfig(Section):
    vocab_size: Int = Field(
        4000, ge=300, description="Pieces of the SentencePiece model, the 256 byte pieces included."
    )
    model_type: Literal["bpe"] = Field("bpe", description="SentencePiece algorithm.")


class TokenizerConfig(Section):
    path: str | None = Field(None, description="Folder or Hub name; default: the model's.")
    train: TokenizerTrainConfig | None = Field(
        None, description="Train a SentencePiece tokenizer on the training data instead."
    )
    chat_template: str | None = Field(
        None,
        description=(
            "Name of a built-in template (`alpaca`, `chatml`) or a Jinja file; default: the"
            " tokenizer's own, or `alpaca` where it has none."
        ),
    )
    date: str = Field(
        TEMPLATE_DATE,
        pattern=r"^\d{4}-\d\d-\d\d$",
        description="Day that a chat template which reads the clock is given, so that data repeat.",
    )

    @field_validator("date", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """YAML reads 2024-07-26 as a date."""
        return value.isoformat() if type(value) is datetime.date else value

    @field_validator("date")
    @classmethod
    def _is_a_day(cls, text: str) -> str:
        try:
            datetime.date.fromisoformat(text)
        except ValueError as error:
            raise ValueError(f"expected a day such as {TEMPLATE_DATE}; {error}") from None
        return text


class DataSource(Section):
    path: str = Field(
        description=(
            "File (.json, .jsonl, .ndjson, .csv, .tsv, .parquet; also .gz, .xz, .zst), pattern such"
            " as part-*.jsonl, folder of files, saved `datasets` folder, or Hub name."
        )
    )
    format: str = Field(
        "auto",
        description=(
            "auto, messages, sharegpt, alpaca, dolly, prompt, choice, medmcqa, qa or text."
        ),
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Column of the file for each field of the format."
    )
    use_columns: list[str] = Field(
        default_factory=list, description="Read only these columns; default: all of the format."
    )
    ignore_columns: list[str] = Field(
        default_factory=list,
        description="Leave out these columns, or keys of messages (messages.tool_calls).",
    )
    split: str = Field("train", description="Split of a Hub dataset, folder or saved DatasetDict.")
    subset: str | None = Field(
        None, description="Configuration of a Hub dataset, or sub-folder of a folder."
    )
    weight: Float = Field(
        1.0, gt=0, description="Share of this source's examples that is used; 2.0 uses each twice."
    )


class GeneratorConfig(Section):
    num_train: Int = Field(
        3000,
        ge=4,
        le=40_000,
        description="Training examples; there are about 59,000 distinct ones.",
    )
    num_held_out: Int = Field(300, ge=2, le=10_000, description="Held-out examples, never noisy.")
    noisy_share: Share = Field(0.15, description="Share of training examples with a wrong answer.")


# settings of a source that stand beside `path`
_OF_PATH = ("format", "columns", "use_columns", "ignore_columns")


class DataConfig(Section):
    path: str | None = Field(
        None, description="One source; shorthand for `sources` with one entry."
    )
    sources: list[DataSource] = Field(
        default_factory=list, description="Several sources, mixed by weight."
    )
    generator: GeneratorConfig | None = Field(
        None, description="Instead of a source: generated toy skills (no download)."
    )
    format: str = Field("auto", description="Format of `path`.")
    columns: dict[str, str] = Field(default_factory=dict, description="Column mapping of `path`.")
    use_columns: list[str] = Field(
        default_factory=list, description="Read only these columns of `path`."
    )
    ignore_columns: list[str] = Field(
        default_factory=list,
        description="Leave out these columns of `path`, or keys of messages (messages.tool_calls).",
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail",
        description="Bad rows: fail names all of them; skip writes them to data/skipped.jsonl.",
    )
    control_tokens: Literal["text", "keep"] = Field(
        "text",
        description="Names of control tokens (<s>, <|im_end|>) in the data: text, or the tokens.",
    )
    loss_on_inserted: bool = Field(
        False,
        description="Loss also on what the chat template inserts, such as an empty thought.",
    )
    limit: Int | None = Field(
        None, ge=2, description="Use this many examples, drawn with the seed, instead of all."
    )
    held_out_share: Share = Field(
        0.02, description="Share of the examples kept for held-out evaluation."
    )
    max_length: Int = Field(
        2048, ge=4, description="Tokens per example; the rest is cut off and listed."
    )
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What to do with a longer example."
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        given = [name for name in ("path", "sources", "generator") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of `path`, `sources` and `generator`; found {given or 'none'}"
            )
        of_path = {key: getattr(self, key) for key in _OF_PATH}
        if self.path is None and any(value and value != "auto" for value in of_path.values()):
            raise ValueError(
                f"`{'`, `'.join(_OF_PATH)}` belong to `path`; with `sources`, give them to each"
                " source"
            )
        return self

    @property
    def all_sources(self) -> list[DataSource]:
        if self.path is not None:
            return [DataSource(path=self.path, **{key: getattr(self, key) for key in _OF_PATH})]
        return self.sources


def _epoch_or_steps(value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value in (None, "epoch") or (is_number and value >= 1):
        return value
    raise PydanticCustomError("steps", "expected `epoch` or a number of steps from 1 on")


class TrainConfig(Section):
    epochs: Int = Field(3, ge=1, le=100_000, description="Passes over the training examples.")
    batch_size: Int = Field(
        32, ge=1, description="Examples per optimiser step, over all ranks and micro-batches."
    )
    micro_batch_tokens: Int = Field(
        8192, ge=1, description="Token budget of one forward, with padding if there is any."
    )
    learning_rate: Float = Field(2e-6, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: Float = Field(
        0.1, ge=0, description="Applied to matrices; not to biases and norm weights."
    )
    adam_betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999), description="Decay rates of AdamW's moments."
    )
    adam_eps: Float = Field(1e-8, gt=0, description="Added to AdamW's denominator.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="After the warm-up."
    )
    warmup_ratio: Share = Field(0.1, description="Share of the steps with rising learning rate.")
    max_grad_norm: Float = Field(
        1.0, ge=0, description="Clips the global gradient norm; 0 switches clipping off."
    )
    evaluate_every: Annotated[Literal["epoch"] | int | None, PlainValidator(_epoch_or_steps)] = (
        Field(
            None,
            description=(
                "Held-out loss during training: after every `epoch`, or after every so many steps;"
                " and after the last step. Default: never."
            ),
        )
    )
    keep_best: bool = Field(
        False,
        description=(
            "Keep the model with the lowest of these losses, not the last one. Not in the reference"
            " run."
        ),
    )
    patience: Int | None = Field(
        None,
        ge=1,
        description=(
            "Stop after so many of these losses in a row without a new lowest one. Not in the"
            " reference run."
        ),
    )

    @model_validator(mode="after")
    def _evaluates(self) -> TrainConfig:
        if self.chooses and self.evaluate_every is None:
            raise ValueError(
                "`keep_best` and `patience` compare held-out losses: say with `evaluate_every` when"
                " they are measured"
            )
        return self

    @property
    def chooses(self) -> bool:
        """Whether held-out losses decide which model is kept."""
        return self.keep_best or self.patience is not None


CHOICES = {"keep_best": False, "patience": None}  # how held-out losses choose: not at all


class ReferenceConfig(Section):
    model: ModelConfig | None = Field(
        None, description="Reference model; default: the target's. A smaller one will do."
    )
    train: TrainConfig | None = Field(
        None, description="Fields given here replace those of `train`."
    )
    num_checkpoints: Int | None = Field(
        None,
        ge=1,
        description=(
            "Evenly spaced checkpoints; default: the end of every epoch, or 3 if there are fewer"
            " than 3 epochs."
        ),
    )

    @model_validator(mode="after")
    def _has_all_steps(self) -> ReferenceConfig:
        if self.train is not None and self.train.chooses:
            raise ValueError(
                "`train.keep_best` and `train.patience` are for the baseline and the target: the"
                " checkpoints of all steps of the reference run are the input of the confidence"
            )
        return self


ScoreMode = Literal["checkpoints", "live", "online"]


class ConfidenceConfig(Section):
    mode: ScoreMode = Field(
        "checkpoints",
        description=(
            "Where perplexities come from. checkpoints: every saved checkpoint of the reference run"
            " over all training examples (the paper). live: the same passes inside the reference"
            " run, nothing saved. online: the losses of the reference run's own forwards, one per"
            " epoch, no pass at all."
        ),
    )
    compare: list[ScoreMode] = Field(
        default_factory=list,
        description="Further modes, scored too; the report shows how far they agree.",
    )
    online_from_epoch: Int = Field(
        1,
        ge=1,
        description=(
            "First epoch of the reference run that online scores count. In the first epoch of a"
            " model with random weights a loss says more about when an example was seen than about"
            " the example: 2 there."
        ),
    )
    models: list[ModelConfig] = Field(
        default_factory=list,
        description="Score with these models instead; there is no reference run then.",
    )
    scores: str | None = Field(
        None,
        description=(
            "Use this published score table (folder or Hub name) instead; nothing is scored."
        ),
    )
    scores_revision: str | None = Field(
        None, description="Commit, tag or branch of a table on the Hub."
    )
    scores_column: str | None = Field(
        None,
        description="Column of the table to take for the confidence; higher is more confident.",
    )
    allow_differences: list[
        Literal["tokenizer", "template", "mask_policy", "max_length", "dtype", "date", "images"]
    ] = Field(
        default_factory=list,
        description="In what a table from elsewhere may differ from this data.",
    )
    micro_batch_tokens: Int = Field(
        16384, ge=1, description="Token budget of one forward, with padding if there is any."
    )
    unit_examples: Int = Field(
        1024,
        ge=1,
        description="Examples of one unit of work, which one rank scores and publishes as a whole.",
    )
    sharding: Literal["auto", "replicated", "zero3"] = Field(
        "auto",
        description=(
            "replicated: every rank holds the whole model; zero3: sharded over the ranks; auto: by"
            " its size."
        ),
    )

    @model_validator(mode="after")
    def _one_source(self) -> ConfidenceConfig:
        if self.models and self.scores:
            raise ValueError("give `models` or `scores`, not both")
        if (self.models or self.scores) and (self.compare or self.mode != "checkpoints"):
            raise ValueError(
                "`mode` and `compare` are about the reference run, and with `models` or `scores`"
                " there is none"
            )
        if any(model.lora is not None for model in self.models):
            raise ValueError(
                "`lora` belongs to a model that is trained, and `models` are only scored with"
            )
        if self.mode in self.compare or len(set(self.compare)) < len(self.compare):
            raise ValueError("`compare` names modes other than `mode`, each once")
        if self.online_from_epoch > 1 and "online" not in self.modes:
            raise ValueError(
                "`online_from_epoch` belongs to the mode online, which is neither `mode` nor in"
                " `compare`"
            )
        if self.scores is None and (
            self.scores_revision or self.scores_column or self.allow_differences
        ):
            raise ValueError(
                "`scores_revision`, `scores_column` and `allow_differences` belong to `scores`"
            )
        return self

    @property
    def has_reference(self) -> bool:
        return not self.models and self.scores is None

    @property
    def modes(self) -> list[ScoreMode]:
        """Returns the modes to score, beginning with the one that the split uses."""
        return [self.mode, *self.compare] if self.has_reference else []


class SplitConfig(Section):
    confident_share: Share = Field(
        0.5, description="Most confident share of the examples (D^c of the paper)."
    )
    unconfident_share: Share = Field(
        0.5, description="Least confident share (D^u). What is left between trains with NTP alone."
    )
    column: str = Field(
        "confidence",
        description=(
            "Column of the score table to rank by: confidence, variability, or your own. `random`"
            " splits by chance, whatever the scores say (a control)."
        ),
    )
    highest_is_confident: bool = Field(
        True, description="Are the highest values the confident ones?"
    )
    stratify_by: str | None = Field(
        None,
        description=(
            "Take the shares within each value of this column of the data, for example `group`."
        ),
    )

    @model_validator(mode="after")
    def _disjoint(self) -> SplitConfig:
        if self.confident_share + self.unconfident_share > 1:
            raise ValueError("`confident_share` + `unconfident_share` must not exceed 1")
        return self


class MixupConfig(Section):
    weight: Float = Field(0.2, ge=0, description="mu: factor of the Mixup loss. 0 is plain SFT.")
    alpha: Float = Field(
        0.5, gt=0, description="lam is drawn from Beta(alpha, alpha), once per pair and epoch."
    )
    matching: Literal["random", "length", "within_halves"] = Field(
        "random",
        description=(
            "Partners: any of the other half (the paper); of the other half and of like response"
            " length, so that less of the longer one is left unmixed; or of the same half (a"
            " control)."
        ),
    )
    length_block: Int = Field(
        256, ge=1, description="With matching by length: pairs among which partners are drawn."
    )
    site: Literal["head", "input_embeddings"] = Field(
        "head",
        description=(
            "Where pairs are interpolated: before the head (the method), or at the input (an"
            " ablation: a third forward)."
        ),
    )


class ObjectiveConfig(Section):
    """The next-token part of a loss (docs/objectives.md)."""

    ntp_weight: Float = Field(
        1.0, ge=0, description="Factor of the next-token part; 0 leaves Mixup alone."
    )
    weighting: Literal["none", "dft", "eaft", "eaft_unscaled", "ir_dro"] = Field(
        "none",
        description=(
            "Weight of a token. dft: the probability of its label; eaft: the entropy of the"
            " prediction over 3, to the power eaft_alpha (the authors' code); eaft_unscaled: not"
            " divided by 3. ir_dro: of an example, by its loss, for one more forward."
        ),
    )
    eaft_alpha: Float = Field(1.0, gt=0, description="Exponent of EAFT's entropy.")
    ir_dro_temperature: Float = Field(
        1.0,
        gt=0,
        description="IR-DRO: nats per token that make the weight of an example e times as large.",
    )
    label_smoothing: DecayRate = Field(
        0.0, description="Share of the target that is spread evenly over the vocabulary."
    )
    neftune_alpha: Float = Field(
        0.0,
        ge=0,
        description=(
            "NEFTune: uniform noise of up to alpha / sqrt(length x hidden size) on each input"
            " embedding in training; the authors use 5 to 15. 0: none."
        ),
    )

    @property
    def token_weighting(self) -> str:
        """What is decided token by token, at the head."""
        return "none" if self.weighting == "ir_dro" else self.weighting


NTP = ObjectiveConfig()  # plain next-token prediction


class BaselineConfig(Section):
    enabled: bool = Field(
        True, description="Also train the target without Mixup, in the same data order."
    )
    objective: ObjectiveConfig = Field(NTP, description="Its next-token loss; default: plain NTP.")

    @model_validator(mode="after")
    def _learns(self) -> BaselineConfig:
        if self.objective.ntp_weight == 0:
            raise ValueError("`objective.ntp_weight` is 0, and the baseline has no other loss")
        return self


class EngineConfig(Section):
    num_processes: Int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes that `sftmix run` starts on this machine, one per GPU.",
    )
    num_threads: Int | None = Field(
        None,
        ge=1,
        description=(
            "CPU threads of each rank. Default: OMP_NUM_THREADS, or the machine's cores over its"
            " ranks. On CPUs, results are equal to the last bit only where the threads are."
        ),
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_bool)] = Field(
        3,
        description=(
            "What DeepSpeed shards over the ranks: 1 optimiser, 2 + gradients, 3 + weights."
        ),
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 on GPUs that have it, fp32 on CPUs."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward: less memory, more time."
    )
    deepspeed: Path | None = Field(
        None, description="A DeepSpeed JSON file to build on; must not contradict this file."
    )
    packing: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = Field(
        "auto",
        description=(
            "auto: examples follow one another without padding, where the model computes the same"
            " as alone; off: examples are padded to equal length. Results are equal to rounding."
        ),
    )
    kernel_backend: Literal["auto", "torch", "triton", "reference"] = Field(
        "auto", description="Implementation of the loss; auto: triton on GPUs, torch elsewhere."
    )


class EvaluationConfig(Section):
    trained: bool = Field(
        True,
        description=(
            "Measure the models that this run trains. false: nothing is trained, and `model` is"
            " measured as it is (`sftmix evaluate FOLDER`)."
        ),
    )
    models: list[ModelConfig] = Field(
        default_factory=list,
        description="Further models to measure on the same held-out examples, with their tokens.",
    )
    micro_batch_tokens: Int = Field(
        16384, ge=1, description="Token budget of one forward, with padding if there is any."
    )


class LogConfig(Section):
    every_steps: Int = Field(10, ge=1, description="Steps between two lines of metrics.")
    tensorboard: bool = Field(True, description="Also write TensorBoard event files.")
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field(
        default_factory=list,
        description=(
            "Also send metrics there (pip install 'sftmix[wandb]', and so on): a run per training"
            " stage, with TensorBoard's names and steps."
        ),
    )
    project: str | None = Field(
        None,
        description="Project or experiment there. Default: the environment's, or `sftmix`.",
    )
    profile_steps: tuple[Int, Int] | None = Field(
        None,
        description=(
            "First and last training step of a trace by torch's profiler, one file per rank in"
            " logs/traces, for https://ui.perfetto.dev. Each training stage writes its own."
        ),
    )

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError("expected the first and the last step, counted from 1")
        return steps


class CheckpointConfig(Section):
    every_steps: Int | None = Field(
        None, ge=1, description="Save the training state after every so many optimiser steps."
    )
    every_minutes: Float | None = Field(
        30.0, gt=0, description="Save it when so much time has passed since the last save."
    )
    keep_last: Int = Field(2, ge=1, description="Newest checkpoints that stay.")
    keep_every: Int | None = Field(
        None, ge=1, description="Checkpoints whose step is a multiple of this stay too."
    )
    asynchronous: bool = Field(
        False, description="Copy the state to memory and write it while training goes on."
    )


class LimitsConfig(Section):
    skipped_steps: Int = Field(
        5,
        ge=1,
        description=(
            "Steps in a row without a finite gradient before training ends; fp16: at least 20."
        ),
    )
    wall_clock_minutes: Float | None = Field(
        None, gt=0, description="After this time, save, and exit with code 75."
    )
    join_minutes: Float = Field(
        120.0,
        gt=0,
        le=1e6,
        description="How long ranks wait for each other at the start; rank 0 may prepare the data.",
    )
    silent_seconds: Float = Field(
        20.0,
        gt=1,
        description="Abort the run if a rank sends no heartbeat for this many seconds.",
    )
    stall_minutes: Float = Field(
        30.0,
        gt=0,
        description=(
            "Dump all stack traces and abort if no rank makes progress for this many minutes."
        ),
    )


class Config(Section):
    """One run of the recipe."""

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    confidence: ConfidenceConfig = ConfidenceConfig()
    split: SplitConfig = SplitConfig()
    mixup: MixupConfig = MixupConfig()
    objective: ObjectiveConfig = NTP
    train: TrainConfig = TrainConfig()
    baseline: BaselineConfig = BaselineConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _tokenizer_has_a_source(self) -> Config:
        if self.tokenizer.path and self.tokenizer.train:
            raise ValueError("`tokenizer`: give `path` or `train`, not both")
        if not (self.tokenizer.path or self.tokenizer.train or self.model.path):
            raise ValueError(
                "`tokenizer`: a model with random weights needs `tokenizer.path` or"
                " `tokenizer.train`"
            )
        return self

    @model_validator(mode="after")
    def _learns(self) -> Config:
        if self.objective.ntp_weight == self.mixup.weight == 0:
            raise ValueError(
                "`objective.ntp_weight` and `mixup.weight` are both 0, so nothing would be learnt"
            )
        return self

    @model_validator(mode="after")
    def _has_models_to_measure(self) -> Config:
        evaluation = self.evaluation
        measured = [*([] if evaluation.trained else [self.model]), *evaluation.models]
        for number, model in enumerate(measured):
            if model.path is None or model.lora is not None:
                raise ValueError(
                    "`evaluation`: a model that is measured as it is needs a `path`, and no `lora`"
                )
            if model.path in [other.path for other in measured[:number]]:
                raise ValueError(f"`evaluation.models`: {model.path} is named twice")
        return self

    @model_validator(mode="after")
    def _holds_out(self) -> Config:
        trains = (self.train, self.reference_train)
        if any(train.evaluate_every is not None for train in trains) and (
            self.data.generator is None and self.data.held_out_share == 0
        ):
            raise ValueError(
                "`train.evaluate_every` measures held-out losses, and `data.held_out_share` is 0"
            )
        return self

    @model_validator(mode="after")
    def _online_has_epochs(self) -> Config:
        if (
            "online" in self.confidence.modes
            and self.confidence.online_from_epoch > self.reference_train.epochs
        ):
            given, epochs = self.confidence.online_from_epoch, self.reference_train.epochs
            raise ValueError(
                f"`confidence.online_from_epoch` is {given}, and the last epoch of the reference"
                f" run is {epochs}"
            )
        return self

    @property
    def reference_model(self) -> ModelConfig:
        return self.reference.model or self.model

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The target, the reference model if it is another, and those that score, by their key."""
        other = {"reference.model": self.reference.model} if self.reference.model else {}
        scoring = enumerate(self.confidence.models)
        return {
            "model": self.model,
            **other,
            **{f"confidence.models[{number}]": model for number, model in scoring},
        }

    @property
    def reference_train(self) -> TrainConfig:
        """The reference run has all its steps: its checkpoints are the input of the confidence."""
        settings = self.reference.train or self.train
        return settings.model_copy(update=CHOICES)

    @property
    def tokenizer_source(self) -> str | None:
        """Folder or Hub name of a tokenizer; None if one is trained."""
        return None if self.tokenizer.train else self.tokenizer.path or self.model.path
