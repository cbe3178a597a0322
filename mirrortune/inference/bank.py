# SPDX-License-Identifier: Apache-2.0
"""Many adapters on one base model, mixed in one batch."""

from __future__ import annotations

import json
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.inject import Attachment
from mirrortune.errors import ConfigError, did_you_mean
from mirrortune.inference.bank_entries import Admission, Entry
from mirrortune.inference.bank_file import StoredAdapter, open_bank, save_bank
from mirrortune.inference.bank_layers import Seat, Serving
from mirrortune.inference.batch_axes import layers_without_rows
from mirrortune.system.hub import local_adapter

_SERVING: ContextVar[Mapping[int, Serving]] = ContextVar("mirrortune_serving")
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")


class AdapterBank:
    """Many trained adapters on one base model; every row of a batch is computed with its own.

    All adapters of a base share its singular factors, which are held once. An adapter itself is its trained numbers:
    angles, scales, small matrices, and a head. Within :meth:`rows` the model computes each row as it would with that
    row's adapter alone; outside it is the base model. The model's weights are not changed, and must not be while the
    bank is in use.

    Adding and removing adapters is safe while other threads serve: rows that are being served keep the adapters they
    began with. Threads may serve different rows of one model at the same time.

    Args:
        model: the base model, without an adapter.
        on_layer: called with a layer's name whenever its weight has been factorised, for progress.

    Raises:
        ConfigError: the model has an adapter, or is in another bank.

    Example:
        >>> bank = mirrortune.AdapterBank(model)  # doctest: +SKIP
        >>> bank.add("shop-17", "runs/shop-17")  # doctest: +SKIP
        >>> with bank.rows(["shop-17", None]):  # doctest: +SKIP
        ...     logits = model(**batch).logits
    """

    def __init__(self, model: nn.Module, *, on_layer: Callable[[str], None] | None = None) -> None:
        if isinstance(getattr(model, "mirrortune", None), Attachment):
            raise ConfigError("AdapterBank", "the model has an adapter already", fix="Load the base model anew")
        if "_mirrortune_bank" in vars(model):
            raise ConfigError("AdapterBank", "the model is in another bank", fix="Use that one, or close() it first")
        self.model = model
        self._entries: dict[str, Entry | StoredAdapter] = {}
        self._seats: dict[str, Seat] = {}
        self._admission = Admission(model, FactorCache(on_layer=on_layer), layers_without_rows(model))
        self._lock = threading.RLock()
        self._num_serving = 0
        model.__dict__["_mirrortune_bank"] = self
        self._hook = model.register_forward_pre_hook(self._check_batch, with_kwargs=True)
        self._generate = _replace_generate(model, self._serving)

    @classmethod
    def load(cls, model: nn.Module, path: str | Path, *, on_layer: Callable[[str], None] | None = None) -> AdapterBank:
        """Make a bank of the adapters at ``path``; each is read and checked when it is first used.

        Args:
            model: the base model.
            path: a file of :meth:`save`, or a folder that holds a folder, named like the adapter, for each.
            on_layer: see the class.

        Raises:
            VerificationError: the file is damaged or of a newer format.
            ConfigError: there is no adapter at ``path``.
        """
        stored = open_bank(Path(path))
        bank = cls(model, on_layer=on_layer)
        bank._entries = dict(stored)
        return bank

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def add(
        self,
        name: str,
        adapter: str | Path | AdapterFile,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        replace: bool = False,
    ) -> None:
        """Add an adapter, with the checks of :func:`mirrortune.load_adapter`.

        Args:
            name: what :meth:`rows` will call it.
            adapter: its folder, that of its run, a Hub id, or the file read.
            revision: branch, tag or commit of a Hub repository.
            subfolder: of the folder or the repository.
            replace: take the place of an adapter of that name; otherwise there must be none.

        Raises:
            ConfigError: a name that is taken, an adapter of PEFT, or a layer of which rows cannot have their own.
            VerificationError: another base, a basis that cannot be aligned, or a damaged file.
        """
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ConfigError("name", f"got {name!r}", allowed="printable text")
        self._check_name(name, replace=replace)
        if not isinstance(adapter, AdapterFile):
            adapter = read_adapter(_own_folder(local_adapter(adapter, revision=revision, subfolder=subfolder)))
        entry = self._admitted(adapter)
        with self._lock:
            self._check_name(name, replace=replace)
            self._entries = {**self._entries, name: entry}  # never changed: others may be looking

    def remove(self, name: str) -> None:
        """Remove an adapter; rows that are being served with it are finished.

        Raises:
            ConfigError: there is no adapter of that name.
        """
        with self._lock:
            self._find(name)
            self._entries = {own: entry for own, entry in self._entries.items() if own != name}

    def num_labels(self, name: str) -> int | None:
        """Return how many outputs the head of an adapter has; None without a head.

        Where rows of a batch have different numbers of classes, logits are as wide as the widest row's, and minus
        infinity in the columns that a row does not have: ``logits[i, : bank.num_labels(name)]`` are its own.
        """
        return self._entry(name).structure.num_labels

    def recorded(self, name: str) -> dict[str, Any]:
        """Return what the file of an adapter says of its training: ``base``, ``task`` and ``max_length``."""
        return dict(json.loads(self._entry(name).own))

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within, the model computes row i of every batch with the adapter ``names[i]``, or plainly for None.

        ``generate`` may make several sequences of a row (beams, ``num_return_sequences``); they have the row's adapter.
        A row that holds several packed sequences has one adapter for all.

        Args:
            names: one for each row of the batch.

        Raises:
            ConfigError: an unknown name, or no names. Inside: a batch with another number of rows.
        """
        if isinstance(names, str) or not names:
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

        A file that an earlier ``save`` wrote is replaced, whole or not at all; any other file is refused.

        Args:
            path: of the file; its name ends in ``.safetensors``.

        Raises:
            ConfigError: ``path`` holds something else.
            ResourceError: it cannot be written.
        """
        entries = {name: self._entry(name) for name in self.names}
        save_bank(Path(path), entries)

    def close(self) -> None:
        """Give the model back as it was; the bank cannot be used any more.

        Raises:
            ConfigError: rows are being served.
        """
        with self._lock:
            if self._num_serving:
                raise ConfigError("close", "rows are being served", fix="Leave every rows() first")
            for seat in self._seats.values():
                seat.give_back()
            self._seats, self._entries = {}, {}
            self._hook.remove()
            self._generate()
            self.model.__dict__.pop("_mirrortune_bank", None)

    def adapter_nbytes(self, name: str) -> int:
        """Return the memory that an adapter takes by itself, in bytes."""
        return self._entry(name).nbytes

    def shared_nbytes(self) -> int:
        """Return the memory of the factors, which all adapters share, in bytes."""
        return sum(layer.nbytes for layer in self._admission.layers.values())

    def _find(self, name: str) -> Entry | StoredAdapter:
        found = self._entries.get(name)
        if found is None:
            names = list(self._entries)
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ConfigError(
                "bank", f"no adapter is called {name!r}.{did_you_mean(str(name), names)}", allowed=shown or "none yet"
            )
        return found

    def _entry(self, name: str) -> Entry:
        """Return the adapter called ``name``, read and checked if it was not yet."""
        found = self._find(name)
        if isinstance(found, Entry):
            return found
        entry = self._admitted(found.read())
        with self._lock:
            if self._entries.get(name) is found:
                self._entries = {**self._entries, name: entry}
        return entry

    def _admitted(self, adapter: AdapterFile) -> Entry:
        outside = _SERVING.set({key: own for key, own in _SERVING.get({}).items() if key != id(self)})
        try:  # of rows, if this thread is in some: the base's own weights are read
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
        """Return what the calling thread serves."""
        return _SERVING.get({}).get(id(self))

    def _serving(self) -> Serving | None:
        """Return what the calling thread serves; refuse to compute the base where rows were probably meant."""
        found = self._peek()
        if found is None and self._num_serving:
            raise ConfigError(
                "bank", "the model is called outside rows() while another thread is in it",
                fix="Enter rows() in the thread that calls the model; bank.rows([None] * n) is the base model",
            )  # fmt: skip
        return found

    def _check_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a batch that has not as many rows as were named."""
        serving = self._serving()
        if serving is None:
            return
        main = getattr(model, "main_input_name", None)
        named = [kwargs.get(name) for name in (main, *_MAIN_INPUTS) if name is not None]
        batch = next((t for t in (*named, *args) if isinstance(t, Tensor) and t.dim()), None)
        if batch is None:
            return
        count, rows = len(serving.names), batch.shape[0]
        if rows != count and not (serving.is_generating and rows % count == 0):
            raise ConfigError(
                "rows", f"the batch has {rows} rows, and {count} were named", fix="Name an adapter, or None, for each"
            )


def _own_folder(folder: Path) -> Path:
    """Refuse a folder that PEFT wrote, by what it says of itself."""
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter.json").is_file():
        raise ConfigError(
            str(folder), "it holds an adapter of PEFT, which a bank does not mix", allowed="adapters of mirrortune",
            fix="Load it with PEFT, whose forward takes adapter_names",
        )  # fmt: skip
    return folder


def _replace_generate(model: nn.Module, find: Callable[[], Serving | None]) -> Callable[[], None]:
    """Let the model's ``generate`` say that its rows may be repeated; returns what undoes this."""
    generate = getattr(model, "generate", None)
    if generate is None:
        return lambda: None
    before = vars(model).get("generate")

    def generate_rows(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        serving = find()
        if serving is None:
            return generate(*args, **kwargs)
        inputs = [*args, *(kwargs.get(n) for n in ("inputs", *_MAIN_INPUTS))]
        batch = next((t for t in inputs if isinstance(t, Tensor) and t.dim()), None)
        if batch is not None and batch.shape[0] != len(serving.names):
            problem = f"the batch has {batch.shape[0]} rows, and {len(serving.names)} were named"
            raise ConfigError("rows", problem, fix="Name an adapter, or None, for each")
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
