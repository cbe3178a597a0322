# SPDX-License-Identifier: Apache-2.0
"""Open the checkpoints to compare, each a folder, a Hub id, a file, a run, or an adapter of mirrortune or PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.find import find_adapter
from mirrortune.analyze.weights import AdaptedWeights, StoredWeights, Weights, load_peft, read_config
from mirrortune.errors import ConfigError
from mirrortune.models.load import find_model
from mirrortune.models.load_errors import quiet
from mirrortune.system.hub import hub_errors, local_adapter, resolve_commit
from mirrortune.system.outputs import restore
from mirrortune.system.paths import ModelPlace, local_path
from mirrortune.system.tensor_files import INDEX, WHOLE, index_of


def open_pair(
    base: str, tuned: str | None, base_revision: str | None, tuned_revision: str | None
) -> tuple[Weights, Weights]:
    """Open both sides of a comparison, reading only headers and small files.

    Args:
        base: checkpoint before fine-tuning or, if ``tuned`` is None, an adapter.
        tuned: checkpoint after fine-tuning; None to compare the adapter ``base`` with the base that it names.
        base_revision: revision of ``base`` on the Hub, or None.
        tuned_revision: revision of ``tuned`` on the Hub, or None.

    Raises:
        ConfigError: a place does not exist or holds nothing that can be compared.
        HubError: a download failed.
        VerificationError: an adapter is damaged.
    """
    if tuned is not None:
        before = open_weights(base, base_revision)
        # An adapter is applied to the base named by the user, unless that is an adapter itself.
        return before, open_weights(tuned, tuned_revision, before if before.base is None else None)
    after = open_weights(base, base_revision)
    if after.base is None:
        raise ConfigError(
            base, "it is not an adapter, so its base is not known",
            fix="Give both: mirrortune analyze BASE TUNED",
        )  # fmt: skip
    return after.base, after


def open_weights(name: str, revision: str | None, beneath: Weights | None = None, *, is_base: bool = False) -> Weights:
    """Open the weights at ``name``; an adapter is applied to ``beneath`` or, if None, to the base that it names.

    With ``is_base``, an adapter names it as its base: only the model is opened, even if its folder holds an adapter
    too, such as the one that names it.
    """
    restore(local_path(name))
    place = ModelPlace.parse(name)
    if place.is_local:
        if revision is not None:
            raise ConfigError("--revision", f"'{name}' is local and has none", fix="Remove it")
        path = place.path()
        if path.is_file() and path.suffix == ".safetensors":
            return StoredWeights.of_files(name, [path])
        if not path.is_dir():
            moved = "An adapter names it as its base; if it has moved, give both: mirrortune analyze BASE ADAPTER"
            raise ConfigError(name, "no such folder", fix=moved if is_base else "Check the path")
        file, adapter, others = _finder(path), find_adapter(str(path)), sorted(path.glob("*.safetensors"))
    else:
        file, others = _hub_finder(name, revision), []
        adapter = local_adapter(name) if file("adapter.json") else None
    config = None if adapter is not None else file("adapter_config.json")
    if is_base and (adapter or config):
        if not (file(INDEX) or file(WHOLE)):
            problem, fix = "an adapter names it as its base, and it is an adapter itself", "Merge it first"
            raise ConfigError(name, problem, fix=f"{fix}, and give both: mirrortune analyze MERGED ADAPTER")
    elif adapter is not None:
        return _open_adapter(name, adapter, beneath)
    elif config is not None:
        file("adapter_model.safetensors")  # PEFT reads it from the same folder
        return _open_peft(name, config.parent, beneath)
    source = find_model(name, revision=revision) if file("config.json") or not place.is_local else None
    if index := file(INDEX):
        files = [file(shard) or index.parent / shard for shard in index_of(index)]
    else:
        files = [whole] if (whole := file(WHOLE)) else others
    if not files:
        raise ConfigError(
            name, "it holds no safetensors files", allowed="a checkpoint in safetensors, a run, or an adapter",
            fix="Convert it: load it with transformers and call save_pretrained",
        )  # fmt: skip
    return StoredWeights.of_files(name, files, source)


def _finder(folder: Path) -> Callable[[str], Path | None]:
    return lambda filename: found if (found := folder / filename).is_file() else None


def _hub_finder(name: str, revision: str | None) -> Callable[[str], Path | None]:
    """Return a function that downloads a file of a repository, and returns None if the file does not exist."""
    from transformers.utils.hub import cached_file  # noqa: PLC0415

    commit = resolve_commit(name, name, revision, "model", "the model")

    def file(filename: str) -> Path | None:
        with hub_errors(f"model '{name}'", flag="the model"), quiet():
            found = cached_file(name, filename, revision=commit, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    return file


def _open_adapter(name: str, folder: Path, beneath: Weights | None) -> Weights:
    adapter = read_adapter(folder)
    if beneath is None and not adapter.base.get("name"):
        raise ConfigError(name, "the adapter does not say what its base is", fix="Give the base first")
    revision = adapter.base.get("commit") or adapter.base.get("revision")
    base = beneath or open_weights(adapter.base["name"], revision, is_base=True)
    if adapter.peft_config is not None:
        return load_peft(name, str(folder), base)
    return AdaptedWeights.of_adapter(name, base, adapter, FactorCache())


def _open_peft(name: str, folder: Path, beneath: Weights | None) -> Weights:
    config = read_config(name, folder)
    own, revision = config.get("base_model_name_or_path"), config.get("revision")
    if beneath is None and not (own and isinstance(own, str) and isinstance(revision, str | None)):
        raise ConfigError(name, "the adapter does not say what its base is", fix="Give the base first")
    return load_peft(name, str(folder), beneath or open_weights(str(own), revision, is_base=True))
