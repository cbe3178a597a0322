# SPDX-License-Identifier: Apache-2.0
"""Define every setting of a run: name, type, range, default, meaning. Only this module and ``recipe`` use pydantic."""

from __future__ import annotations

import json
import typing
from typing import Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from mirrortune.config import strict_yaml
from mirrortune.system.paths import PLAIN_NAME, is_plain_name


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _plain_name(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(PLAIN_NAME)
    return name


def _all_different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("names that are all different")
    return names


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("two numbers, the lower one first")
    return bounds


class ModelSection(_Section):
    """The base model."""

    name: str | None = None
    """Hub id, local folder, or package:MODULE/FOLDER inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights; auto keeps the stored one."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantise the base weights on loading, with bitsandbytes; adapters compute in a parallel branch."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    """Attention implementation, by transformers' name; the model's own (mostly sdpa) by default. Results differ in
    rounding only."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of every dropout layer of the base model during training; the model's own by default."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Dangerous: it runs with your permissions. Only the command line can
    permit it, with --trust-remote-code or model.trust_remote_code=true; true in a recipe file is refused."""


class TaskSection(_Section):
    """The task."""

    kind: str | None = None
    """Kind of task, such as text-classification."""
    labels: typing.Annotated[tuple[str, ...], AfterValidator(_all_different)] | None = None
    """Class names in the order of model outputs; by default the data's, in the base's order if it has the same."""
    metrics: tuple[str, ...] | None = None
    """Metrics to compute at every evaluation; those of the kind of task by default."""
    selection_metric: str | None = None
    """Metric that selects the best checkpoint; the first of metrics by default."""
    loss_on: str | None = None
    """Language models: tokens whose loss is trained on, completions (the default where there is a prompt) or all."""
    format: str | None = None
    """Language models: format rows with the tokenizer's chat template (chat) or as text; auto decides by columns."""
    answer: str | None = None
    """Language models: also generate answers and score them by exact match. The value says how to find the answer in a
    text: gsm8k, boxed, letter, option, exact, or "regex:PATTERN"."""


class SourceSection(_Section):
    """One of several data sets: an item of data.path."""

    path: str
    """Same values as data.path for a single data set; hf://ID:CONFIG:SPLIT for a configuration or split of a Hub data
    set."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each row is drawn in an epoch: 2 for twice, 0.5 for half of the rows, a different half each epoch. For
    streams, whose size is unknown: the share of rows, relative to the other weights."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    text_columns: tuple[str, ...] | None = None
    """Text columns; data.text_columns by default, else detected."""
    choice_columns: tuple[str, ...] | None = None
    """Columns of endings."""
    label_column: str | None = None
    """Target column."""
    image_column: str | None = None
    """Image column."""
    audio_column: str | None = None
    """Audio column."""

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, typing.Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def __str__(self) -> str:
        return self.path if self.weight == 1 else f"{self.path} (weight {self.weight:g})"


class DataSection(_Section):
    """The data sets and how rows are read."""

    path: str | typing.Annotated[tuple[str | SourceSection, ...], Field(min_length=1)] | None = None
    """File, folder, Hub id, or shipped:NAME for data inside this package; or a list of these to train on together,
    optionally with weights: [a.csv, {path: b.jsonl, weight: 2}]."""
    config: str | None = None
    """Configuration of a Hub data set, such as sst2 of nyu-mll/glue."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    encoding: str = "utf-8"
    """Encoding of local text files."""
    train_split: str = "train"
    """Name of the split to train on."""
    validation_split: str = "validation"
    """Name of the split that selects the best checkpoint; set aside from the training rows if there is none."""
    test_split: str = "test"
    """Name of the split that `eval --split test` reads."""
    validation_path: str | None = None
    """Separate validation data, in the same form as path: its split named validation_split, or its only split."""
    validation_column_names: dict[str, str] = Field(default_factory=dict)
    """Column names in validation_path by those of the training rows: {query: question, response: answer}."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows set aside when there is no validation split."""
    text_columns: tuple[str, ...] | None = None
    """One or two columns of text, or several for sentence similarity; detected by default."""
    choice_columns: tuple[str, ...] | None = None
    """Multiple choice: one column for each ending, or one column that holds a list of them; detected by default."""
    label_column: str | None = None
    """Target column; detected by default."""
    missing_label: int | float | str | None = None
    """Value in label_column (which must be named) of rows without a label: -1 in GLUE's test splits."""
    stride: int | None = Field(default=None, ge=0)
    """Question answering: overlap of neighbouring windows of a long context, in tokens; 128 by default, or a third of
    a shorter window."""
    image_column: str | None = None
    """Image column, encoded images or paths; detected by default."""
    audio_column: str | None = None
    """Audio column, encoded recordings or paths; detected by default."""
    contained: bool = False
    """Refuse rows whose image or audio path leads outside the data's folder, directly or through a link."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Maximum length of a recording in seconds; longer ones are truncated. 10 by default."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width of the model's input, in pixels; the image processor's own by default."""
    augment: str | None = None
    """Augmentation of training images: none (default), flip or crop-flip."""
    system: str | None = None
    """Language models: system message of conversations that have none."""
    prefix: str | None = None
    """Text to text: prefix of every source text, such as "summarize: "."""
    max_target_length: int | None = Field(default=None, ge=2)
    """Text to text: maximum length of targets, and of the text generated for scoring, in tokens; 128 by default."""
    packing: bool | None = None
    """Language models: pack several training rows into one sequence; rows do not attend to each other."""
    max_length: int | None = Field(default=None, ge=4)
    """Maximum sequence length in tokens; longer rows are truncated and counted. The model's own limit by
    default, at most 512 (1,024 for language models, 384 for windows of question answering), or what the files of an
    embedding model state."""
    blank_text: Literal["drop", "keep"] = "drop"
    """Drop or keep training rows whose text is blank. Rows of other splits are always kept, so that every row is
    scored."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Train on a seeded random subset of this many rows."""
    streaming: bool = False
    """Read training rows during training, for data larger than memory or disk; needs train.max_steps, and a validation
    split or file. Columns, classes and lengths are determined from the first 1,000 rows."""
    shuffle_buffer: int = Field(default=4096, gt=0)
    """Streaming: number of rows that each process reads, shuffles and sorts by length together."""
    max_eval_rows: int | None = Field(default=None, gt=0)
    """Streaming: number of rows to score of each split, from its beginning; 10,000 by default."""
    add_tokens: tuple[typing.Annotated[str, Field(min_length=1, pattern=r"^\S+$")], ...] = ()
    """Tokens to add to the vocabulary: ["<user>", GATA4]. Only their rows of the embeddings are trained, at
    train.head_lr; these are saved with the adapter and merged."""


Parts = typing.Annotated[int, Field(ge=2)]
Sizes = typing.Annotated[tuple[typing.Annotated[int, Field(ge=1)], ...], Field(min_length=2)]


Block = typing.Annotated[int, Field(ge=0)] | typing.Annotated[str, Field(pattern=r"^last [1-9][0-9]*$")]


class Interleaved(_Section):
    """A fused layer whose parts repeat."""

    parts: Parts | Sizes
    """Number of parts, or their sizes relative to each other."""
    repeat: int = Field(default=1, ge=1)
    """Number of repetitions, such as the number of heads."""


class AdapterSection(_Section):
    """The adapter and the other trained parameters."""

    method: str = "mirror-scale"
    """Name of the method; docs/methods.md and docs/peft.md describe them."""
    rank: Literal["full", "out"] | typing.Annotated[int, Field(gt=0)] | None = None
    """Number of leading singular directions of each matrix that the adapter acts on: a number, full for min(out, in),
    or out for all outputs (rotations on the output side only). For PEFT's tuners, r; for speclora, the rank of its LoRA
    branch (options.top_k is the number of scales). The method's own by default (full for rotations)."""
    pairing: str | list[typing.Any] | dict[str, typing.Any] | None = None
    """Pairs of directions that are rotated together: a name, pairs such as [[0, 5], [1, 7]], pairs by layer name or
    pattern, or a .json file of either; the method's own by default."""
    saliency: Literal["mean", "rms"] = "mean"
    """Adaptive pairing: measure the gradient of the mean loss, or its root mean square over the calibration batches."""
    calibration_batches: int = Field(default=8, gt=0)
    """Adaptive pairing and lora-sb: number of batches over which gradients are measured."""
    calibration_warmup_steps: int = Field(default=60, ge=0)
    """Adaptive pairing and lora-sb: steps that train only the head before gradients are measured; the head is reset
    afterwards."""
    target_modules: str = "all-linear"
    """Regular expression for the names of layers to adapt, matched against the whole name or from any dot on;
    all-linear for all linear layers, all-layers for convolutions too."""
    layers: tuple[Block, ...] | None = Field(default=None, min_length=1)
    """Blocks whose layers are adapted, by number from 0 or as "last N": [0, 1, last 4]; by default all, and the layers
    outside blocks."""
    also_train: tuple[typing.Annotated[str, Field(min_length=1)], ...] = ()
    """Parameters of the base model to train directly, besides the adapter: norms, biases, embeddings (all tables), or
    regular expressions for names of parameters or modules, matched from any dot on: [pooler, norms]."""
    split: dict[str, Parts | Sizes | Interleaved] = Field(default_factory=dict)
    """Fused layers to factorise part by part, by a regular expression for their names: {c_attn: 3},
    {qkv_proj: [4, 1, 1]}, or {query_key_value: {parts: 3, repeat: 12}} where each of 12 heads has its own three."""
    strategy: Literal["auto", "branch", "factored", "dense"] = "auto"
    """How adapted layers compute; auto counts the multiplications of each strategy and uses the cheapest one for each
    layer."""
    form: Literal["auto", "compact", "portable"] = "auto"
    """How the adapter is stored: compact (kilobytes; loading recomputes, aligns and verifies the basis),
    portable (includes the factors, about the size of a LoRA of the same rank), or auto: compact, but portable where the
    basis cannot be recomputed exactly, or where that takes minutes and the factors are small."""
    options: dict[str, typing.Any] = Field(default_factory=dict)
    """Options of the method's core, such as scale_top_k, or fields of the configuration of a PEFT tuner."""


ClassWeight = typing.Annotated[float, Field(gt=0, le=1e6)]


class TrainSection(_Section):
    """The training loop."""

    lr: float | None = Field(default=None, ge=0, lt=1e30)
    """Peak learning rate of the adapter; the method's own by default."""
    head_lr: float = Field(default=1e-3, ge=0, lt=1e30)
    """Peak learning rate of the task head."""
    also_train_lr: float = Field(default=1e-4, ge=0, lt=1e30)
    """Peak learning rate of the parameters that adapter.also_train selects; they have no weight decay."""
    batch_size: int = Field(default=32, gt=0)
    """Rows per device and micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, gt=0, le=1_000_000)
    """Micro-batches per optimizer step."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps, or after epochs, whichever comes first; raise epochs to train longer."""
    schedule: Literal["linear", "cosine", "constant", "cosine-restarts", "wsd", "inverse-sqrt"] = "linear"
    """Decay of the learning rates after warm-up: to zero at the last step (linear, cosine), none (constant), in
    num_cycles cosines, only in the last decay_ratio of the steps (wsd), or as 1 / sqrt(step)."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps used for warm-up, over which the learning rates rise from zero."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of warm-up steps, instead of warmup_ratio."""
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Lowest learning rate of a schedule, as a share of the peak."""
    num_cycles: int = Field(default=2, ge=1)
    """cosine-restarts: number of cosines, each of which starts at the peak."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """wsd: share of the steps in which the learning rates decay, at the end."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw-8bit", "schedule-free", "muon"] = "adamw"
    """Optimizer: torch's AdamW or SGD, transformers' Adafactor, bitsandbytes' 8-bit AdamW, schedulefree's AdamW (with
    schedule constant), or torch's Muon for hidden matrices and AdamW for the rest."""
    betas: tuple[typing.Annotated[float, Field(ge=0, lt=1)], typing.Annotated[float, Field(ge=0, lt=1)]] | None = None
    """Decay rates of the running averages of gradients and of their squares, for all variants of AdamW; [0.9, 0.999] by
    default."""
    eps: float | None = Field(default=None, gt=0)
    """Term added to the denominator for numerical stability, for all optimizers but sgd; 1e-8 by default, 1e-30 (added
    to squares) for adafactor."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """Momentum of sgd (0.9 by default) and of the matrices of muon (0.95)."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Language models: scale of the uniform noise added to embeddings during training (NEFTune; 5 to 15 in its paper);
    none by default."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of trained matrices; adapters and biases have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Clip the gradients to this norm."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the base model; auto is bf16 on GPUs that have it, fp16 (with gradient scaling) on other GPUs, and
    fp32 elsewhere."""
    compile: bool = False
    """Compile the model with torch.compile: the first steps take minutes, later ones may be faster, depending on model
    and machine. Results differ in rounding."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the model's blocks for the backward pass and recompute the rest: less memory, about a
    third more time."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the head's initialisation, the order of rows, dropout, the choice of validation rows, and random
    pairs."""
    eval_every_steps: int | None = Field(default=None, gt=0)
    """Number of optimizer steps between evaluations; by default at the end of every epoch."""
    save_every_steps: int | None = Field(default=None, gt=0)
    """Number of optimizer steps between checkpoints; by default at the end of every epoch."""
    keep: int = Field(default=1, gt=0)
    """Number of most recent checkpoints to keep, in addition to the best one."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many consecutive evaluations without improvement; never by default."""
    log_every_steps: int = Field(default=10, gt=0)
    """Number of optimizer steps between log entries."""
    track: Literal["tensorboard", "wandb", "mlflow", "trackio"] | None = None
    """Experiment tracker that receives every logged value; none by default."""
    num_workers: int = Field(default=1, ge=0, le=64)
    """Number of threads that prepare batches in advance; 0 prepares each when it is needed. Results do not depend on
    it."""
    class_weights: Literal["balanced"] | dict[str, ClassWeight] | None = None
    """Weight of each class in the training loss, such as {spam: 5}, 1 for classes not listed; balanced gives all
    classes the same total weight. The weighted sum is divided by the number of rows (or words), not by the sum of their
    weights as in torch's CrossEntropyLoss. Evaluation is unweighted."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Classification: share of each target that the training loss spreads evenly over all classes."""
    balance: bool = False
    """Sample equally many training rows of each class. An epoch has as many rows as before; rows of rare classes
    repeat, and only some of those of frequent classes are drawn."""


class EvalSection(_Section):
    """Evaluation."""

    batch_size: int | None = Field(default=None, gt=0)
    """Rows per device. By default 64, or train.batch_size for tasks that score the whole vocabulary at every position;
    fewer where rows are longer than the training rows or would take more memory than a training step."""
    before: bool | Literal["auto"] = "auto"
    """Score the validation rows before the first step too; auto: if that takes less than a tenth of the run."""
    protocol: Literal["dev-best", "split-dev"] = "dev-best"
    """dev-best selects the best checkpoint and reports its score on the same validation rows; split-dev halves them,
    always in the same way, selects on one half and reports on the other."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """With task.answer: maximum length of a generated answer, in tokens; 256 by default."""
    max_rows: int | None = Field(default=None, gt=0)
    """Number of validation rows to score at each evaluation of a run, a seeded random subset (of a stream: of the rows
    that data.max_eval_rows leaves); all by default. `eval` scores all."""
    samples: int | None = Field(default=None, ge=0, le=64)
    """Tasks that generate text: number of validation prompts to answer at each evaluation of a run, always the same
    ones; 3 by default, none in `compare`."""
    report_splits: tuple[str, ...] = ()
    """Labelled splits, such as test, on which to score the selected checkpoint after training."""
    prediction_labels: Literal["names", "indices"] = "names"
    """Write classes as names or as indices in `eval --predictions`."""
    prediction_bounds: typing.Annotated[tuple[float, float], AfterValidator(_ascending)] | None = None
    """Lowest and highest number that `eval --predictions` writes; others are clipped."""
    prediction_files: dict[str, typing.Annotated[str, AfterValidator(_plain_name)]] = Field(default_factory=dict)
    """Names of the files that `eval --predictions FOLDER` writes, by the data set's names for its splits; SPLIT.tsv for
    others."""


class Recipe(_Section):
    """All settings of a run, resolved and checked."""

    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    output_dir: str | None = None
    """Run directory; runs/TASK-MODEL-METHOD by default."""

    def to_yaml(self) -> str:
        """Return the recipe as YAML that loads to an equal recipe, without settings that are None.

        The permission to run code is left out, because no file can give it.
        """
        permission = {"model": {"trust_remote_code"}}
        return strict_yaml.dump(json.loads(self.model_dump_json(exclude_none=True, exclude=permission)))
