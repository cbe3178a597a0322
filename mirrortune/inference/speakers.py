# SPDX-License-Identifier: Apache-2.0
"""Load a language model for a conversation: a run, an adapter, a merged folder or a plain model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.find import adapter_to_score
from mirrortune.config.schema import Recipe
from mirrortune.data.dataset import DataSet
from mirrortune.errors import ConfigError, unknown_name
from mirrortune.inference.chat import Form, Speaker
from mirrortune.models.load import (
    describe_widening,
    load_model,
    load_tokenizer,
    pad_token_id,
    resolve_dtype,
    with_end_token,
)
from mirrortune.runs.checks import EvaluationSettings, unpack_for_eval
from mirrortune.runs.target import find_named, load_evaluable
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device
from mirrortune.system.distributed.processes import make_accelerator
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.tasks.base import task_to_dict
from mirrortune.tasks.chat import has_template

_KIND = "causal-lm"
_SAID = {
    "chat": "turns are written by the model's chat template",
    "prompt": "turns are written as prompts and completions, as in training",
    "alpaca": "turns are written in the format of Stanford Alpaca, as in training",
    "text": "turns are not marked: the model continues your text",
}
_FORMATS = ("auto", "chat", "text")


def load_speaker(target: str, recipe: Recipe, reporter: Reporter) -> Speaker:
    """Load the target of ``chat``.

    Args:
        target: folder, or ``owner/name@revision:subfolder`` on the Hub.
        recipe: recipe of the target, overridden by flags; for a merged folder, its data settings determine the format
            of turns.
        reporter: prints notes.

    Raises:
        ConfigError: the target is not a causal language model.
    """
    settings = unpack_for_eval(recipe)
    accelerator = make_accelerator(settings.model.precision)
    adapter = adapter_to_score(target)
    if adapter is None:
        speaker = _plain(target, recipe, settings, reporter)
    else:
        speaker = _trained(target, adapter, settings, reporter)
    reporter.note(_SAID[speaker.form], level=int(speaker.form == "chat"))
    speaker.model.to(accelerator.device).eval()
    return replace(speaker, context=Sharding.of(accelerator).autocast)


def _trained(target: str, folder: Path, settings: EvaluationSettings, reporter: Reporter) -> Speaker:
    """Load a run or an adapter; turns are formatted as in its training."""
    task = read_adapter(folder).task
    if task is not None and task.get("kind") != _KIND:
        raise _no_language_model(target, str(task.get("kind")))
    request = replace(settings.task, kind=None, given={})
    found = load_evaluable(target, folder, replace(settings, task=request), DataSet(splits={}))
    for note in found.notes:
        reporter.note(note)
    reader, told = found.processor, task_to_dict(found.task)
    wanted = _wanted(settings.task.given["format"], has_template=has_template(reader.tokenizer))
    is_chat = reader.is_chat if wanted in ("auto", told["format"]) else wanted == "chat"
    layout: Form = told["layout"] if told["layout"] in ("prompt", "alpaca") else "text"
    system = str(told.get("system", "")) if is_chat else ""
    return Speaker(model=found.model, tokenizer=reader.tokenizer, form="chat" if is_chat else layout, system=system)


def _no_language_model(target: str, kind: str) -> ConfigError:
    fix = "Score it with mirrortune eval"
    return ConfigError(target, f"it was trained for {kind} and cannot answer messages", allowed=_KIND, fix=fix)


def _wanted(format: str | None, *, has_template: bool) -> str:
    """Check ``task.format`` and return it, or ``auto`` by default."""
    if format not in (None, *_FORMATS):
        raise unknown_name("task.format", "value", format, _FORMATS)
    if format == "chat" and not has_template:
        raise ConfigError("task.format", "the tokenizer has no chat template", fix="Remove it")
    return format or "auto"


def _plain(target: str, recipe: Recipe, settings: EvaluationSettings, reporter: Reporter) -> Speaker:
    """Load a merged folder or a plain model."""
    request = settings.model
    source = find_named(target, request)
    if recipe.task.kind not in (None, _KIND):
        raise _no_language_model(target, recipe.task.kind)
    if any(name.endswith("ForMaskedLM") for name in getattr(source.config, "architectures", None) or ()):
        raise ConfigError(
            target, "it fills in masked words and does not generate text", allowed="a causal language model"
        )
    tokenizer = load_tokenizer(source)
    form = _form(recipe, has_template=has_template(tokenizer))
    if form == "chat" and recipe.task.format is None and recipe.data.path is not None:
        reporter.note(f"{_SAID['chat']}; if it was trained on prompts as plain text, set task.format=text")
    device = default_device()
    loaded = load_model(source, "AutoModelForCausalLM", {}, resolve_dtype(request.dtype, source.config, device),
                        pad_token_id(tokenizer))  # fmt: skip
    if loaded.new_parameters:
        missing = ", ".join(loaded.new_parameters[:3])
        raise ConfigError(target, f"it has no trained head that writes text ({missing} are missing)",
                          allowed="a causal language model")  # fmt: skip
    if said := describe_widening(request.dtype, source.config, device):
        reporter.note(said)
    return Speaker(model=loaded.model, tokenizer=with_end_token(tokenizer, source), form=form,
                   system=recipe.data.system or "" if form == "chat" else "")  # fmt: skip


def _form(recipe: Recipe, *, has_template: bool) -> Form:
    """Choose the format of turns for a model that does not record it, by its recipe if it has one."""
    wanted = _wanted(recipe.task.format, has_template=has_template)
    texts = () if recipe.data.label_column is None else recipe.data.text_columns or ()
    if wanted == "chat" or (wanted == "auto" and has_template and len(texts) != 1):
        return "chat"
    if len(texts) == 2:
        return "alpaca"
    # Columns that were detected are not in the recipe; most text data has prompts.
    return "prompt" if texts or recipe.data.path is not None else "text"
