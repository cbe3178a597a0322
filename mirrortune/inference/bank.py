# SPDX-License-Identifier: Apache-2.0
"""Serve many adapters on one base model, mixed in one batch."""

from __future__ import annotations

import json
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.inject import BANK, check_plain, check_unwrapped
from mirrortune.adapters.kinds import plain_dtype
from mirrortune.errors import ConfigError, did_you_mean, first_of, in_python_terms
from mirrortune.inference.bank_entries import Admission, Entry
from mirrortune.inference.bank_file import ReadAdapter, open_bank, save_bank
from mirrortune.inference.bank_layers import Seat, Serving
from mirrortune.inference.batch_axes import layers_without_rows
from mirrortune.system.hub import local_adapter

_SERVING: ContextVar[Mapping[int, Serving]] = ContextVar("mirrortune_serving")
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")


class AdapterBank:
    """Many trained adapters on one base model; each row of a batch is computed with its own adapter.

    All adapters of a base share its singular factors, which are held once; an adapter adds only its trained parameters:
    angles, scales, small matrices, and a head. Inside :meth:`rows`, the model computes each row as it would with the
    adapter of that row alone; outside, it is the base model. The bank does not change the model's weights, and they
    must not be changed while it is in use.

    The bank is thread-safe. Adapters may be added and removed while other threads serve rows, which keep the adapters
    they started with, and several threads may serve different rows of one model at the same time.

    Args:
        model: base model without an adapter.
        on_layer: called with the name of each layer whose weight has been factorised, to show progress.

    Raises:
        ConfigError: the model has an adapter, is in another bank, or is wrapped by torch.

    Example:
        >>> bank = mirrortune.AdapterBank(model)  # doctest: +SKIP
        >>> bank.add("shop-17", "runs/shop-17")  # doctest: +SKIP
        >>> with bank.rows(["shop-17", None]):  # doctest: +SKIP
        ...     logits = model(**batch).logits
    """

    def __init__(self, model: nn.Module, *, on_layer: Callable[[str], None] | None = None) -> None:
        check_unwrapped(model, "AdapterBank")
        if BANK in vars(model):
            raise ConfigError("AdapterBank", "the model is in another bank", fix="Use that one, or close() it first")
        check_plain(model, "AdapterBank")
        self.model = model
        self._dtype = plain_dtype(model)
        self._entries: dict[str, Entry | ReadAdapter] = {}
        self._seats: dict[str, Seat] = {}
        self._admission = Admission(model, FactorCache(on_layer=on_layer), layers_without_rows(model))
        self._lock = threading.RLock()
        self._num_serving = 0
        self._is_open = True
        model.__dict__[BANK] = self
        self._hook = model.register_forward_pre_hook(self._check_batch, with_kwargs=True)
        self._generate = _replace_generate(model, self._serving)

    @classmethod
    def load(cls, model: nn.Module, path: str | Path, *, on_layer: Callable[[str], None] | None = None) -> AdapterBank:
        """Create a bank with the adapters at ``path``; each is read and checked when it is first used.

        Args:
            model: base model without an adapter.
            path: file written by :meth:`save`, or a folder with one subfolder per adapter, whose name is the adapter's.
            on_layer: see :class:`AdapterBank`.

        Raises:
            VerificationError: the file is damaged or has a newer format.
            ConfigError: there is no adapter at ``path``.
        """
        stored = open_bank(Path(path))
        bank = cls(model, on_layer=on_layer)
        bank._entries.update(stored)
        return bank

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @in_python_terms
    def add(
        self,
        name: str,
        adapter: str | Path | AdapterFile,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        replace: bool = False,
    ) -> None:
        """Add an adapter after the checks of :func:`mirrortune.load_adapter`.

        Args:
            name: name of the adapter in :meth:`rows`.
            adapter: adapter folder, run directory, Hub id, or an adapter that was read already.
            revision: branch, tag or commit of a Hub repository.
            subfolder: subfolder of the folder or the repository.
            replace: replace an existing adapter of this name.

        Raises:
            ConfigError: the name is taken, the adapter is one of PEFT's, or an adapted layer does not process a batch
                row by row.
            VerificationError: the adapter belongs to another base, its basis cannot be aligned, or a file is damaged.
        """
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ConfigError("name", f"got {name!r}", allowed="printable text")
        self._check_open()
        self._check_dtype()
        self._check_name(name, replace=replace)
        if not isinstance(adapter, AdapterFile):
            adapter = read_adapter(_own_folder(local_adapter(adapter, revision=revision, subfolder=subfolder)))
        entry = self._admitted(adapter)
        with self._lock:
            self._check_name(name, replace=replace)
            self._entries = {**self._entries, name: entry}  # a new dict, because other threads may be reading the old

    def remove(self, name: str) -> None:
        """Remove an adapter; rows that are being served keep it until they are done.

        Raises:
            ConfigError: there is no adapter of this name.
        """
        with self._lock:
            self._find(name)
            self._entries = {own: entry for own, entry in self._entries.items() if own != name}

    def num_labels(self, name: str) -> int | None:
        """Return the number of outputs of an adapter's head, or None without a head.

        If rows of a batch have different numbers of classes, the logits are (rows, largest number), padded with minus
        infinity; ``logits[i, : bank.num_labels(name)]`` are those of row i.
        """
        return self._entry(name).structure.num_labels

    def recorded(self, name: str) -> dict[str, Any]:
        """Return the fields ``base``, ``task`` and ``max_length`` that an adapter's file records about its training."""
        return dict(json.loads(self._entry(name).own))

    @contextmanager
    def rows(self, names: Iterable[str | None]) -> Iterator[None]:
        """Compute row i of every batch with the adapter ``names[i]``, or with the base model for None, in this context.

        The sequences that ``generate`` makes of a row (beams, ``num_return_sequences``) have the adapter of the row. A
        row that holds several packed sequences has one adapter for all of them.

        Args:
            names: one name or None for each row of the batch.

        Raises:
            ConfigError: a name is unknown, or the list is empty. Raised by the model inside the context if a batch
                has a different number of rows.
        """
        self._check_open()
        if isinstance(names, str) or not (names := list(names)):
            raise ConfigError("rows", f"got {names!r}", allowed="a list with a name, or None, for each row")
        found = {name: self._entry(name) for name in dict.fromkeys(names) if name is not None}
        serving = Serving(names, [None if name is None else found[name] for name in names])
        token = _SERVING.set({**_SERVING.get({}), id(self): serving})
        with self._lock:
            self._num_serving += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_serving -= 1
            _SERVING.reset(token)

    def save(self, path: str | Path) -> None:
        """Write all adapters into one safetensors file, which :meth:`load` reads lazily.

        A file that an earlier ``save`` wrote is replaced atomically; any other file is refused.

        Args:
            path: path of the file, which ends in ``.safetensors``.

        Raises:
            ConfigError: ``path`` holds something else.
            ResourceError: the file cannot be written.
        """
        self._check_open()
        entries = {name: self._entry(name) for name in self.names}
        save_bank(Path(path), entries)

    def close(self) -> None:
        """Restore the model to its original state; the bank cannot be used afterwards.

        Raises:
            ConfigError: rows are being served.
        """
        with self._lock:
            if not self._is_open:
                return
            if self._num_serving:
                raise ConfigError("close", "rows are being served", fix="Leave every rows() first")
            for seat in self._seats.values():
                seat.give_back()
            self._seats, self._entries, self._is_open = {}, {}, False
            self._hook.remove()
            self._generate()
            self.model.__dict__.pop(BANK, None)

    def adapter_nbytes(self, name: str) -> int:
        """Return the memory of an adapter's own tensors in bytes."""
        return self._entry(name).nbytes

    def shared_nbytes(self) -> int:
        """Return the memory of the factors, which all adapters share, in bytes."""
        return sum(layer.nbytes for layer in self._admission.layers.values())

    def _check_open(self) -> None:
        if not self._is_open:
            raise ConfigError("AdapterBank", "the bank is closed", fix="Create another one of the model")

    def _check_dtype(self) -> None:
        """Check that the model was not cast after the first adapter was read, whose tensors a cast does not reach."""
        now = plain_dtype(self.model)
        if now == self._dtype:
            return
        if any(isinstance(entry, Entry) for entry in self._entries.values()):
            before, after = (str(dtype).removeprefix("torch.") for dtype in (self._dtype, now))
            raise ConfigError(
                "AdapterBank", f"its model was cast from {before} to {after}, and the adapters were not",
                fix="Cast the model before the bank is created",
            )  # fmt: skip
        self._dtype = now

    def _find(self, name: str) -> Entry | ReadAdapter:
        self._check_open()
        found = self._entries.get(name)
        if found is None:
            names = list(self._entries)
            problem = f"no adapter is called {name!r}.{did_you_mean(str(name), names)}"
            raise ConfigError("bank", problem, allowed=first_of(names, 8) or "none yet")
        return found

    def _entry(self, name: str) -> Entry:
        """Return the adapter called ``name``, reading and checking it at its first use."""
        found = self._find(name)
        if isinstance(found, Entry):
            return found
        entry = self._admitted(found())
        with self._lock:
            if self._entries.get(name) is found:
                self._entries = {**self._entries, name: entry}
        return entry

    def _admitted(self, adapter: AdapterFile) -> Entry:
        outside = _SERVING.set({key: own for key, own in _SERVING.get({}).items() if key != id(self)})
        try:  # leave any rows that this thread serves, so that the weights of the base are read
            entry = self._admission.admit(adapter)
        finally:
            _SERVING.reset(outside)
        with self._lock:
            for path in (*entry.structure.by_module, *entry.structure.saved):
                module = self.model.get_submodule(path)
                if path not in self._seats:
                    self._seats[path] = Seat.take(path, module, self._serving, self._peek)
                seat = self._seats[path]
                own = entry.structure.saved.get(path, {"weight": ""})
                seat.guarded |= own.keys()
        return entry

    def _check_name(self, name: str, *, replace: bool) -> None:
        if name in self._entries and not replace:
            raise ConfigError("bank", f"'{name}' is taken", fix="Choose another name, or give replace=True")

    def __reduce__(self) -> Any:
        raise ConfigError(
            "AdapterBank", "a model in a bank cannot be copied", fix="Copy it before, or close() the bank"
        )

    def _peek(self) -> Serving | None:
        """Return the rows that the calling thread serves, or None."""
        return _SERVING.get({}).get(id(self))

    def _serving(self) -> Serving | None:
        """Return the rows that the calling thread serves, or None; raise if the base was probably not intended."""
        found = self._peek()
        if found is None and self._num_serving:
            raise ConfigError(
                "bank", "the model is called outside rows() while another thread is in it",
                fix="Enter rows() in the thread that calls the model; bank.rows([None] * n) is the base model",
            )  # fmt: skip
        return found

    def _check_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check that a batch has as many rows as adapters were named."""
        serving = self._serving()
        if serving is None:
            return
        self._check_dtype()
        named = [kwargs.get(str(name)) for name in (getattr(model, "main_input_name", None), *_MAIN_INPUTS)]
        _check_rows(serving, *named, *args)
        own = getattr(getattr(model, "config", None), "num_labels", None)
        widths = {entry.structure.num_labels for entry in serving.entries if entry is not None}
        if widths - {None, own} and kwargs.get("labels") is not None:
            raise ConfigError(
                "rows", f"the model computes a loss over its own {own} outputs, and a row's adapter has another number",
                fix="Call it without labels",
            )  # fmt: skip


def _check_rows(serving: Serving, *inputs: Any) -> None:
    """Refuse inputs whose first tensor has not as many rows as were named."""
    batch = next((t for t in inputs if isinstance(t, Tensor) and t.dim()), None)
    count, rows = len(serving.names), 0 if batch is None else batch.shape[0]
    if batch is not None and rows != count and not (serving.is_generating and rows % count == 0):
        raise ConfigError(
            "rows", f"the batch has {rows} rows, and {count} were named", fix="Name an adapter, or None, for each"
        )


def _own_folder(folder: Path) -> Path:
    """Return the adapter folder; raise an error if PEFT wrote it."""
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter.json").is_file():
        raise ConfigError(
            str(folder), "it holds an adapter of PEFT, which a bank does not mix", allowed="adapters of mirrortune",
            fix="Load it with PEFT, whose forward takes adapter_names",
        )  # fmt: skip
    return folder


def _replace_generate(model: nn.Module, find: Callable[[], Serving | None]) -> Callable[[], None]:
    """Make the model's ``generate`` announce that rows may be repeated; return a function that undoes this."""
    generate = getattr(model, "generate", None)
    if generate is None:
        return lambda: None
    before = vars(model).get("generate")

    def generate_rows(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        serving = find()
        if serving is None:
            return generate(*args, **kwargs)
        _check_rows(serving, *args, *(kwargs.get(n) for n in ("inputs", *_MAIN_INPUTS)))
        serving.is_generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            serving.is_generating = False

    model.__dict__["generate"] = types.MethodType(generate_rows, model)

    def undo() -> None:
        del model.__dict__["generate"]
        if before is not None:
            model.__dict__["generate"] = before

    return undo
