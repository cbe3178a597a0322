# SPDX-License-Identifier: Apache-2.0
"""Auto classes of transformers through the Python interface, without a task and without a tokenizer or any other
processor beside the base: attach, save_adapter, load_adapter, merge_adapter, reopened by transformers alone.

    python -m tests.matrix.auto_walk --out FILE.json                every model type of every Auto class
    python -m tests.matrix.auto_walk --out FILE.json --each 3       three types of each class
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.inject import adapter_parameters
from mirrortune.tasks.drawn_inputs import drawn_inputs, first_that_runs
from tests.matrix.walk import Failure, Inputs, NotRunError, first_line, judged, relative_error, smallest, walk_all


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
    """The smallest random model of a type that its Auto class makes and that some drawn inputs run."""
    import transformers

    architecture = auto_classes()[auto][model_type][0]
    return smallest(getattr(transformers, auto), model_type, architecture, _inputs)[0]


def _inputs(model: Any) -> Inputs:
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
    """Walk one type by one Auto class; see :func:`tests.matrix.walk.judged`."""
    return judged(lambda folder: _live(build(auto, model_type), folder, options))


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
        raise NotRunError(f"transformers does not reopen its own checkpoint: {first_line(error)}") from error
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", help="comma-separated Auto classes; all by default")
    parser.add_argument("--types", help="comma-separated model types; all by default")
    parser.add_argument("--each", type=int, help="so many types of each class at most")
    parser.add_argument("--out", type=Path, required=True, help="results, kept as they come and taken up there")
    given = parser.parse_args()
    cases = []
    for auto, types in auto_classes().items():
        if given.classes and auto not in given.classes.split(","):
            continue
        chosen = [t for t in types if not given.types or t in given.types.split(",")]
        cases += [(auto, model_type) for model_type in chosen[: given.each]]
    walk_all(cases, check, given.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
