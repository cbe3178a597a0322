# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run: name, type, range, default and meaning. Only this module and ``recipe.py`` use pydantic."""

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


class ModelSection(_Section):
    """The base model."""

    name: str | None = None
    """Hub id, local folder, or package:MODULE/FOLDER inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights; auto keeps the stored one."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantise the base weights while loading, by bitsandbytes; adapters compute beside them."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    """How attention is computed, by transformers' name; the model's own choice (mostly sdpa) by default. The same but
    for rounding."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of every dropout of the base model in training; the model's own by default."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Dangerous: it runs with your rights. Only the command line permits
    it, by --trust-remote-code or model.trust_remote_code=true; true in a recipe file is refused."""


class TaskSection(_Section):
    """What is learned."""

    kind: str | None = None
    """Kind of task, such as text-classification."""
    labels: tuple[str, ...] | None = None
    """Class names in the order of the model's outputs; read from the data by default."""
    metrics: tuple[str, ...] | None = None
    """Metrics of every evaluation; the kind's own by default."""
    selection_metric: str | None = None
    """The metric by which the best checkpoint is kept; the first of metrics by default."""
    loss_on: str | None = None
    """Language models: learn completions (default where there is a prompt) or all tokens."""
    format: str | None = None
    """Language models: write rows by the tokenizer's chat template, or as text; auto takes what the columns suggest."""
    answer: str | None = None
    """Language models: also score the answers that the model generates (exact_match). How answers are written: gsm8k,
    boxed, letter, option, exact, or "regex:PATTERN"."""


class SourceSection(_Section):
    """One of several data sets: an item of data.path."""

    path: str
    """As data.path of a single data set; hf://ID:CONFIG:SPLIT for a configuration or a split of a Hub data set."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each of its rows is drawn in an epoch: 2 for twice, 0.5 for half of the rows, other ones in the next
    epoch. Of a stream, whose size is not known: its share of the rows, relative to the other weights."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    text_columns: tuple[str, ...] | None = None
    """Its columns of text; data.text_columns by default, and detected without."""
    choice_columns: tuple[str, ...] | None = None
    """Its columns of endings."""
    label_column: str | None = None
    """Its column of targets."""
    image_column: str | None = None
    """Its column of images."""
    audio_column: str | None = None
    """Its column of recordings."""

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, typing.Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def __str__(self) -> str:
        return self.path if self.weight == 1 else f"{self.path} (weight {self.weight:g})"


class DataSection(_Section):
    """Rows to learn from."""

    path: str | typing.Annotated[tuple[str | SourceSection, ...], Field(min_length=1)] | None = None
    """File, folder, Hub id, or shipped:NAME for data inside this package; or a list of these to learn from together,
    each perhaps with a weight: [a.csv, {path: b.jsonl, weight: 2}]."""
    config: str | None = None
    """Configuration of a Hub data set, such as sst2 of nyu-mll/glue."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    encoding: str = "utf-8"
    """Encoding of local text files."""
    train_split: str = "train"
    """Name of the split to train on."""
    validation_split: str = "validation"
    """Name of the split that chooses the best checkpoint; set aside from the training rows if there is none."""
    test_split: str = "test"
    """Name of the split that `eval --split test` reads."""
    validation_path: str | None = None
    """Another data set, whose split of that name (or whose only one) has the validation rows; written as path is."""
    validation_column_names: dict[str, str] = Field(default_factory=dict)
    """What the columns of the training rows are called in validation_path: {query: question, response: answer}."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows set aside when there is no validation split."""
    text_columns: tuple[str, ...] | None = None
    """One or two columns of text, or several for sentence similarity; detected by default."""
    choice_columns: tuple[str, ...] | None = None
    """Multiple choice: a column for each ending, or one that holds them all; detected by default."""
    label_column: str | None = None
    """The target's column; detected by default."""
    missing_label: int | float | str | None = None
    """What stands in label_column, which must be named, where a row has no label: -1 in GLUE's test splits."""
    stride: int | None = Field(default=None, ge=0)
    """Question answering: tokens that neighbouring windows of a long context share; 128 by default."""
    image_column: str | None = None
    """The column of images, encoded or as paths; detected by default."""
    audio_column: str | None = None
    """The column of recordings, encoded or as paths; detected by default."""
    contained: bool = False
    """Refuse rows whose image or recording is a path that leads out of the data's folder, itself or through a link."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Longest recording; longer ones are cut. 10 by default."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width of what the model gets, in pixels; the image processor's own by default."""
    augment: str | None = None
    """Augmentation of training images: none (default), flip or crop-flip."""
    system: str | None = None
    """Language models: the system turn of conversations that have none."""
    prefix: str | None = None
    """Text to text: put before every source text, such as "summarize: "."""
    max_target_length: int | None = Field(default=None, ge=2)
    """Text to text: longest target, and longest text that is written when scoring, in tokens; 128 by default."""
    packing: bool | None = None
    """Language models: put several training rows into one sequence, blind to each other."""
    max_length: int | None = Field(default=None, ge=4)
    """Longest sequence in tokens; longer rows are truncated and counted. The model's own limit, at most 512, by
    default."""
    blank_text: Literal["drop", "keep"] = "drop"
    """Training rows whose text is blank; rows of other splits are always kept, so that every row is scored."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Train on a seeded random subset of this many rows."""
    streaming: bool = False
    """Read training rows while they are learned from, for data larger than memory or disk; needs train.max_steps, and
    a validation split or file. Columns, classes and lengths are those of the first 1,000 rows."""
    shuffle_buffer: int = Field(default=4096, gt=0)
    """Streaming: rows of each process that are read, shuffled and sorted by length together."""
    max_eval_rows: int | None = Field(default=None, gt=0)
    """Streaming: rows of every split that is scored, its first ones; 10,000 by default."""
    add_tokens: tuple[typing.Annotated[str, Field(min_length=1, pattern=r"^\S+$")], ...] = ()
    """Texts that the tokenizer takes as one token each: ["<user>", GATA4]. Their embeddings alone are trained of the
    model's, at train.head_lr, saved with the adapter and merged."""


Parts = typing.Annotated[int, Field(ge=2)]
Sizes = typing.Annotated[tuple[typing.Annotated[int, Field(ge=1)], ...], Field(min_length=2)]


Block = typing.Annotated[int, Field(ge=0)] | typing.Annotated[str, Field(pattern=r"^last [1-9][0-9]*$")]


class Interleaved(_Section):
    """A fused layer whose parts follow each other again and again."""

    parts: Parts | Sizes
    """Number of parts, or their sizes relative to each other."""
    repeat: int = Field(default=1, ge=1)
    """How often they follow each other, such as the number of heads."""


class AdapterSection(_Section):
    """What is trained."""

    method: str = "mirror"
    """Name of the method; docs/methods.md and docs/peft.md describe them."""
    rank: Literal["full", "out"] | typing.Annotated[int, Field(gt=0)] | None = None
    """Leading singular directions kept of each matrix: a number, full for min(out, in), or out for all outputs (of a
    rotation on the output side); r of a tuner of PEFT, and of the LoRA branch of speclora (whose number of scales is
    options.top_k); the method's own (full for rotations) by default."""
    pairing: str | list[typing.Any] | dict[str, typing.Any] | None = None
    """Which directions turn together: a name, pairs such as [[0, 5], [1, 7]], pairs by layer name or pattern, or a
    .json file of either; the method's own by default."""
    saliency: Literal["mean", "rms"] = "mean"
    """Adaptive pairing: gradient of the mean loss, or its root mean square over the calibration batches."""
    calibration_batches: int = Field(default=8, gt=0)
    """Adaptive pairing and lora-sb: batches over which gradients are measured."""
    calibration_warmup_steps: int = Field(default=60, ge=0)
    """Adaptive pairing and lora-sb: steps of the head alone before gradients are measured; the head is then put
    back."""
    target_modules: str = "all-linear"
    """Regular expression for the names of the layers to adapt, from any dot on; all-linear for all."""
    layers: tuple[Block, ...] | None = Field(default=None, min_length=1)
    """Blocks of the model whose layers are adapted, by number from 0 or as "last N": [0, 1, last 4]; all by default,
    with the layers outside of any block."""
    also_train: tuple[typing.Annotated[str, Field(min_length=1)], ...] = ()
    """Parameters of the base model that are trained as they are, beside the adapter: norms, biases, embeddings (every
    table), or regular expressions for the names of parameters or of modules, from any dot on: [pooler, norms]."""
    split: dict[str, Parts | Sizes | Interleaved] = Field(default_factory=dict)
    """Fused layers whose parts get bases of their own, by a regular expression for their names: {c_attn: 3},
    {qkv_proj: [4, 1, 1]}, or {query_key_value: {parts: 3, repeat: 12}} where each of 12 heads has its own three."""
    strategy: Literal["auto", "branch", "factored", "dense"] = "auto"
    """How adapted layers compute; auto takes the cheapest that a layer allows by counting products."""
    form: Literal["auto", "compact", "portable"] = "auto"
    """How the adapter is stored: compact (kilobytes; its basis is computed again, aligned and verified when it is
    loaded), portable (carries the factors, about the size of a LoRA of the same rank), or auto: compact, but portable
    where the basis cannot be computed again exactly, or where that takes minutes and the factors are small."""
    options: dict[str, typing.Any] = Field(default_factory=dict)
    """Options of the method's core, such as scale_top_k, or fields of the configuration of a tuner of PEFT."""


ClassWeight = typing.Annotated[float, Field(gt=0, le=1e6)]


class TrainSection(_Section):
    """The loop."""

    lr: float | None = Field(default=None, ge=0, lt=1e30)
    """Peak learning rate of the adapter; the method's own by default."""
    head_lr: float = Field(default=1e-3, ge=0, lt=1e30)
    """Peak learning rate of the task head."""
    also_train_lr: float = Field(default=1e-4, ge=0, lt=1e30)
    """Peak learning rate of what adapter.also_train chooses, without weight decay."""
    batch_size: int = Field(default=32, gt=0)
    """Rows per device and micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, gt=0, le=1_000_000)
    """Micro-batches per optimizer step."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps, or after epochs if that is earlier; raise epochs to train longer."""
    schedule: Literal["linear", "cosine", "constant", "cosine-restarts", "wsd", "inverse-sqrt"] = "linear"
    """Decay of the learning rates after warm-up: to zero at the last step, not at all (constant), in num_cycles
    cosines, in the last decay_ratio of the steps alone (wsd), or as 1 / sqrt(step)."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rates rise from zero."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of these steps, in place of warmup_ratio."""
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the peak to which schedules decay."""
    num_cycles: int = Field(default=2, ge=1)
    """cosine-restarts: how often the learning rates start again at their peak, the first time included."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """wsd: share of the steps in which the learning rates decay, at the end."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw-8bit", "schedule-free", "muon"] = "adamw"
    """What makes the steps: torch's AdamW or SGD, transformers' Adafactor, bitsandbytes' AdamW with moments in 8 bits,
    schedulefree's AdamW (with schedule constant), or torch's Muon for hidden matrices beside AdamW."""
    betas: tuple[typing.Annotated[float, Field(ge=0, lt=1)], typing.Annotated[float, Field(ge=0, lt=1)]] | None = None
    """Decay rates of the averages of gradients and of their squares, in every kind of AdamW; [0.9, 0.999] by
    default."""
    eps: float | None = Field(default=None, gt=0)
    """What is added to the denominator of every optimizer but sgd; 1e-8 by default, 1e-30 to adafactor's squares."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """Momentum of sgd (0.9 by default) and of the matrices of muon (0.95)."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Language models: strength of uniform noise on the embeddings in training (NEFTune; 5 to 15 in its paper); none by
    default."""
    weight_decay: float = Field(default=0.01, ge=0)
    """The optimizer's decay, on matrices only; adapters and biases have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the base model; auto is bf16 on GPUs that have it, fp16 (with gradient scaling) on other GPUs, and
    fp32 elsewhere."""
    compile: bool = False
    """Compile the model by torch.compile: the first steps take minutes, later ones may be faster, by what depends on
    model and machine. Results differ in rounding."""
    gradient_checkpointing: bool = False
    """Keep the inputs of the model's blocks alone for the backward pass, and compute the rest again: less memory, about
    a third more time."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the head, the order of rows, dropout, the validation rows and random pairs."""
    eval_every_steps: int | None = Field(default=None, gt=0)
    """Evaluate every so many optimizer steps; at the end of every epoch by default."""
    save_every_steps: int | None = Field(default=None, gt=0)
    """Checkpoint every so many optimizer steps; at the end of every epoch by default."""
    keep: int = Field(default=1, gt=0)
    """Last checkpoints kept; the best is kept besides."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many evaluations in a row that were no better than the best; never by default."""
    log_every_steps: int = Field(default=10, gt=0)
    """Optimizer steps between two lines of the log."""
    track: Literal["tensorboard", "wandb", "mlflow", "trackio"] | None = None
    """Experiment tracker that also receives every number of the log; none by default."""
    num_workers: int = Field(default=1, ge=0, le=64)
    """Threads that make batches ahead of the loop; 0 makes each when it is needed. No result depends on it."""
    class_weights: Literal["balanced"] | dict[str, ClassWeight] | None = None
    """Factor of each class in the training loss, such as {spam: 5}, 1 for classes that are not named; balanced gives
    all classes the same part. Evaluation has no weights."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Classification: share of each target that is spread evenly over all classes in the training loss."""
    balance: bool = False
    """Draw as many training rows of each class: an epoch has as many rows as before, those of rare classes several
    times and only some of frequent ones."""


class EvalSection(_Section):
    """Evaluation."""

    batch_size: int | None = Field(default=None, gt=0)
    """Rows per device. By default 64, or train.batch_size for kinds that score a whole vocabulary at every position;
    fewer where rows are longer than the training rows, or where they would take more memory than a training step."""
    before: bool | Literal["auto"] = "auto"
    """Score the validation rows before the first step too; auto: where that takes under a tenth of the run."""
    protocol: Literal["dev-best", "split-dev"] = "dev-best"
    """dev-best chooses the best checkpoint and reports it on the same validation rows; split-dev cuts them in half,
    always in the same way, chooses on one half and reports on the other."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """With task.answer: longest answer that is generated, in tokens; 256 by default."""
    max_rows: int | None = Field(default=None, gt=0)
    """Score this many of the validation rows at each evaluation of a run, a seeded random subset (of a stream, of the
    rows that data.max_eval_rows leaves); all by default. `eval` scores all."""
    samples: int | None = Field(default=None, ge=0, le=64)
    """Kinds that write text: validation prompts that are answered at each evaluation of a run, always the same ones;
    3 by default, none in `compare`."""
    report_splits: tuple[str, ...] = ()
    """Labelled splits that score the kept checkpoint once training is over, such as test."""
    prediction_labels: Literal["names", "indices"] = "names"
    """What `eval --predictions` writes of a class: its name, or its index."""
    prediction_bounds: tuple[float, float] | None = None
    """Numbers between which `eval --predictions` brings those that it writes."""
    prediction_files: dict[str, typing.Annotated[str, AfterValidator(_plain_name)]] = Field(default_factory=dict)
    """Plain names of the files that `eval --predictions FOLDER` writes, by the data set's own names for its splits;
    SPLIT.tsv for others."""


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
