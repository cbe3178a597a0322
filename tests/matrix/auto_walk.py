# SPDX-License-Identifier: Apache-2.0
"""Auto classes of transformers through the Python interface, without a task and without a tokenizer or any other
processor beside the base: attach, save_adapter, load_adapter, merge_adapter, reopened by transformers alone.

    python -m tests.matrix.auto_walk --out FILE.json                every model type of every Auto class
    python -m tests.matrix.auto_walk --out FILE.json --each 3       three types of each class
    python -m tests.matrix.auto_walk --out FILE.json --page         what FILE.json holds, as auto_results.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.inject import adapter_parameters
from mirrortune.tasks.drawn_inputs import drawn_inputs, first_that_runs
from tests.matrix.configs import tiny_configs
from tests.matrix.walk import SECONDS, Failure, NotRunError, _first_line, _limit, _quiet, _random, relative_error

_LARGEST = 40_000_000  # numbers of a model that is still run here
PAGE = Path(__file__).parent / "auto_results.md"


def auto_classes() -> dict[str, dict[str, list[str]]]:
    """Auto class -> model type -> names of the classes that it gives."""
    import transformers

    found: dict[str, dict[str, list[str]]] = {}
    for name in [name for name in dir(transformers) if name.startswith("Auto")]:
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is None:
            continue
        for model_type, classes in mapping._model_mapping.items():
            found.setdefault(name, {})[model_type] = [classes] if isinstance(classes, str) else list(classes)
    return found


def build(auto: str, model_type: str) -> nn.Module:
    """The smallest random model of a type that its Auto class makes and that some drawn inputs run.

    Raises:
        NotRunError: if there is none, with the last reason.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    auto_class, reason = getattr(transformers, auto), ""
    try:
        for config in tiny_configs(CONFIG_MAPPING[model_type]):
            config.architectures = [auto_classes()[auto][model_type][0]]
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in auto_class.from_config(config).parameters())
                if size > _LARGEST:
                    reason = reason or f"too large to be run here ({size:,} numbers)"
                    continue
                model = _random(auto_class.from_config(config))
                found = _inputs(model)
            except Exception as error:  # noqa: BLE001  (whatever a model says; the next configuration may do)
                reason = _first_line(error)
                continue
            if not isinstance(found, str) and len(found[1]) and torch.isfinite(found[1]).any():
                return model
            reason = found if isinstance(found, str) else "its output is not finite"
    except Exception as error:  # noqa: BLE001
        reason = _first_line(error)
    raise NotRunError(reason)


def _inputs(model: Any) -> tuple[dict[str, Any], Tensor] | str:
    """The drawn inputs that a model runs, with its outputs; or why there are none."""
    return first_that_runs(drawn_inputs(type(model), model.config), lambda batch: every_output(model, batch))


@torch.no_grad()
def every_output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """All floating-point tensors of a model's first level of outputs, flat; what it masks is zero."""
    torch.manual_seed(0)
    output = model(**inputs)
    tensors = [value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()]
    tensors += [
        v for value in output.values() if isinstance(value, (list, tuple)) for v in value if isinstance(v, Tensor)
    ]
    flat = torch.cat([t.flatten().float() for t in tensors]) if tensors else torch.zeros(0)
    return flat.masked_fill(flat.abs() > 1e9, 0.0)


def check(auto: str, model_type: str, **options: Any) -> dict[str, Any]:
    """Walk one type by one Auto class; what was found, with ``status`` passed, failed, refused or not run."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            found = _live(build(auto, model_type), Path(folder), options)
        except NotRunError as error:
            found = {"status": "not run", "reason": str(error)}
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001  (the reason is the result)
            where = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
            found = {"status": "failed", "reason": where + _first_line(error)}
    return {**found, "seconds": round(time.process_time() - started, 1)}


def _live(model: nn.Module, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    base, adapter, merged = (folder / name for name in ("base", "adapter", "merged"))
    model_class: Any = type(model)

    def load(place: Path) -> nn.Module:
        found: nn.Module = model_class.from_pretrained(place)
        return found.eval()

    try:
        model.save_pretrained(base)  # type: ignore[operator]
        plain, again = load(base), load(base)
        found = _inputs(plain)
        if isinstance(found, str):
            raise NotRunError(found)
        inputs, before = found
        drift = relative_error(every_output(again, inputs), before)
    except Exception as error:
        raise NotRunError(f"transformers does not reopen its own checkpoint: {_first_line(error)}") from error
    if not drift <= 1e-5:
        raise NotRunError(f"two copies of the same checkpoint differ by {drift:.0e}")
    model = mirrortune.attach(plain, **options)
    with torch.no_grad():
        for index, parameter in enumerate(adapter_parameters(model).values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    after = every_output(model, inputs)
    # What is detected may be more or less than before.
    effect = relative_error(after, before) if after.shape == before.shape else 1.0
    mirrortune.save_adapter(model, adapter)
    loaded = mirrortune.load_adapter(load(base), adapter)
    if not (error := relative_error(every_output(loaded, inputs), after)) <= 1e-5:
        raise Failure(f"a loaded adapter differs by {error:.0e}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        verdict = mirrortune.merge_adapter(None, adapter, merged)
    error = relative_error(every_output(load(merged), inputs), after)
    if not error <= max(1e-4, 0.01 * effect):
        raise Failure(f"the merged model differs by {error:.0e} of an effect of {effect:.0e}")
    return {
        "status": "passed", "effect": float(f"{effect:.1e}"), "merge_error": float(f"{error:.1e}"),
        "compared": verdict["max_abs_logit_error"] is not None, "inputs": sorted(inputs),
        "notes": [str(w.message) for w in said if "mirrortune" in w.filename or "merg" in str(w.message)],
    }  # fmt: skip


def check_in_time(auto: str, model_type: str) -> dict[str, Any]:
    """:func:`check`, as failed when it takes too long."""
    try:
        with _limit(SECONDS):
            return check(auto, model_type)
    except TimeoutError as error:
        return {"status": "failed", "reason": str(error)}


def page(results: dict[str, dict[str, dict[str, Any]]], versions: str) -> str:
    """The types that passed by each class, and a row for every other one that was walked."""
    found = [(auto, t, f) for auto, types in sorted(results.items()) for t, f in sorted(types.items())]
    counts = Counter(f["status"] for *_, f in found)
    passed: dict[str, list[str]] = {}
    for auto, model_type, one in found:
        if one["status"] == "passed":
            passed.setdefault(auto, []).append(model_type + ("" if one["compared"] else " (weights alone)"))
    odd = [(a, t, f["status"], f["reason"].replace("|", "/")[:150]) for a, t, f in found if f["status"] != "passed"]
    counted = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "not run"))
    walked = [f"| `{auto}` | {', '.join(types)} |" for auto, types in passed.items()]
    others = [f"| `{auto}` | {model_type} | {status} | {reason} |" for auto, model_type, status, reason in odd]
    return "\n".join(
        [
            "Written by `python -m tests.matrix.auto_walk`. Not run: transformers alone does not build, run or reopen "
            "the type in the small form that the walk makes of its configuration, or not with inputs drawn from it.",
            "", f"{counted} ({versions}).", "", "| class | types that passed |", "|---|---|", *walked,
            "", "| class | type | | reason |", "|---|---|---|---|", *others, "",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", help="comma-separated Auto classes; all by default")
    parser.add_argument("--types", help="comma-separated model types; all by default")
    parser.add_argument("--each", type=int, help="so many types of each class at most")
    parser.add_argument("--out", type=Path, required=True, help="results, kept as they come and taken up there")
    parser.add_argument("--page", action="store_true", help="write the page of what the results hold, and walk nothing")
    given = parser.parse_args()
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
    if given.page:
        versions = f"transformers {metadata.version('transformers')}, torch {metadata.version('torch').split('+')[0]}"
        PAGE.write_text(page(results, versions), encoding="utf-8")
        return
    for auto, types in auto_classes().items():
        if given.classes and auto not in given.classes.split(","):
            continue
        chosen = [t for t in types if not given.types or t in given.types.split(",")]
        for model_type in chosen[: given.each]:
            if model_type in results.get(auto, {}):
                continue
            found = check_in_time(auto, model_type)
            sys.stdout.write(f"{auto:40} {model_type:24} {json.dumps(found)}\n")
            sys.stdout.flush()
            results.setdefault(auto, {})[model_type] = found
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
