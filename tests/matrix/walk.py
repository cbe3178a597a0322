# SPDX-License-Identifier: Apache-2.0
"""Every model type of transformers that has a head of ours, tiny and random, through the life of an adapter.

For each: build from a configuration, save, attach, one forward and backward, train a little, save the adapter, load it
into the reopened base, merge, reopen the merged checkpoint with transformers alone, compare outputs.

    python -m tests.matrix.walk                       all types, into tests/matrix/results.md
    python -m tests.matrix.walk --types bert,gpt2     some, printed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
from mirrortune.adapters.files.load import FingerprintBook, load_into
from mirrortune.adapters.inject import adapter_parameters, attach, attachment
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.adapters.targets import find_targets
from mirrortune.errors import MirrortuneError
from mirrortune.merging.in_memory import merged_state
from mirrortune.tasks.drawn_inputs import first_that_runs
from tests.matrix.configs import tiny_configs
from tests.matrix.inputs import inputs_for
from tests.matrix.share import PAGE, page

HEADS = {
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "multiple-choice": "MultipleChoice",
    "causal-lm": "CausalLM",
    "seq2seq-lm": "Seq2SeqLM",
    "image-classification": "ImageClassification",
    "audio-classification": "AudioClassification",
}
"""Kinds of heads, and the Auto class that gives them."""
Inputs = tuple[dict[str, Tensor], Tensor] | str
"""Inputs that a model runs with its output, or why there are none."""
_LARGEST = 40_000_000  # numbers of a model that is still run here
SECONDS = 60  # of one model, which takes one or two


class NotRunError(Exception):
    """The plain model cannot be made from a configuration, run or reopened: nothing that an adapter could change."""


_MAPPINGS = {
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "multiple-choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio-classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}


def registry() -> dict[str, list[str]]:
    """Model type -> heads that it has, from transformers' own mappings."""
    from transformers.models.auto import modeling_auto

    found: dict[str, list[str]] = {}
    for head, name in _MAPPINGS.items():
        for model_type in getattr(modeling_auto, name):
            found.setdefault(model_type, []).append(head)
    return dict(sorted(found.items()))


def _class_name(model_type: str, head: str) -> str:
    from transformers.models.auto import modeling_auto

    name = getattr(modeling_auto, _MAPPINGS[head])[model_type]
    return name if isinstance(name, str) else str(name[0])


def build(model_type: str, head: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The smallest model of that type that runs, with random weights, and inputs for it."""
    import transformers

    def runs(model: nn.Module) -> Inputs:
        def finite(inputs: dict[str, Tensor]) -> Tensor:
            if not torch.isfinite(output := run(model, inputs)).any():
                raise ValueError("its output is not finite")  # the next inputs may do
            return output

        return first_that_runs(inputs_for(model, head), finite)

    auto = getattr(transformers, f"AutoModelFor{HEADS[head]}")
    with torch.no_grad():
        return smallest(auto, model_type, _class_name(model_type, head), runs)


def smallest(
    auto: Any, model_type: str, architecture: str, runs: Callable[[nn.Module], Inputs]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The smallest random model of a type that its Auto class makes and that runs, and its inputs.

    Args:
        auto: the Auto class.
        model_type: in transformers' registry.
        architecture: class of the model, for types that have several.
        runs: finds inputs that a model runs.

    Raises:
        NotRunError: if there is none, with the last reason.
    """
    from transformers import CONFIG_MAPPING

    reason = ""
    try:
        for config in tiny_configs(CONFIG_MAPPING[model_type]):
            config.architectures = [architecture]
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in auto.from_config(config).parameters())
                if size > _LARGEST:
                    reason = reason or f"too large to be run here ({size:,} numbers)"
                    continue
                model = _random(auto.from_config(config))
                found = runs(model)
            except Exception as error:  # noqa: BLE001  (whatever a model says; the next configuration may do)
                reason = first_line(error)
                continue
            if not isinstance(found, str) and torch.isfinite(found[1]).any():
                return model, found[0]
            reason = found if isinstance(found, str) else "its output is not finite"
    except Exception as error:  # noqa: BLE001
        reason = first_line(error)
    raise NotRunError(reason)


def _random(model: nn.Module) -> nn.Module:
    """Weights as a trained model could have them: nothing that is zero, or the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.float().eval()


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the model says, as one flat tensor; entries that it masks (infinite ones) are zero."""
    torch.manual_seed(0)  # some draw numbers in their forward
    output = model(**inputs)
    tensors = [t for n in ("logits", "start_logits", "end_logits") if isinstance(t := output.get(n), Tensor)]
    flat = torch.cat([t.flatten().float() for t in tensors or [output[0]]])
    return flat.masked_fill(flat.detach().abs() > 1e9, 0.0)


def loss(output: Tensor) -> Tensor:
    """A fixed random functional."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return (output * weights).sum()


def used_weights(model: nn.Module, inputs: dict[str, Tensor], names: dict[str, Any]) -> set[str]:
    """Layers whose plain weight has a gradient: those that take part in the forward pass of this head at all."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss(run(model, inputs)).backward()
    found = {n for n, t in names.items() if (g := t.weight(model).grad) is not None and bool(g.any())}
    model.zero_grad(set_to_none=True)
    return found


def check(model_type: str, head: str, spec: AdapterSpec | None = None) -> dict[str, Any]:
    """Walk one type with one head; see :func:`judged`."""

    def walk(folder: Path) -> dict[str, Any]:
        model, inputs = build(model_type, head)
        return _live(*_reopened(model, inputs, folder), spec or AdapterSpec())

    return judged(walk)


def judged(walk: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What a walk in an empty folder found, with ``status`` passed, failed (after :data:`SECONDS` too) or not run."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            with _limit(SECONDS):
                found = walk(Path(folder))
        except NotRunError as error:
            found = {"status": "not run", "reason": str(error)}
        except Exception as error:  # noqa: BLE001  (the reason is the result)
            where = "" if isinstance(error, MirrortuneError | Failure | TimeoutError) else f"{type(error).__name__}: "
            found = {"status": "failed", "reason": where + first_line(error)}
    return {**found, "seconds": round(time.process_time() - started, 1)}


def _reopened(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> tuple[Any, dict[str, Tensor], Path]:
    """A function that opens the saved model, by its Auto class where that knows it; its inputs; and its folder.

    Raises:
        NotRunError: if transformers alone does not give the same model twice.
    """
    base = folder / "base"
    try:
        model.save_pretrained(base)  # type: ignore[operator]
        first, second = (type(model).from_pretrained(base).eval() for _ in range(2))
        with torch.no_grad():
            outputs = [run(m, inputs) for m in (first, second)]
    except Exception as error:
        raise NotRunError(f"transformers does not reopen its own checkpoint: {first_line(error)}") from error
    if (error := relative_error(outputs[0], outputs[1])) > 1e-5:
        raise NotRunError(f"two copies of the same checkpoint differ by {error:.0e}")
    return type(model), inputs, base


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest output (at least to 1)."""
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


class Failure(Exception):  # noqa: N818
    """A step whose result is not what it must be."""


def _live(model_class: Any, inputs: dict[str, Tensor], base: Path, spec: AdapterSpec) -> dict[str, Any]:
    adapter, merged = (base.parent / name for name in ("adapter", "merged"))
    plain, model = (model_class.from_pretrained(base).eval() for _ in range(2))
    with torch.no_grad():
        before = run(model, inputs)
    targets = find_targets(plain, spec).layers
    used = used_weights(plain, inputs, targets)
    book = FingerprintBook()
    attach(model, spec, factor_source=_factors, on_layer=book)
    output = run(model, inputs)
    if (error := relative_error(output.detach(), before)) > 1e-3:
        raise Failure(f"an untrained adapter changes the output by {error:.0e}")
    loss(output).backward()
    _check_gradients(model, used)
    _check_buffers(model, inputs)
    with torch.no_grad():
        for index, parameter in enumerate(adapter_parameters(model).values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        after = run(model, inputs)
    effect = relative_error(after, before)
    adapter.mkdir()
    write_adapter(adapter, model, book.entries, base={"name": str(base)}, task=None, extra={})
    loaded = model_class.from_pretrained(base).eval()
    load_into(loaded, read_adapter(adapter), _factors)
    with torch.no_grad():
        if (error := relative_error(run(loaded, inputs), after)) > 1e-5:
            raise Failure(f"a loaded adapter differs by {error:.0e}")
    plain = model_class.from_pretrained(base)
    plain.save_pretrained(merged, state_dict=merged_state(plain, loaded))
    reopened = model_class.from_pretrained(merged).eval()
    with torch.no_grad():
        error = relative_error(run(reopened, inputs), after)
    if error > max(1e-4, 0.01 * effect):
        raise Failure(f"the merged model differs by {error:.0e} of an effect of {effect:.0e}")
    kinds: dict[str, int] = {}
    for target in targets.values():
        kinds[target.kind.name] = kinds.get(target.kind.name, 0) + 1
    return {
        "status": "passed", "layers": len(targets), "kinds": kinds, "unused": sorted(set(targets) - used),
        "effect": float(f"{effect:.1e}"), "merge_error": float(f"{error:.1e}"),
    }  # fmt: skip


def _check_gradients(model: nn.Module, used: set[str]) -> None:
    for name in attachment(model).targets.layers:
        numbers = {n: p for n, p in adapter_parameters(model).items() if n.rpartition(".")[0] == name}
        moved = {n for n, p in numbers.items() if p.grad is not None and bool(p.grad.any())}
        if any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in numbers.values()):
            raise Failure(f"{name}: a gradient that is not finite")
        if numbers and not moved and name in used:
            raise Failure(f"{name}: the weight is used, and its core gets no gradient")


def _check_buffers(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Training moves no buffer of a checkpoint that the adapter does not hold and that the outputs depend on."""
    held = {n: t for n, t in model.state_dict(keep_vars=True).items() if not isinstance(t, nn.Parameter)}
    before = {name: tensor.clone() for name, tensor in held.items()}
    with contextlib.suppress(ValueError):  # a batch normalisation of the head that gets one value
        run(model.train(), inputs)
    after = model.eval().state_dict(keep_vars=True)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    strange = sorted(moved - {*attachment(model).targets.statistics})
    if not strange:
        return
    with torch.no_grad():  # I-BERT's ranges of activations serve its quantised mode only
        trained = run(model, inputs)
        model.load_state_dict({name: before[name] for name in strange}, strict=False)
        if not torch.equal(run(model, inputs), trained):
            raise Failure(f"training moves {strange[0]}, which the adapter does not hold")


def _factors(name: str, weight: Tensor, rank: int) -> Factors:
    return factorize(weight, rank, name=name)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds of this process's own time, however busy the machine is."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def walk_all(
    cases: Iterable[tuple[str, str]], check: Callable[[str, str], dict[str, Any]], out: Path | None
) -> dict[str, dict[str, Any]]:
    """Check every case that ``out`` does not hold yet, print what was found, and keep it there as it comes."""
    results: dict[str, Any] = json.loads(out.read_text()) if out and out.is_file() else {}
    for one, other in cases:
        if other in results.get(one, {}):
            continue
        found = check(one, other)
        sys.stdout.write(f"{one:40} {other:24} {json.dumps(found)}\n")
        sys.stdout.flush()
        results.setdefault(one, {})[other] = found
        if out:
            out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", help="comma-separated model types; all by default")
    parser.add_argument("--out", type=Path, help="results as JSON, kept as they come and taken up from there")
    given = parser.parse_args()
    types = registry()
    if given.types:
        types = {name: types[name] for name in given.types.split(",")}
    results = walk_all(((name, head) for name, heads in types.items() for head in heads), check, given.out)
    if not given.types:
        versions = f"transformers {metadata.version('transformers')}, torch {metadata.version('torch').split('+')[0]}"
        PAGE.write_text(page(results, versions), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
