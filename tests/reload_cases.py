# SPDX-License-Identifier: Apache-2.0
"""What an adapter may meet where it is loaded: other drivers, precisions and weights whose basis is not unique; and
what comes of it, a loaded adapter with a measured error or a refusal. Used by the laws and ``tests/bench/reload.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import Form, read_adapter, write_adapter
from mirrortune.adapters.files.load import adapt, load_into
from mirrortune.adapters.inject import spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.errors import VerificationError
from tests.spectral import relative, train_a_little

Driver = Callable[[Tensor, int], Factors]


def _leading(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> Factors:
    return Factors(U=U[:, :rank].double(), S=S[:rank].double(), Vh=Vh[:rank].double())


def by_lapack(driver: str, dtype: torch.dtype) -> Driver:
    """LAPACK's gesdd or gesvd in a precision, signs as they come."""

    def decompose(weight: Tensor, rank: int) -> Factors:
        parts = scipy.linalg.svd(weight.detach().to(dtype).numpy(), full_matrices=False, lapack_driver=driver)
        return _leading(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts), rank)

    return decompose


def by_gram_matrix(weight: Tensor, rank: int) -> Factors:
    """Eigenvectors of the smaller Gram matrix, float64, signs as they come."""
    matrix = weight.detach().double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    S, own = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    other = (matrix.T if is_wide else matrix) @ own / S
    return _leading(own, S, other.T, rank) if is_wide else _leading(other, S, own.T, rank)


def permuted_and_flipped(weight: Tensor, rank: int) -> Factors:
    """A right decomposition in another order with other signs."""
    found = factorize(weight, rank)
    generator = torch.Generator().manual_seed(rank)
    order = torch.randperm(rank, generator=generator)
    signs = torch.randint(0, 2, (rank,), generator=generator) * 2.0 - 1.0
    return Factors(U=found.U[:, order] * signs, S=found.S[order], Vh=found.Vh[order] * signs[:, None])


def rounded(weight: Tensor, rank: int) -> Factors:
    """Our own decomposition, kept in float32 as the cache of factors keeps it."""
    found = factorize(weight, rank)
    return Factors(U=found.U.float().double(), S=found.S, Vh=found.Vh.float().double())


DRIVERS: dict[str, Driver] = {
    "the same": factorize,
    "gesdd": by_lapack("gesdd", torch.float64),
    "gesvd": by_lapack("gesvd", torch.float64),
    "eigh of the Gram matrix": by_gram_matrix,
    "permuted and flipped": permuted_and_flipped,
    "float32 factors": rounded,
    "gesdd in float32": by_lapack("gesdd", torch.float32),
}


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """Float64, entries of variance 1 / in."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator, dtype=torch.float64) / in_features**0.5


def with_values(change: Callable[[Tensor], Tensor]) -> Callable[[int, int], Tensor]:
    """Random singular vectors with changed singular values."""

    def build(out_features: int, in_features: int) -> Tensor:
        U, S, Vh = torch.linalg.svd(random_weight(out_features, in_features), full_matrices=False)
        return U @ torch.diag(change(S)) @ Vh

    return build


def _repeat(S: Tensor) -> Tensor:
    S = S.clone()
    S[2:5], S[-4:-2] = S[2], S[-4]
    return S


def _drop(S: Tensor) -> Tensor:
    return torch.cat([S[:-6], torch.zeros(6, dtype=S.dtype)])


def exactly_repeated(out_features: int, in_features: int) -> Tensor:
    """Exact in any dtype, most singular values the same: a Hadamard matrix and a few larger entries."""
    size = min(out_features, in_features)
    matrix = torch.from_numpy(scipy.linalg.hadamard(1 << (size.bit_length() - 1))).double()
    weight = torch.zeros(out_features, in_features, dtype=torch.float64)
    weight[: len(matrix), : len(matrix)] = matrix / 8
    weight[range(4), range(4)] += torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    return weight


def of_low_rank(out_features: int, in_features: int) -> Tensor:
    """Small whole numbers of rank 40 at most: singular values that are zero in any dtype."""
    generator = torch.Generator().manual_seed(1)
    inner = min(40, min(out_features, in_features) - 6)
    left = torch.randint(-1, 2, (out_features, inner), generator=generator).double()
    right = torch.randint(-1, 2, (inner, in_features), generator=generator).double()
    return left @ right / 16


WEIGHTS: dict[str, Callable[[int, int], Tensor]] = {
    "random": random_weight,
    "repeated singular values": with_values(_repeat),
    "exactly repeated": exactly_repeated,
    "rank-deficient": with_values(_drop),
    "exactly rank-deficient": of_low_rank,
    "zero": lambda out_features, in_features: torch.zeros(out_features, in_features, dtype=torch.float64),
}
SPECS = {
    "mirror": AdapterSpec(),
    "mirror + scale": AdapterSpec(options={"scale_top_k": "all"}),
    "input side": AdapterSpec(method="random", options={"side": "input"}),
    "svft banded": AdapterSpec(method="svft", options={"pattern": "banded"}),
    "scale": AdapterSpec(method="scale"),
    "psoft": AdapterSpec(method="psoft", rank=6),
    "lora-xs": AdapterSpec(method="lora-xs", rank=6),
    "speclora": AdapterSpec(method="speclora", options={"top_k": 4, "lora_rank": 2}),
}


def saved(weight: Tensor, spec: AdapterSpec, folder: Path, form: Form, source: Driver = factorize) -> dict[str, Tensor]:
    """Train an adapter of one linear layer a little and save it; returns its effect."""
    model = layer_of(weight)
    book = adapt(model, spec, factor_source=lambda name, matrix, rank: source(matrix, rank))
    for layer in spectral_layers(model).values():
        train_a_little(layer.core, 3)
    folder.mkdir(parents=True, exist_ok=True)
    base = {"name": "one layer", "dtype": str(weight.dtype).removeprefix("torch.")}
    write_adapter(folder, model, book.entries, base=base, task=None, extra={}, form=form)
    return {name: layer.delta_weight() for name, layer in spectral_layers(model).items()}


def layer_of(weight: Tensor) -> nn.Module:
    """A model of one linear layer that has this weight."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def reload_error(weight: Tensor, folder: Path, driver: Driver, expected: dict[str, Tensor]) -> float | None:
    """Error of a reloaded adapter's effect, relative to the trained one's, where the bases are ``driver``'s; None where
    it is refused.
    """
    model = layer_of(weight)
    try:
        load_into(model, read_adapter(folder), lambda name, matrix, rank: driver(matrix, rank))
    except VerificationError:  # exit code 5
        return None
    return max(relative(layer.delta_weight(), expected[name]) for name, layer in spectral_layers(model).items())
