# SPDX-License-Identifier: Apache-2.0
"""Who takes part in the benches of training steps: models of random weights, adapted by every method.

Sizes are those of encoders (BERT's blocks) and of large language models (Llama's), with fewer layers than the models
have where only ratios are asked for.
"""

from __future__ import annotations

import copy
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.adapters.files.load import adapt
from mirrortune.adapters.inject import attachment
from mirrortune.adapters.methods import preset
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.adapters.targets import find_targets
from mirrortune.runs.size import strategies_of
from mirrortune.training.optim import build_optimizer

# (method, rank); the rank of PEFT's is the one of the comparison, or the tuner's default.
METHODS: dict[str, tuple[str, Any]] = {
    "lora r=8": ("lora", 8), "mirror": ("mirror", "full"), "mirror r=64": ("mirror", 64),
    "mirror r=128": ("mirror", 128), "psoft": ("psoft", None),
    "speclora": ("speclora", None), "lora-xs": ("lora-xs", None), "none": ("none", None), "frozen": ("none", None),
    "dora r=8": ("dora", 8),
    "psoft-peft": ("psoft-peft", None), "oft": ("oft", None), "boft": ("boft", None), "hra r=8": ("hra", 8),
    "road": ("road", None), "full": ("full", None),
}  # fmt: skip
REFERENCE = "lora r=8"
# A head alone, and the gradient of the embeddings' output: what any adapter of all layers costs at the least.
FROZEN = "frozen"
# hidden size, intermediate size, attention heads, layers. Fewer layers than the models have: a ratio does not see them.
SIZES = {"mini": (384, 1536, 12, 6), "base": (768, 3072, 12, 4), "1b": (2048, 8192, 32, 4), "8b": (4096, 14336, 32, 2)}
VOCABULARY = 2048


def make_model(
    size: str, length: int, dtype: torch.dtype, device: str, *, layers: int | None = None, vocabulary: int = VOCABULARY
) -> nn.Module:
    """A classifier: BERT's encoder for the sizes of encoders, Llama's blocks for the large ones.

    Args:
        size: one of :data:`SIZES`.
        length: positions of a row at the most.
        dtype: of the weights, which are made in it on the device: an 8B model in float32 would not fit there.
        device: may be ``meta``.
        layers: as many as the size has by default.
        vocabulary: tokens.
    """
    from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

    hidden, inner, heads, own_layers = SIZES[size]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "pad_token_id": 0,
             "num_hidden_layers": layers or own_layers, "max_position_embeddings": length,
             "vocab_size": vocabulary}  # fmt: skip
    large = LlamaConfig(**sizes, num_key_value_heads=8)
    config = BertConfig(**sizes, hidden_dropout_prob=0.0) if size in ("mini", "base") else large
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


@dataclass
class Contestant:
    """One adapted model and its optimizer.

    Attributes:
        model: adapted.
        optimizer: of what it trains.
        trained: numbers, without the head.
        adapter_bytes: of its files, or 0 where it has none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained: int
    adapter_bytes: int

    def step(self, batch: dict[str, Tensor]) -> None:
        """Forward, backward, update."""
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def contestant(
    base: nn.Module, name: str, factors: Callable[..., Factors], *, tokens: int | None = None, is_copy: bool = True
) -> Contestant:
    """A copy of ``base``, or itself, adapted as ``train`` would for batches of ``tokens``."""
    method, rank = METHODS[name]
    model = copy.deepcopy(base) if is_copy else base
    spec = AdapterSpec(method=method, rank=rank)
    head = {n for n, _ in model.named_parameters() if n.split(".")[0] in ("classifier", "score")}
    chosen = strategies_of(find_targets(model, spec, head), spec, next(model.parameters()).dtype, tokens)
    book = adapt(model, spec, factor_source=factors, new_parameters=head, strategies=chosen)
    if name == FROZEN:
        model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a tuner's own too: each would draw its numbers
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in head)
    return Contestant(
        model, build_optimizer(model, lr=1e-4, head_lr=1e-4, weight_decay=0.0), trained, adapter_bytes(model, book)
    )


def adapter_bytes(model: nn.Module, book: Any) -> int:
    """Size of the adapter as it is saved."""
    if not preset(attachment(model).spec.method).is_adapter:
        return 0
    with tempfile.TemporaryDirectory() as place:
        write_adapter(Path(place), model, book.entries, base={"name": "random"}, task=None, extra={})
        return sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())


def make_batch(rows: int, length: int, device: str) -> dict[str, Tensor]:
    """Random tokens and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def saved_bytes(made: Contestant, batch: dict[str, Tensor]) -> int:
    """What autograd keeps of one forward pass: every storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in [*made.model.parameters(), *made.model.buffers()]}
    parameters |= {t.untyped_storage().data_ptr() for t in batch.values()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = made.model(**batch).loss
    found = sum(size for size, _ in kept.values())
    del loss
    return found


def any_factors(name: str, weight: Tensor, rank: int) -> Factors:
    """Numbers of the shapes of a weight's factors, where time and memory are asked for and no result."""
    o, i = weight.shape
    made = {"dtype": torch.float32, "device": weight.device}
    U, Vh = torch.randn(o, rank, **made) / o**0.5, torch.randn(rank, i, **made) / i**0.5
    return Factors(U=U, S=torch.linspace(2, 1, rank, dtype=torch.float64, device=weight.device), Vh=Vh)


def factor_source(
    base: nn.Module, clock: Callable[[], float] = time.perf_counter
) -> tuple[Callable[..., Factors], float]:
    """Factors of every linear layer of ``base``, from memory, and the seconds that they took."""
    weights = {n: m.weight for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    held: dict[str, Factors] = {}
    started = clock()
    for name, weight in weights.items():
        if min(weight.shape) > 2:
            held[name] = factorize(weight, "full", name=name)
    wait()
    seconds = clock() - started

    def of(name: str, weight: Tensor, rank: int) -> Factors:
        found = held[name] if name in held else factorize(weight, "full")
        return Factors(U=found.U[:, :rank], S=found.S[:rank], Vh=found.Vh[:rank])

    return of, seconds


def wait() -> None:
    """Until the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def python_path() -> str:
    """PYTHONPATH for processes of a bench: this checkout before what is there, such as packages brought along."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))


def environment(cache: Path, device: str) -> dict[str, str]:
    """The environment of processes of a bench, with a cache of ours; for ``cpu`` they see no GPU."""
    env = {**os.environ, "PYTHONPATH": python_path(), "MIRRORTUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return env | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def hardware(device: str) -> str:
    """The device by name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of the packages that a step's time depends on."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
