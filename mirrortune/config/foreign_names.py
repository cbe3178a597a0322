# SPDX-License-Identifier: Apache-2.0
"""Names of settings in other tools, and what they are called here.

The names are those of transformers' ``TrainingArguments`` and scripts, PEFT's ``LoraConfig``, TRL, axolotl,
LLaMA-Factory and unsloth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Dotted keys of the recipe -> the names that other tools have for them.
_OURS: Mapping[str, str] = {
    "model.name": "model_name_or_path base_model model_name model_id pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype",
    "model.load_in": "quantization quantization_bit",
    "model.attention": "attn_implementation flash_attn flash_attention use_flash_attention_2",
    "task.kind": "task_name finetuning_task stage",
    "task.selection_metric": "metric_for_best_model early_stopping_metric",
    "data.path": "dataset datasets dataset_name dataset_path train_file train_data",
    "data.config": "dataset_config dataset_config_name",
    "data.validation_path": "validation_file eval_dataset eval_file test_datasets",
    "data.validation_fraction": "val_size val_set_size test_size validation_split_percentage",
    "data.text_columns": "dataset_text_field text_field text_column_name",
    "data.label_column": "label_column_name",
    "data.image_column": "image_column_name",
    "data.audio_column": "audio_column_name",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len block_size max_source_length max_length",
    "data.packing": "sample_packing",
    "data.max_train_rows": "max_samples max_train_samples",
    "data.prefix": "source_prefix",
    "eval.max_rows": "max_eval_samples",
    "eval.batch_size": "per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size",
    "adapter.method": "peft_type finetuning_type",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.target_modules": "lora_target lora_target_modules lora_target_linear",
    "adapter.layers": "layers_to_transform peft_layers_to_transform",
    "adapter.also_train": "modules_to_save lora_modules_to_save additional_target",
    "adapter.options.lora_alpha": "lora_alpha",
    "adapter.options.lora_dropout": "lora_dropout",
    "adapter.options.use_rslora": "use_rslora",
    "train.lr": "learning_rate",
    "train.batch_size": "per_device_train_batch_size per_gpu_train_batch_size train_batch_size micro_batch_size",
    "train.epochs": "num_train_epochs num_epochs n_epochs",
    "train.max_steps": "max_train_steps num_train_steps",
    "train.schedule": "lr_scheduler_type lr_scheduler",
    "train.warmup_steps": "num_warmup_steps",
    "train.min_lr_ratio": "cosine_min_lr_ratio",
    "train.optimizer": "optim",
    "train.betas": "adam_beta1 adam_beta2",
    "train.eps": "adam_epsilon",
    "train.max_grad_norm": "gradient_clipping",
    "train.precision": "mixed_precision",
    "train.compile": "torch_compile",
    "train.eval_every_steps": "eval_steps",
    "train.save_every_steps": "save_steps",
    "train.log_every_steps": "logging_steps",
    "train.keep": "save_total_limit",
    "train.patience": "early_stopping_patience",
    "train.track": "report_to",
    "train.num_workers": "dataloader_num_workers",
    "train.label_smoothing": "label_smoothing_factor",
    "train.neftune_alpha": "neftune_noise_alpha",
    "train.seed": "data_seed random_state",
    "output_dir": "output_dir run_name save_dir",
}
_OURS_BY_NAME = {name: key for key, names in _OURS.items() for name in names.split()}

_BY_STEPS = "Remove it: this is done at the end of every epoch, or at intervals of {}"
_IN_STEPS = "Use {}, a number of steps"
_ADVICE = {
    "evaluation_strategy": _BY_STEPS.format("train.eval_every_steps"),
    "eval_strategy": _BY_STEPS.format("train.eval_every_steps"),
    "save_strategy": _BY_STEPS.format("train.save_every_steps"),
    "evals_per_epoch": _IN_STEPS.format("train.eval_every_steps"),
    "saves_per_epoch": _IN_STEPS.format("train.save_every_steps"),
    "wandb_project": "Use train.track=wandb",
    "logging_strategy": "Remove it: train.log_every_steps is the interval",
    "load_best_model_at_end": "Remove it: the adapter of the best checkpoint is always the result",
    "greater_is_better": "Remove it: the direction of each metric is known",
    "group_by_length": "Remove it: batches are always made of rows of similar length",
    "resume_from_checkpoint": "Use --resume",
    "overwrite_output_dir": "Use --overwrite",
    "do_train": "Remove it: the command train does this",
    "do_eval": "Remove it: the command eval does this",
    "do_predict": "Remove it: the command predict does this",
    "push_to_hub": "Use the command push after training",
    "deepspeed": "Use --accelerate-config zero2 or zero3",
    "fsdp": "Use --accelerate-config fsdp2",
    "template": "Remove it: the chat template is that of the tokenizer",
    "train_on_inputs": "Use task.loss_on=all for true, completions for false",
    "load_in_8bit": "Use model.load_in=8bit, or remove it if false",
    "load_in_4bit": "Use model.load_in=4bit, or remove it if false",
    "use_dora": "Use adapter.method=dora, or remove it if false",
    "bf16": "Use train.precision=bf16, or remove it if false",
    "fp16": "Use train.precision=fp16, or remove it if false",
}


def key_of(name: str) -> str | None:
    """Return the dotted key of a setting that another tool calls ``name``, or that is written in the wrong section."""
    from mirrortune.config.schema import Recipe  # noqa: PLC0415  (it is slow to import, and only needed after errors)

    sections: dict[str, Any] = {section: field.annotation for section, field in Recipe.model_fields.items()}
    own = (f"{section}.{name}" for section, kind in sections.items() if name in getattr(kind, "model_fields", ()))
    return _OURS_BY_NAME.get(name) or next(own, None)


def advice_on(name: str) -> str | None:
    """Return what to do about a setting of another tool that has no counterpart of its kind here."""
    return _ADVICE.get(name)
