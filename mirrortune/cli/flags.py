# SPDX-License-Identifier: Apache-2.0
"""Define the flags that set values of the recipe, and the flags that every command has.

The former are one table, from which the signatures of commands and the top layer of the recipe are made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand
from typing_extensions import override

from mirrortune.adapters.methods import method_names
from mirrortune.config import strict_yaml
from mirrortune.config.foreign_names import advice_on, key_of
from mirrortune.errors import ConfigError
from mirrortune.system.console import Reporter

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Results and errors only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Details, such as all settings and their origins.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


_MAY_BE_EMPTY = ("system",)  # no system prompt
# Flags that share their name with a setting of another meaning.
_NOT_SETTINGS = {
    "config": "Give the recipe without a flag",
    "split": "Write data.train_split=NAME or data.validation_split=NAME",
}


class OnceEach(TyperCommand):
    """A command that rejects a repeated flag that takes one value, of which click would silently use the last one.

    It also rejects an empty value, for which many flags would silently take their default, and names what replaces a
    flag of another tool.
    """

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        _report(self._foreign(args))
        parsed: Any = self.make_parser(ctx).parse_args(list(args))
        values, _, order = parsed
        _report(_empty(values, order))
        one_value = [p for p in order if p.param_type_name == "option" and not (p.multiple or p.is_flag or p.count)]
        errors = []
        for param in dict.fromkeys(one_value):
            if (count := one_value.count(param)) > 1:
                names = ", ".join(param.opts)
                errors.append(ConfigError(names, f"given {count} times, but takes one value", fix="Keep one of them"))
        _report(errors)
        return super().parse_args(ctx, args)

    def _foreign(self, args: Sequence[str]) -> list[ConfigError]:
        """Return an error for each flag that another tool has under a name of its own, or that is only a setting."""
        own = {name for param in self.params for name in param.opts}
        given = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
        unknown = sorted(flag for flag in given if flag.replace("_", "-") not in own)
        found = [(flag, self._meant(flag[2:].replace("-", "_"), own)) for flag in unknown]
        return [ConfigError(flag, "no such option", fix=fix) for flag, fix in found if fix is not None]

    def _meant(self, name: str, own: set[str]) -> str | None:
        """Return what to write in place of the flag ``name``, or None."""
        key, has_settings = key_of(name), any(param.name == "words" for param in self.params)
        flag = "--task" if key == "task.kind" else next((f.names[0] for f in FLAGS if f.key == key), None)
        if flag in own:
            return f"Use {flag}"
        advice = advice_on(name)
        if not has_settings:
            return None if advice and "." in advice else advice  # it names a setting
        of_training = ("train.", "adapter.", "output_dir", "data.max_train_rows")
        has_effect = key is not None and ("--lr" in own or not key.startswith(of_training))
        return _NOT_SETTINGS.get(name) or advice or (f"Write {key}=VALUE" if has_effect else None)


def _empty(values: Mapping[str, Any], given: Sequence[Any]) -> list[ConfigError]:
    """Return an error for each of the parameters ``given`` with an empty text, such as that of an unset variable."""
    texts = {param: values.get(param.name) for param in given if param.name not in _MAY_BE_EMPTY}
    empty = [param for param, text in texts.items() if text == "" or (isinstance(text, list | tuple) and "" in text)]
    places = [", ".join(param.opts) if param.param_type_name == "option" else "arguments" for param in empty]
    return [ConfigError(where, "got an empty text", fix="Give a value, or leave it out") for where in places]


def _report(errors: Sequence[ConfigError]) -> None:
    """Print the errors, if there are any, and end the command."""
    if errors:
        Reporter().error(str(ConfigError.several(errors)))
        raise typer.Exit(ConfigError.exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A command-line flag for a key of the recipe.

    Attributes:
        names: spellings, of which the first is shown in messages.
        key: dotted key of the recipe.
        kind: Python type of the value, or ``"yaml"`` for a value of several types.
        help: help text of one line.
        panel: heading in ``--help``.
    """

    names: tuple[str, ...]
    key: str
    kind: Any
    help: str
    panel: str

    @property
    def parameter(self) -> str:
        """Name of the parameter of the function that implements a command."""
        return self.key.replace(".", "__")


def _flag(panel: str, names: str, key: str, kind: Any, help: str) -> Flag:
    return Flag(names=tuple(names.split()), key=key, kind=kind, help=help, panel=panel)


_DATA, _ADAPTER, _LOOP, _DANGER = "Model and data", "Adapter", "Training", "Dangerous options"
FLAGS: tuple[Flag, ...] = (
    _flag(_DATA, "--model -m", "model.name", str, "Hub id or local folder of the base model."),
    _flag(_DATA, "--revision", "model.revision", str, "Branch, tag or commit of a Hub model."),
    _flag(_DATA, "--load-in", "model.load_in", str, "Quantise the base weights while loading: 8bit or 4bit."),
    _flag(_DATA, "--data -d", "data.path", list[str], "csv, tsv, json, jsonl or parquet file, folder with train/validation/test files or class folders of images or recordings, or Hub id; repeat to mix several."),
    _flag(_DATA, "--text-column", "data.text_columns", list[str], "Text column; repeat for pairs. Detected by default."),
    _flag(_DATA, "--label-column", "data.label_column", str, "Label column. Detected by default."),
    _flag(_DATA, "--image-column", "data.image_column", str, "Column of images, encoded or as paths. Detected by default."),
    _flag(_DATA, "--audio-column", "data.audio_column", str, "Column of recordings, encoded or as paths. Detected by default."),
    _flag(_DATA, "--max-length", "data.max_length", int, "Maximum sequence length in tokens; longer rows are truncated and counted."),
    _flag(_ADAPTER, "--method", "adapter.method", str, f"{', '.join(method_names(with_peft=False))}, or a tuner of PEFT such as lora, dora, oft, road (see docs/peft.md); mirror-scale by default."),
    _flag(_ADAPTER, "--rank", "adapter.rank", "yaml", "Leading singular directions kept: full (min of out and in), out or a number; r of a tuner of PEFT and of the LoRA branch of speclora."),
    _flag(_ADAPTER, "--pairing", "adapter.pairing", str, "Directions that rotate together: mirror, neighbor, random or adaptive, or a .json file of pairs."),
    _flag(_ADAPTER, "--target-modules", "adapter.target_modules", str, "Regular expression for layer names, all-linear or all-layers."),
    _flag(_LOOP, "--lr --learning-rate", "train.lr", float, "Peak learning rate of the adapter."),
    _flag(_LOOP, "--head-lr", "train.head_lr", float, "Peak learning rate of the task head."),
    _flag(_LOOP, "--batch-size", "train.batch_size", int, "Rows per device."),
    _flag(_LOOP, "--gradient-accumulation-steps", "train.gradient_accumulation_steps", int, "Batches per optimizer step."),
    _flag(_LOOP, "--epochs", "train.epochs", float, "Passes over the training rows."),
    _flag(_LOOP, "--max-steps", "train.max_steps", int, "Stop after this many optimizer steps."),
    _flag(_LOOP, "--patience", "train.patience", int, "Stop after this many evaluations without improvement."),
    _flag(_LOOP, "--keep", "train.keep", int, "Number of most recent checkpoints to keep, besides the best."),
    _flag(_LOOP, "--seed", "train.seed", int, "Random seed."),
    _flag(_LOOP, "--precision", "train.precision", str, "auto, fp32, bf16, or fp16 with gradient scaling; auto is bf16, or fp16 on GPUs without it."),
    _flag(_LOOP, "--optimizer", "train.optimizer", str, "adamw, sgd, adafactor, adamw-8bit, schedule-free or muon; adamw by default."),
    _flag(_LOOP, "--schedule", "train.schedule", str, "linear (default), cosine, constant, cosine-restarts, wsd or inverse-sqrt."),
    _flag(_LOOP, "--warmup-steps", "train.warmup_steps", int, "Number of warm-up steps; a tenth of all steps by default."),
    _flag(_LOOP, "--compile", "train.compile", bool, "Compile the model; worthwhile in long runs."),
    _flag(_LOOP, "--class-weights", "train.class_weights", "yaml", "Class weights in the loss: balanced, or {NAME: WEIGHT}."),
    _flag(_LOOP, "--track", "train.track", str, "Also log to a tracker: tensorboard, wandb, mlflow or trackio."),
    _flag(_LOOP, "--output-dir -o", "output_dir", str, "Run directory; runs/TASK-MODEL-METHOD by default."),
    _flag(_DANGER, "--trust-remote-code", "model.trust_remote_code", bool, "Run Python code from the model's repository."),
)  # fmt: skip


# Flags of training that also affect scoring; offering the others there would mislead.
_KEPT = ("train.seed", "train.precision")
_EVAL_BATCH = _flag(_LOOP, "--batch-size", "eval.batch_size", int, "Rows per device.")
NOT_FOR_EVAL = tuple(f.key for f in FLAGS if f.key.startswith(("adapter.", "train.")) and f.key not in _KEPT)


_READ_OF_TRAIN = (*_KEPT, "train.batch_size", "train.num_workers")


OF_EACH_RUN = {
    "output_dir": "Use -o", "adapter.method": "Use --methods", "train.seed": "Use --seeds",
    "train.lr": "Use --lr-grid, or --methods NAME:lr=X/Y for one method",
}  # fmt: skip
"""Settings that ``compare`` makes for each of its runs, and what to give instead."""


def refuse_training_only(words: Sequence[str], origins: Mapping[str, str]) -> None:
    """Raise ConfigError for settings on the command line that have no effect, because the command trains nothing.

    Args:
        words: settings, as typed.
        origins: where each setting was set, by dotted key.
    """
    keys = [
        key for key in origins if key.startswith(("train.", "adapter.", "output_dir")) and key not in _READ_OF_TRAIN
    ]
    problem = "it is a setting of training, and this command trains nothing"
    refuse_words(words, origins, problem, dict.fromkeys(keys, "Remove it"))


def refuse_words(words: Sequence[str], origins: Mapping[str, str], problem: str, fixes: Mapping[str, str]) -> None:
    """Raise ConfigError for settings on the command line that have no effect.

    Args:
        words: settings, as typed.
        origins: where each setting was set, by dotted key.
        problem: why they have none.
        fixes: what to do instead, by the dotted key of each of these settings.
    """
    typed = {f"'{word}'" for word in words}
    unused = [(origins[key], fix) for key, fix in fixes.items() if origins.get(key) in typed]
    if unused:
        raise ConfigError.several([ConfigError(word, problem, fix=fix) for word, fix in unused])


def with_recipe_flags(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces ``**given`` of a command by parameters for all flags but those in ``left_out``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command)
        hints = get_type_hints(command, include_extras=True)
        parameters = [
            p.replace(annotation=hints[p.name])
            for p in own.parameters.values()
            if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters += [_parameter(flag) for flag in FLAGS if flag.key not in left_out]
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return command

    return decorate


def given_flags(values: dict[str, Any], errors: list[ConfigError]) -> dict[str, tuple[str, Any]]:
    """Return (flag, value) by dotted key for the flags that were given; append errors for invalid YAML to ``errors``."""
    found: dict[str, tuple[str, Any]] = {}
    for flag in (*FLAGS, _EVAL_BATCH):
        value = values.get(flag.parameter)
        if value is None or value == [] or value is False:
            continue
        is_text = flag.kind in (str, list[str], bool)
        if flag.key == "data.path" and len(value) == 1:  # several are a mixture
            value = value[0]
        try:
            found[flag.key] = (flag.names[0], value if is_text else strict_yaml.parse_scalar(value, flag.names[0]))
        except ConfigError as error:
            errors.append(error)
    return found


def _parameter(flag: Flag) -> inspect.Parameter:
    # Numbers are parsed as in a recipe, so that --lr and train.lr= accept the same values.
    kind = str if flag.kind in ("yaml", int, float) else flag.kind
    several = "full|out|N" if flag.key == "adapter.rank" else "VALUE"
    metavar = {"yaml": several, str: "TEXT", list[str]: "TEXT", int: "N", float: "X"}.get(flag.kind)
    option = typer.Option(*flag.names, help=flag.help, metavar=metavar, rich_help_panel=flag.panel, show_default=False)
    return inspect.Parameter(
        flag.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if flag.kind is bool else None,
        annotation=Annotated[kind if flag.kind is bool else kind | None, option],
    )
