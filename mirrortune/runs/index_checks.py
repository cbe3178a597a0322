# SPDX-License-Identifier: Apache-2.0
"""Check every index that a model looks up against the size of its embedding table, before weights are loaded.

The model is on the meta device, but its inputs have values. Tensors that depend on integers alone (token ids, token
types, positions, and the masks from which some models derive positions) are computed; all others only have shapes.
Lookups out of range are thus found for any architecture, with the values that a training step would use.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mirrortune.data.examples import Batch, Examples, TokenExamples
from mirrortune.errors import ConfigError, DataError, counted, first_of
from mirrortune.runs.memory import ASK_NUMBERS, all_rows, answered, without_numbers
from mirrortune.system.devices import evaluating

_ATEN = torch.ops.aten
_LARGEST = 1 << 22  # elements of the largest tensor that is computed; attention masks of long rows are not
_META = torch.device("meta")
_MOST_NAMED = 8  # tokens listed in a message
_BLOCK = 1 << 22  # tokens
_LONGEST_SHOWN = 80  # characters of a row in a message
_CLASSIFIER = "ForSequenceClassification"


class BeyondTableError(Exception):
    """A lookup beyond the end of a table.

    Attributes:
        name: parameter name of the table; "" if it is not a parameter.
        rows: number of rows in the table.
        largest: largest index looked up.
    """

    def __init__(self, name: str, rows: int, largest: int) -> None:
        super().__init__(f"index {largest} into '{name}', which has {rows} rows")
        self.name, self.rows, self.largest = name, rows, largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Maximum input lengths in tokens.

    Attributes:
        tokens: maximum length of a row.
        targets: maximum length of the decoder's input; None for a model without a decoder.
    """

    tokens: int
    targets: int | None = None


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute values that depend on integers alone and only shapes of all others; raise for lookups out of range."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(tensor): name for name, tensor in model.named_parameters()}  # first name of tied parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self._check(func, args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_meta = [t.device.type == "meta" for t in tensors]
        if tensors and any(on_meta) and func in ASK_NUMBERS:
            return answered(func, args)
        if kwargs.get("device") == _META and _is_whole(func, args, kwargs) and not any(on_meta):
            kwargs["device"] = torch.device("cpu")
        if tensors and (any(on_meta) or _size(tensors) > _LARGEST):
            args, kwargs = tree_map(_without_numbers, (args, kwargs))
            if "device" in kwargs:  # a copy to the device of the integers
                kwargs["device"] = _META
            return func(*all_rows(func, args), **kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Any) -> None:
        if func is _ATEN.embedding.default:
            self._check_index(args[0], args[1], 0, allows_negative=False)
        elif func in (_ATEN.index_select.default, _ATEN.gather.default):
            self._check_index(args[0], args[2], args[1], allows_negative=False)
        elif func is _ATEN.index.Tensor:
            for axis, index in enumerate(args[1]):
                if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
                    self._check_index(args[0], index, axis, allows_negative=True)

    def _check_index(self, table: Tensor, index: Tensor, axis: int, *, allows_negative: bool) -> None:
        if index.device.type == "meta" or not index.numel():
            return
        rows, low, high = table.shape[axis], int(index.min()), int(index.max())
        if high >= rows or low < (-rows if allows_negative else 0):
            raise BeyondTableError(self.names.get(id(table), ""), rows, high if high >= rows else low)


def check_rows(model: nn.Module, examples: Examples, processor: Any, *, where: str, source: str, is_text: bool) -> None:
    """Check that the indices in rows are within the embedding tables of a model.

    Args:
        model: model on the meta device or loaded; not changed.
        examples: rows of a split.
        processor: tokenizer of the rows, an object that holds one, or another processor.
        where: name of the model in errors.
        source: name of the rows in errors.
        is_text: rows consist of tokens; for other inputs, the error of the model is reported.

    Raises:
        ConfigError: an index is out of range; the error names the size of the table and the tokens or the index.
        DataError: the rows have not as many end tokens as the model needs; see :func:`check_end_tokens`.
    """
    check_end_tokens(model, examples, processor, where=where, source=source)
    batch = examples.batch(examples.extremes())
    try:
        if any(parameter.device.type != "meta" for parameter in model.parameters()):
            model = without_numbers(model, "meta")
        _run(model, batch)
    except BeyondTableError as error:
        raise _beyond(error, model, examples, getattr(processor, "tokenizer", processor), where, source) from error
    except ValueError as error:
        if not is_text:
            raise ConfigError(where, f"it refuses the inputs of {source} ({str(error).splitlines()[0][:200]})",
                              fix="Use the processor that belongs to the model") from error  # fmt: skip
    except Exception:  # noqa: BLE001  (a model that needs the values of weights cannot be checked)
        return


def check_end_tokens(model: nn.Module, examples: Examples, processor: Any, *, where: str, source: str) -> None:
    """Check that rows have equally many end tokens, one at least, if the model classifies a text by its end token.

    BART's and T5's classifiers take the decoder's state at the last end token of each row, and fail otherwise.

    Args:
        model: any model.
        examples: rows of a split.
        processor: tokenizer of the rows, or another processor.
        where: name of the model in errors.
        source: name of the rows in errors.

    Raises:
        ConfigError: the tokenizer adds no end token, or pads with it.
        DataError: a text contains it.
    """
    end = _end_that_is_read(model)
    if end is None or not isinstance(examples, TokenExamples) or not len(examples):
        return
    name = processor.convert_ids_to_tokens(end)
    if examples.padding.fill["input_ids"] == end:
        raise ConfigError(
            where, f"it reads the state at the last end token {name!r}, and its tokenizer pads with that token",
            fix="Set another pad_token in its tokenizer_config.json",
        )  # fmt: skip
    counts = count_in_rows(examples, end)
    usual = int(np.bincount(counts).argmax())
    if not usual:
        raise ConfigError(
            where, f"it reads the state at the end token {name!r}, which its tokenizer does not add to {source}",
            allowed="a tokenizer that ends every text with the end token, as those of BART and T5 do",
            fix="Correct its tokenizer (a post-processor in tokenizer.json), or use another model",
        )  # fmt: skip
    odd = np.flatnonzero(counts != usual)
    if len(odd):
        text = processor.decode(examples.features["input_ids"][slice(*examples.offsets[odd[0] : odd[0] + 2])])
        raise DataError(
            source, f"{counted(len(odd), 'row')} with {counts[odd[0]]} in place of {usual} end tokens {name!r}, and the"
            f" model needs as many in every row: {text[:_LONGEST_SHOWN]!r}",
            fix=f"Remove {name!r} from the texts",
        )  # fmt: skip


def count_in_rows(examples: TokenExamples, token: int) -> npt.NDArray[np.int64]:
    """Return how often each row holds a token, (N,); block by block, as the ids may lie on disk and exceed memory."""
    ids = examples.features["input_ids"]
    places = [b + np.flatnonzero(ids[b : b + _BLOCK] == token) for b in range(0, len(ids), _BLOCK)]
    return np.diff(np.searchsorted(np.concatenate([np.empty(0, np.int64), *places]), examples.offsets))


def _end_that_is_read(model: nn.Module) -> int | None:
    """Return the id of the end token if the model is an encoder-decoder whose classifier looks for it in its inputs."""
    config, forward = getattr(model, "config", None), inspect.unwrap(type(model).forward)
    if not getattr(config, "is_encoder_decoder", False) or not type(model).__name__.endswith(_CLASSIFIER):
        return None
    end = getattr(config, "eos_token_id", None)
    is_read = "eos_token_id" in getattr(getattr(forward, "__code__", None), "co_names", ())
    return end if is_read and isinstance(end, int) else None


def longest(model: nn.Module, probe: Batch, lengths: Lengths) -> Lengths:
    """Find the longest inputs that a model accepts, up to ``lengths``.

    Args:
        model: model on the meta device.
        probe: a few inputs from ``Task.probe``.
        lengths: upper bounds.
    """
    tokens = _most(lambda n: _takes(model, _stretched(probe, n, 1)), lengths.tokens)
    if lengths.targets is None:
        return Lengths(tokens=tokens)
    targets = _most(lambda n: _takes(model, _stretched(probe, 1, n)), lengths.targets)
    return Lengths(tokens=tokens, targets=targets)


def _most(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that fits.

    If even 1 does not fit, length is not the problem, and ``most`` is returned.
    """
    if most <= 1 or fits(most) or not fits(1):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _takes(model: nn.Module, batch: Batch) -> bool:
    try:
        _run(model, batch)
    except Exception:  # noqa: BLE001  (models raise various errors for inputs that are too long)
        return False
    return True


def _run(model: nn.Module, batch: Batch) -> None:
    inputs = {key: value for key, value in batch.items() if key != "targets"}
    with evaluating(model), torch.no_grad(), _Lookups(model):
        model(**inputs)


def _stretched(probe: Batch, tokens: int, targets: int) -> Batch:
    """Return the longest row of a probe, truncated to a length or extended by repeating its last token."""
    mask = probe["attention_mask"]
    row = int(mask.flatten(1).sum(dim=1).argmax())
    made: Batch = {}
    for name, value in probe.items():
        if isinstance(value, Tensor):
            width = targets if name.startswith("decoder_") else tokens
            columns = torch.arange(width).clamp(max=value.shape[-1] - 1)
            made[name] = value[row : row + 1][..., columns]
        else:
            made[name] = value
    return made


def _beyond(
    error: BeyondTableError, model: nn.Module, examples: Examples, tokenizer: Any, where: str, source: str
) -> ConfigError:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    own = [name for name, parameter in model.named_parameters() if parameter is getattr(embeddings, "weight", None)]
    is_tokens = error.name in own
    table = f"its table '{error.name}'" if error.name else "a table"
    if not is_tokens or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return ConfigError(where, f"{table} has {error.rows} rows, and {source} asks for number {error.largest}",
                           allowed=f"0 to {error.rows - 1}",
                           fix="Use the tokenizer or processor that belongs to the model")  # fmt: skip
    ids = np.unique(np.concatenate([values[values >= error.rows] for values in examples.token_ids()]))
    ids = ids if len(ids) else np.array([error.largest])
    named = first_of((f"{tokenizer.convert_ids_to_tokens(int(i))} ({i})" for i in ids), _MOST_NAMED)
    return ConfigError(
        where, f"{table} has {error.rows} rows, none for {len(ids)} tokens of {source}: {named}",
        allowed=f"token ids 0 to {error.rows - 1}",
        fix="Use the tokenizer that belongs to the model, or a model whose embedding was enlarged for these tokens",
    )  # fmt: skip


def _without_numbers(value: Any) -> Any:
    return value.to(_META) if isinstance(value, Tensor) else value


def _size(tensors: list[Tensor]) -> int:
    """Return the number of elements of the broadcast shape of tensors, or of the largest if they do not broadcast."""
    largest = max(t.numel() for t in tensors)
    try:
        return max(largest, math.prod(np.broadcast_shapes(*(tuple(t.shape) for t in tensors))))
    except ValueError:
        return largest


def _is_whole(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether an operation creates a small integer or boolean tensor."""
    dtype = kwargs.get("dtype")
    if func.overloadpacket is _ATEN.arange:
        return (dtype is None and all(isinstance(a, int) for a in args)) or _is_whole_dtype(dtype)
    own = next((a.dtype for a in args if isinstance(a, Tensor)), None)
    sizes = [a for a in args if isinstance(a, (list, tuple)) and all(isinstance(n, int) for n in a)]
    return _is_whole_dtype(dtype or own) and all(math.prod(size) <= _LARGEST for size in sizes)


def _is_whole_dtype(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and not dtype.is_floating_point and not dtype.is_complex
