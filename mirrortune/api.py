# SPDX-License-Identifier: Apache-2.0
"""The Python API, for notebooks, the transformers Trainer, TRL or any torch training loop.

Functions change the model in place.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import weakref
from collections.abc import Collection, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from mirrortune.adapters import inject
from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import adapter_contents, outdated_files, read_adapter
from mirrortune.adapters.files.load import FingerprintBook, adapt, load_into, restore_into
from mirrortune.adapters.files.tensors import Form, changed_weights, sampled_weights
from mirrortune.adapters.inject import attachment, changes, check_plain, check_unwrapped, unwrapped
from mirrortune.adapters.pairings.listed import PairLists
from mirrortune.adapters.plain import RowRange
from mirrortune.adapters.spec import AdapterSpec, as_asked, check_asked
from mirrortune.adapters.svd import Rank
from mirrortune.errors import ConfigError, ResourceError, first_of, in_python_terms
from mirrortune.merging.bases import class_fields
from mirrortune.merging.gguf import export_gguf
from mirrortune.merging.lora import export_lora
from mirrortune.merging.push import cards_kept, kept_notes, pack_adapter
from mirrortune.merging.write import merge_folder
from mirrortune.models.new_tokens import make_room
from mirrortune.system.atomic import clear_leftovers, write_files_atomically
from mirrortune.system.claims import claimed
from mirrortune.system.hub import ADAPTER_FILES, check_repository, local_adapter, path_inside, upload
from mirrortune.system.outputs import check_names
from mirrortune.system.paths import local_path

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")
T = TypeVar("T")
# Attributes of a model:
_NEW_TOKENS = "_mirrortune_new_tokens"  # the new tokens that it has rows for
_TRAINED = "_mirrortune_trained"  # names of the parameters that the adapter trains
_SAMPLES = "_mirrortune_samples"  # some values of each adapted weight
_LOADED_IN = "_mirrortune_loaded_in"  # dtype of the base, which may be cast later
# Parts of names that torch.compile, activation checkpointing, FSDP and parallel wrappers add to the modules inside.
_OF_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


@in_python_terms
def attach(
    model: M,
    method: str = "mirror-scale",
    rank: Rank | None = None,
    pairing: str | PairLists | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
    split: dict[str, Any] | None = None,
    also_train: str | Sequence[str] = (),
    **core_options: Any,
) -> M:
    """Attach an adapter to ``model`` in place, and freeze all other parameters except the task head.

    The weight (out, in) of every adapted layer is factored as U diag(S) Vh, and the layer computes with
    W' = W + U_r (K - diag(S_r)) Vh_r; only the parameters of the core K are trained, in float32. ``docs/methods.md``
    defines K for each method and cites the papers. For PEFT's tuners, PEFT adds its own layers.

    Args:
        model: transformers model, or any torch module, with its weights loaded and without an adapter.
        method: name of a method from ``mirrortune.adapters.methods.method_names()``, such as ``mirror``.
        rank: number r of leading singular directions, at least 1; a layer with fewer directions uses all of them.
            ``"full"`` is min(out, in), ``"out"`` the number of outputs. For a PEFT tuner and the LoRA branch of
            ``speclora``, their r. None for the method's default.
        pairing: directions that rotate together: the name of a pairing, a list of pairs such as ``[[0, 5], [1, 7]]``
            (for several rounds, a list of such lists), or a dict of lists by layer name or pattern. None for the
            method's default.
        target_modules: ``all-linear``, ``all-layers`` (includes convolutions), or a regular expression for layer names,
            which may match from any dot on, or a list of such expressions.
        seed: seed of random pairs and positions, from 0 to 2**63 - 1.
        split: fused layers whose parts get separate bases, by a regular expression for their names: ``{"c_attn": 3}``,
            ``{"qkv_proj": [4, 1, 1]}``, or ``{"query_key_value": {"parts": 3, "repeat": 12}}`` if each of 12 heads has
            its own q, k and v.
        also_train: parameters of the base model to train directly, besides the adapter: ``norms``, ``biases``,
            ``embeddings``, or a regular expression for names of parameters or modules; one entry or a list.
        **core_options: options of the method's core, such as ``scale_top_k=8``.

    Returns:
        ``model`` itself; only the trained parameters require gradients.

    Raises:
        ConfigError: a name is unknown, a value has a wrong type or range, the rank or pairs do not fit, no layer
            matches, or the model is wrapped, on the meta device, or has an adapter already.
    """
    check_unwrapped(model, "attach")
    _check_has_values(model, "attach")
    asked = AdapterSpec(
        method=method,
        rank=_whole(rank),
        pairing=pairing,
        target_modules=_one_pattern(_texts("target_modules", target_modules)),
        seed=_whole(seed),
        options=core_options,
        split=split or {},
        also_train=_texts("also_train", also_train),
    )
    _check_types(asked)
    spec = as_asked(asked)
    check_asked(spec)
    _remember(model, adapt(model, spec, factor_source=FactorCache()))
    return model


@in_python_terms
def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    form: Form = "auto",
    repository: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    replace_card: bool = False,
) -> None:
    """Write the adapter and head of an adapted model to ``directory``, and optionally upload them to the Hub.

    Files of the same names are replaced, each atomically; other files in ``directory`` are kept and not uploaded. If
    the process ends between two files, loading refuses the folder.

    Args:
        model: model adapted by :func:`attach` or :func:`load_adapter`; torch's wrappers (``torch.compile``,
            ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel``) are removed.
        directory: folder to write to.
        form: ``compact`` writes kilobytes, and loading recomputes and aligns the basis. ``portable`` also writes the
            factors, about the size of a LoRA of the same rank, and loads without a decomposition. ``auto`` is compact,
            unless the basis cannot be recomputed exactly, or recomputing takes minutes (large matrices) and no layer
            uses more than an eighth of its directions.
        repository: Hub id, ``name`` or ``owner/name``; the repository is created if it does not exist. A ``README.md``
            in ``directory`` that was written by hand is sent as its model card.
        revision: existing branch of the repository.
        subfolder: subfolder of ``directory`` and of the repository; pass it to :func:`load_adapter` as well.
        replace_card: replace a model card in the repository that was written or edited by hand; by default it is kept,
            with a warning.

    Raises:
        ConfigError: the model has no adapter, ``directory`` is a file, the id is invalid, parameters require
            gradients that neither the adapter nor ``also_train`` holds, or trained parameters are not finite.
        HubError: the upload failed.
    """
    if repository is not None:
        check_repository(repository)
    elif revision is not None:
        raise ConfigError("revision", f"'{directory}' is a folder and has none", fix="Name a repository, or remove it")
    if form not in get_args(Form):
        raise ConfigError("form", f"got {form!r}", allowed=", ".join(get_args(Form)))
    model = unwrapped(model)
    check_saved_whole(model)
    _check_finite(model)
    _warn_of_changed_weights(model)
    base = _describe_base(model)

    files = adapter_contents(model, _book_of(model).entries, base=base, task=None, extra={}, form=form)
    target = local_path(directory) / path_inside(subfolder)
    _save_files(target, files)
    if repository is not None:
        _send(target, repository, revision, subfolder, replace_card=replace_card)


def _save_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of an adapter to a folder, and remove files of an earlier adapter with other names."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(str(folder), "it is a file", fix="Name a folder")
    check_names(folder, str(folder))
    with ExitStack() as held:
        with suppress(ResourceError):  # the folder may be writable even if its parent is not
            held.enter_context(claimed(folder, wait=True))
        clear_leftovers(folder, lambda name: name in ADAPTER_FILES)
        outdated = outdated_files(folder, files)
        write_files_atomically(folder, files)
        for path in outdated:
            path.unlink(missing_ok=True)


@in_python_terms
def load_adapter(
    model: M,
    directory: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    force_base: bool = False,
) -> M:
    """Attach a saved adapter to its base ``model`` in place, and set the class names of its head in ``model.config``.

    The adapter reproduces the trained change to rounding, or an error is raised.

    Args:
        model: base model from any source; it is identified by the values of its weights. For an adapter with new
            tokens, its embeddings are resized.
        directory: adapter folder, run directory, or Hub id.
        revision: branch, tag or commit of a Hub repository.
        subfolder: subfolder of the folder or the repository.
        force_base: dangerous: accept a base with different weights, with a warning.

    Returns:
        ``model`` itself, with the adapter attached.

    Raises:
        ConfigError: the model has an adapter already, is wrapped, or is in a bank.
        VerificationError: the base is not that of the adapter, a basis cannot be aligned, or a file is damaged.
        HubError: the download failed.

    Example:
        >>> mirrortune.load_adapter(model, "me/adapters", revision="v1", subfolder="sst2")  # doctest: +SKIP
    """
    check_unwrapped(model, "load_adapter")
    check_plain(model, "load_adapter")
    _check_has_values(model, "load_adapter")
    folder = local_adapter(directory, revision=revision, subfolder=subfolder)
    adapter = read_adapter(folder)
    names = class_fields(adapter)
    rows = [found for name in adapter.plain if (found := RowRange.parse(name))]
    with changes(model) if rows else nullcontext():
        for new in rows:
            make_room(model, new.first, new.stop)
            vars(model)[_NEW_TOKENS] = adapter.base.get("new_tokens", [])
        book = load_into(model, adapter, FactorCache(), force_base=force_base)
    for remark in book.remarks:
        warnings.warn(f"loaded by force: {remark}", stacklevel=3)
    if (config := getattr(model, "config", None)) is not None:
        for name, value in names.items():
            setattr(config, name, value)
    _remember(model, book)
    return model


def check_saved_whole(model: nn.Module) -> None:
    """Check that an adapted ``model`` trains only parameters that :func:`save_adapter` saves.

    Raises:
        ConfigError: the model has no adapter, or other parameters require gradients; the error names them.
    """
    attachment(model)
    saved = vars(model).get(_TRAINED)  # None if it was not attached by this module
    if saved is not None and (others := [name for name in _requiring_gradients(model) if name not in saved]):
        raise ConfigError(
            "model", "parameters outside the adapter require gradients, and an adapter would not hold them: "
            f"{first_of(others, 3)}",
            fix="Name them when attaching, attach(..., also_train=[...]), or freeze them with requires_grad_(False), "
            "which leaves their changes unsaved",
        )  # fmt: skip


def _check_finite(model: nn.Module) -> None:
    trained = {**inject.adapter_parameters(model), **inject.plain_parameters(model)}
    if broken := [name for name, parameter in trained.items() if not parameter.isfinite().all()]:
        raise ConfigError(
            "model", f"the training has diverged: trained parameters hold NaN or infinities: {first_of(broken, 3)}",
            fix="Train again with a lower learning rate; train a float16 model in bfloat16 or float32",
        )  # fmt: skip


def _warn_of_changed_weights(model: nn.Module) -> None:
    """Warn of base weights that differ by more than a cast from those that the adapter was attached to."""
    if changed := changed_weights(model, vars(model).get(_SAMPLES, {})):
        warnings.warn(
            f"weights of the base were changed after the adapter was attached: {first_of(changed, 3)}. The adapter is "
            "saved for the weights as they were, with which it acts otherwise than here; change weights before attach",
            stacklevel=4,
        )


def _requiring_gradients(model: nn.Module) -> list[str]:
    """Return the names of parameters that require gradients, without the parts that wrappers of modules inside add."""
    found = [name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [".".join(part for part in parts if part not in _OF_WRAPPERS) for parts in found]


def restore_adapter(model: nn.Module, directory: str | Path) -> None:
    """Restore the trained parameters of a saved adapter in a ``model`` that has the same adapter attached.

    Raises:
        VerificationError: the adapter or the base of the model differs from that of the saved one.
    """
    model = unwrapped(model)
    attachment(model)
    restore_into(model, read_adapter(local_adapter(directory)), _book_of(model))


@in_python_terms
def merge_adapter(
    base: str | Path | None,
    adapter: str | Path,
    output_dir: str | Path,
    format: str = "hf",
    *,
    rank: int | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    force_base: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into its base, or export it as a LoRA adapter, and verify the result.

    A warning is issued if the base lacks files, or if the model must be merged in memory.

    Args:
        base: folder or Hub id of the base; None for the base that the adapter names.
        adapter: adapter folder, run directory, or Hub id.
        output_dir: new or empty folder to write to.
        format: ``"hf"`` for plain weights in transformers' layout, ``"lora"`` for a LoRA in PEFT's format, ``"gguf"``
            for a LoRA in llama.cpp's format.
        rank: rank of the LoRA for ``"lora"`` and ``"gguf"``, at least 1: the best approximation of that rank is kept;
            None for the full rank of the change.
        revision: branch, tag or commit of the adapter's Hub repository.
        subfolder: subfolder of the adapter's folder or repository.
        force_base: dangerous: accept a base with different weights, with a warning.

    Returns:
        The fields of the verification. For ``"hf"``: ``max_abs_logit_error``, over logits or other outputs of the model
        (None if no valid inputs are known), ``max_rel_weight_error``, ``tolerance``, ``passed`` and more.

    Raises:
        ConfigError: an argument is invalid, or ``output_dir`` is not empty.
        VerificationError: base and adapter do not match, or the result is out of tolerance; nothing is written.
        HubError: a download failed.
    """
    for name, given in (("base", base), ("adapter", adapter)):
        if not (isinstance(given, str | os.PathLike) or (given is None and name == "base")):
            raise ConfigError(name, f"got {type(given).__name__}", allowed="a folder or Hub id, whose files are read")
    folder, target = local_adapter(adapter, revision=revision, subfolder=subfolder), local_path(output_dir)
    if format not in ("hf", "lora", "gguf"):
        raise ConfigError("format", f"got {format!r}", allowed="hf, lora, gguf")
    base = None if base is None else os.fspath(base)
    rank = _whole(rank)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
        raise ConfigError("rank", f"got {rank!r}", allowed="a whole number, or None")
    if rank is not None and format == "hf":
        raise ConfigError("rank", "plain weights have none", allowed="None, or format lora or gguf")
    verdict: Any
    remarks: list[str] | None = [] if force_base else None
    if format == "hf":
        adapters, factors = [read_adapter(folder)], FactorCache()
        verdict = merge_folder(adapters, target, factor_source=factors, base=base, remarks=remarks, on_note=_warn)
    else:
        write: Any = export_lora if format == "lora" else export_gguf
        verdict = write(str(folder), target, rank=rank, base=base, remarks=remarks)
    for remark in remarks or ():
        warnings.warn(f"merged by force: {remark}", stacklevel=3)
    return asdict(verdict)


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters of an adapted ``model``, excluding the task head, as papers count them.

    Raises:
        ConfigError: the model has no adapter.
    """
    return inject.trainable_parameters(unwrapped(model))


def _texts(where: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """Return one text, or several, as a tuple."""
    found = (given,) if isinstance(given, str) else given
    if not isinstance(found, Collection) or not all(isinstance(t, str) for t in found):
        raise ConfigError(where, f"got {given!r}", allowed="a text or a list of texts")
    return tuple(found)


def _whole(value: T) -> T | int:
    """Return a whole number of NumPy's as one of Python, which can be written to a file; others as they are."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _one_pattern(entries: tuple[str, ...]) -> str:
    if len(entries) > 1 and (words := [entry for entry in entries if entry in ("all-linear", "all-layers")]):
        problem = f"'{words[0]}' cannot be combined with others, got it in a list of {len(entries)}"
        raise ConfigError("target_modules", problem, fix="Give it alone, or patterns for names")
    return "|".join(entries)


def _check_types(asked: AdapterSpec) -> None:
    """Check the types of arguments that the recipe's schema checks for a run.

    Raises:
        ConfigError: types are wrong; it reports all of them.
    """
    rank, seed = asked.rank, asked.seed
    is_rank = rank in (None, "full", "out") or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0)
    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
    checks = [
        ("method", isinstance(asked.method, str), "a text"),
        ("rank", is_rank, "a whole number above 0, 'full', 'out', or None"),
        ("pairing", isinstance(asked.pairing, str | list | tuple | dict | None), "a name, a list, a dict, or None"),
        ("seed", is_seed, "a whole number from 0 to 2**63 - 1"),
        ("split", isinstance(asked.split, dict), "a dict of parts by layer names, or None"),
    ]
    if errors := [ConfigError(key, f"got {getattr(asked, key)!r:.60}", allowed=a) for key, ok, a in checks if not ok]:
        raise ConfigError.several(errors)


def _check_has_values(model: nn.Module, where: str) -> None:
    """Raise a ConfigError for a model on the meta device; of one that is offloaded, a few parameters may be there."""
    if {parameter.is_meta for parameter in model.parameters()} == {True}:
        fix = "Load them first, as from_pretrained does"
        raise ConfigError(where, "the model is on the meta device, its weights have no values", fix=fix)


def _send(folder: Path, repository: str, revision: str | None, subfolder: str | None, *, replace_card: bool) -> None:
    with tempfile.TemporaryDirectory() as staged:
        parcel = pack_adapter(folder, Path(staged), repository)
        if subfolder is not None:  # the model card describes the repository, not a subfolder
            del parcel.files["README.md"]
        for line in parcel.redaction.describe():
            warnings.warn(line, stacklevel=4)
        keep = cards_kept(replace_card=replace_card)
        done = upload(parcel.files, repository, revision=revision, subfolder=subfolder, keep=keep)
    for line in kept_notes(done):
        warnings.warn(line.replace("--replace-card", "replace_card=True"), stacklevel=4)


def _describe_base(model: nn.Module) -> dict[str, Any]:
    """Describe a base model that the caller loaded, for the adapter file: name, commit, dtype, class and labels."""
    config, tokens = getattr(model, "config", None), vars(model).get(_NEW_TOKENS)
    return {
        **({"new_tokens": tokens} if tokens else {}),
        "name": getattr(config, "_name_or_path", None) or None,
        "revision": None,
        "commit": getattr(config, "_commit_hash", None),
        "dtype": vars(model).get(_LOADED_IN, "float32"),
        "auto_class": type(model).__name__,
        "id2label": getattr(config, "id2label", None),  # gives the size of the head, which the base may lack
    }


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)


def _remember(model: nn.Module, book: FingerprintBook) -> None:
    model._mirrortune_fingerprints = book  # type: ignore[assignment]  # noqa: SLF001
    vars(model)[_LOADED_IN] = str(getattr(model, "dtype", "torch.float32")).removeprefix("torch.")
    vars(model)[_TRAINED] = frozenset(_requiring_gradients(model))
    vars(model)[_SAMPLES] = sampled_weights(model)
    if attachment(model).layers and (saving := _own_saving(model)):
        vars(model)[saving] = _OwnSaving(model)


# Methods by which models save themselves, and how the adapter is used instead. A SentenceTransformer calls the first
# in the second.
_SAVING = {
    "save": "load it with mirrortune.load_adapter; mirrortune.merge_adapter takes only adapters that were attached to "
    "the transformers model inside",
    "save_pretrained": "merge it into plain weights with mirrortune.merge_adapter",
}


def _own_saving(model: nn.Module) -> str | None:
    return next((name for name in _SAVING if callable(getattr(type(model), name, None))), None)


class _OwnSaving:
    """The ``save_pretrained`` or ``save`` of an adapted model, which warns: loading ignores the adapter's tensors.

    An error would lose a training whose plain Trainer saves at its end; the file does hold everything.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # else the model would be part of a cycle, and outlive its last reference

    def __getstate__(self) -> nn.Module | None:
        return self._model()

    def __setstate__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        name = _own_saving(model) or ""
        warnings.warn(
            f"{name} writes the tensors of the adapted layers, which are not read when the model is loaded: these "
            "layers would be initialised at random. Save the adapter with mirrortune.save_adapter(model, folder), and "
            f"{_SAVING[name]}; a Trainer saves adapters if its class is mirrortune.adapter_trainer(Trainer)",
            stacklevel=2,
        )
        return getattr(type(model), name)(model, *args, **kwargs)


def _book_of(model: nn.Module) -> FingerprintBook:
    book = model._mirrortune_fingerprints  # noqa: SLF001
    assert isinstance(book, FingerprintBook)
    return book
