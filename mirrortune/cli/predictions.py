# SPDX-License-Identifier: Apache-2.0
"""Define the command ``predict``."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mirrortune.cli.flags import NOT_FOR_EVAL, Debug, Json, Quiet, Verbose, with_recipe_flags
from mirrortune.errors import ConfigError, counted
from mirrortune.system.console import Reporter
from mirrortune.system.paths import local_path

if TYPE_CHECKING:
    from mirrortune.config.recipe import Layer, Resolved
    from mirrortune.inference.bank_answers import BankRequest
    from mirrortune.runs.checks import DataSettings

_STDIN = "-"
_OF_DATA = ("config", "revision", "streaming", "max_eval_rows", "contained", "missing_label")
"""Settings that a recipe makes for its own data and that are not valid for other data."""


@with_recipe_flags("output_dir", "train.seed", *NOT_FOR_EVAL)
def predict(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Run directory, adapter folder, merged folder or any model.", show_default=False)],
    words: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY.SUB=VALUE]...", help="A shipped recipe or YAML file, and settings that override it.", show_default=False)] = None, *,
    task: Annotated[str | None, typer.Option("-t", "--task", metavar="TEXT", help="For a plain model: a shipped task (glue/sst2) or a kind (text-classification, ...).", rich_help_panel="Model and data", show_default=False)] = None,
    text: Annotated[list[str] | None, typer.Option("--text", metavar="TEXT", help="One row instead of --data; give it twice for a pair.", show_default=False)] = None,
    image: Annotated[str | None, typer.Option("--image", metavar="FILE", help="One image (or recording) instead of --data.", show_default=False)] = None,
    bank: Annotated[str | None, typer.Option("--bank", metavar="PATH", show_default=False, help="Adapters for the rows, with TARGET as their base: a saved bank, or a folder of adapters.")] = None,
    adapter_column: Annotated[str | None, typer.Option("--adapter-column", metavar="TEXT", show_default=False, help="Column with the name of each row's adapter in the bank.")] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="TEXT", show_default=False, help="One split of the data, by the data set's own name or train, validation, test; all by default.")] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", show_default=False, help="Output file: .csv, .tsv, .jsonl or .parquet; standard output by default.")] = None,
    format: Annotated[Literal["csv", "tsv", "jsonl"] | None, typer.Option("--format", show_default=False, help="Format of standard output; csv by default.")] = None,
    top: Annotated[int | None, typer.Option("--top", metavar="N", show_default=False, help="Number of predictions per row, best first; 1 by default.")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", metavar="X", show_default=False, help="With several labels per row: probability above which a label is predicted; 0.5 by default.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", metavar="N", show_default=False, help="Maximum length of a generated text, in tokens; by default 256 for causal-lm, data.max_target_length for seq2seq.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", metavar="X", show_default=False, help="Sample texts at this temperature; greedy by default.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", metavar="X", show_default=False, help="Nucleus sampling: sample from the most probable tokens whose total probability is this.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of sampling.")] = 0,
    on_error: Annotated[Literal["stop", "skip"], typer.Option("--on-error", help="What to do with an unreadable row: stop, or skip it and write the reason to the column error.")] = "stop",
    batch_size: Annotated[str | None, typer.Option("--batch-size", metavar="N", show_default=False, help="Rows per device.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted command after the last finished rows of that file.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier predictions in that file.")] = False,
    num_processes: Annotated[int | None, typer.Option("--num-processes", min=1, metavar="N", rich_help_panel="Processes", show_default=False, help="Processes on this machine that share the rows.")] = None,
    force_base: Annotated[bool, typer.Option("--force-base", rich_help_panel="Dangerous options", help="Use an adapter on a base (--model) whose weights differ from those it was trained on.")] = False,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False, **given: Any,
) -> None:  # fmt: skip
    """Predict every row of a table, a folder or standard input, and write the rows with their predictions.

    mirrortune predict runs/sst2-roberta-base-mirror-scale --data rows.csv -o answers.csv
    """
    from mirrortune.cli.app import _describe_data, _launch_if_asked, _recipe_of, _resolve  # noqa: PLC0415  (it registers this command)

    if json and output in (None, _STDIN):
        raise ConfigError("--json", "answers go to standard output", fix="Name a file with -o, or use --format jsonl")
    reporter = Reporter(verbosity=-1 if quiet else int(verbose), as_json=json)
    own = _recipe_of(target, reporter)
    asked = {**given, "eval__batch_size": batch_size}
    resolved, _ = _resolve(words, task, asked, reporter, beneath=own, has_target=True)
    _check_rows(resolved, own, text, image, split)
    if own and split is not None and (described := _describe_data(resolved, own)):
        reporter.note(described)
    _launch_if_asked(num_processes, None)
    from mirrortune.inference import predict as predicting  # noqa: PLC0415
    from mirrortune.tasks.predicting import PredictOptions  # noqa: PLC0415

    file = None if output in (None, _STDIN) else local_path(str(output))
    result = predicting.predict(
        target,
        reporter=reporter,
        output=predicting.Output(
            file=file, format=format, skips_errors=on_error == "skip", resume=resume, overwrite=overwrite
        ),
        options=PredictOptions(
            top=top, threshold=threshold, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        ),
        split=split, force_base=force_base, bank=_bank(bank, adapter_column, has_data=text is None and image is None),
        **_rows([target, *([] if bank is None else [bank])], resolved, own, text, image),
    )  # fmt: skip
    _print(result, reporter, has_file=file is not None)


def _print(result: Any, reporter: Reporter, *, has_file: bool) -> None:
    missing = f"{counted(result.errors, 'row')} without a prediction: see column error" if result.errors else ""
    if has_file:
        said = f"{counted(result.rows, 'row')} predicted: {shlex.quote(result.output)}"
        reporter.result(asdict(result), [said, *filter(None, [missing])])
    elif missing:
        reporter.note(missing)


def _rows(
    targets: list[str], resolved: Resolved, own: Layer | None, text: list[str] | None, image: str | None
) -> dict[str, Any]:
    """Return the arguments of ``predict`` that determine which rows are read."""
    from mirrortune.cli.app import _is_own_data  # noqa: PLC0415
    from mirrortune.inference.prediction_rows import RowRequest  # noqa: PLC0415
    from mirrortune.merging import bases  # noqa: PLC0415
    from mirrortune.runs.checks import inputs_of, unpack_for_eval  # noqa: PLC0415

    settings = unpack_for_eval(resolved.recipe)
    columns = [key.partition(".")[2] for key in resolved.origins if key.endswith(("_column", "_columns"))]
    return {
        "is_own_data": _is_own_data(resolved, own) if text is None and image is None else False,
        "settings": replace(settings, data=_data_settings(settings.data, resolved, own)),
        "row": None if text is None and image is None else RowRequest(texts=tuple(text or ()), image=image),
        "named": [n for n in columns if _is_named(resolved, own, f"data.{n}") and n != "label_column"],
        "inputs": [*inputs_of(resolved), *bases.inputs_of_targets(*targets)],
    }


def _bank(path: str | None, column: str | None, *, has_data: bool) -> BankRequest | None:
    """Return the requested bank, or None; raise ConfigError for one of the two flags alone, or without a table."""
    from mirrortune.inference.bank_answers import BankRequest  # noqa: PLC0415

    if path is None and column is None:
        return None
    if path is None or column is None:
        given, missing = ("--bank", "--adapter-column")[:: 1 if column is None else -1]
        raise ConfigError(given, f"it needs {missing}", fix=f"Give {missing}, or remove {given}")
    if not has_data:
        raise ConfigError("--bank", "a row of the command line has no column of adapters", fix="Give rows with --data")
    return BankRequest(path=local_path(path), column=column)


def _check_rows(
    resolved: Resolved, own: Layer | None, text: list[str] | None, image: str | None, split: str | None
) -> None:
    """Raise ConfigError for a command that names no rows, or names them twice."""
    named = _is_named(resolved, own, "data.path")
    places = {"--data": named or None, "--text": text or None, "--image": image, "--split": split}
    given = [flag for flag, value in places.items() if value is not None]
    if not given:
        raise ConfigError(
            "--data", "no rows are named",
            allowed="--data FILE, --data - for standard input, --text TEXT, --image FILE",
            fix="For the data that the run was trained on, name a split of it with --split",
        )  # fmt: skip
    if len(given) > 1 and given != ["--data", "--split"]:
        raise ConfigError(", ".join(given), "rows are named more than once", fix="Keep one of them")


def _data_settings(settings: DataSettings, resolved: Resolved, own: Layer | None) -> DataSettings:
    """Return the data settings without those that the target's recipe makes for its own data."""
    if not _is_named(resolved, own, "data.path"):
        return settings
    from mirrortune.config.schema import DataSection  # noqa: PLC0415

    default = DataSection()
    foreign = [key for key in _OF_DATA if not _is_named(resolved, own, f"data.{key}")]
    return replace(settings, **{key: getattr(default, key) for key in foreign})


def _is_named(resolved: Resolved, own: Layer | None, key: str) -> bool:
    """Return whether a setting comes from the user rather than from the recipe inside the target."""
    origin = resolved.origins.get(key)
    return origin is not None and not (own is not None and origin.startswith(f"{own.origin}:"))
