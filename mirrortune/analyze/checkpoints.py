# SPDX-License-Identifier: Apache-2.0
"""Open the checkpoints to compare: a folder, a Hub id, a file, a run, an adapter of mirrortune or PEFT."""

from __future__ import annotations

from pathlib import Path

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.find import find_adapter
from mirrortune.analyze.weights import AdaptedWeights, StoredWeights, Weights, load_peft, read_config
from mirrortune.errors import ConfigError
from mirrortune.models.load import find_model
from mirrortune.system.hub import hub_errors, local_adapter, resolve_commit
from mirrortune.system.outputs import restore
from mirrortune.system.paths import PACKAGE_SCHEME, is_local, local_path, package_folder
from mirrortune.system.tensor_files import INDEX, WHOLE, index_of


def open_pair(
    base: str, tuned: str | None, base_revision: str | None, tuned_revision: str | None
) -> tuple[Weights, Weights]:
    """Open both sides of a comparison; reads nothing but headers and small files.

    Args:
        base: the checkpoint before fine-tuning; or an adapter, if ``tuned`` is None.
        tuned: the checkpoint after fine-tuning; None for an adapter, which names its base.
        base_revision: of a Hub repository.
        tuned_revision: of a Hub repository.

    Raises:
        ConfigError: no such place, or nothing in it that can be compared.
        HubError: the Hub refused something.
        VerificationError: a damaged adapter.
    """
    if tuned is not None:
        before = open_weights(base, base_revision)
        # The named base is put under the adapter, unless it is an adapter itself.
        return before, open_weights(tuned, tuned_revision, before if before.base is None else None)
    after = open_weights(base, base_revision)
    if after.base is None:
        raise ConfigError(
            base, "it is no adapter, so it does not say what it was made from",
            fix="Give both: mirrortune analyze BASE TUNED",
        )  # fmt: skip
    return after.base, after


def open_weights(name: str, revision: str | None, beneath: Weights | None = None) -> Weights:
    """Open the weights at ``name``; an adapter is put on ``beneath``, or on the base that it names itself."""
    restore(local_path(name))
    if not is_local(name):
        return _open_hub(name, revision, beneath)
    if revision is not None:
        raise ConfigError("--revision", f"'{name}' is local and has none", fix="Remove it")
    path = package_folder(name) if name.startswith(PACKAGE_SCHEME) else local_path(name)
    if path.is_file() and path.suffix == ".safetensors":
        return StoredWeights.of_files(name, [path])
    if not path.is_dir():
        raise ConfigError(name, "no such folder", fix="Check the path")
    adapter = find_adapter(str(path))
    if adapter is not None:
        return _open_adapter(name, adapter, beneath)
    if (path / "adapter_config.json").is_file():
        return _open_peft(name, path, beneath)
    source = find_model(name) if (path / "config.json").is_file() else None
    return StoredWeights.of_files(name, _files_in(path, name), source)


def _open_hub(name: str, revision: str | None, beneath: Weights | None) -> Weights:
    from transformers.utils.hub import cached_file  # noqa: PLC0415

    commit = resolve_commit(name, name, revision, "model", "the model")

    def file(filename: str) -> Path | None:
        with hub_errors(f"model '{name}'", flag="the model"):
            found = cached_file(name, filename, revision=commit, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    if file("adapter.json"):
        return _open_adapter(name, local_adapter(name), beneath)
    if config := file("adapter_config.json"):
        file("adapter_model.safetensors")
        return _open_peft(name, config.parent, beneath)
    source = find_model(name, revision=revision)
    if index := file(INDEX):
        found = [path for shard in index_of(index) if (path := file(shard))]
        return StoredWeights.of_files(name, found, source)
    if whole := file(WHOLE):
        return StoredWeights.of_files(name, [whole], source)
    raise _no_safetensors(name)


def _open_adapter(name: str, folder: Path, beneath: Weights | None) -> Weights:
    adapter = read_adapter(folder)
    if beneath is None and not adapter.base.get("name"):
        raise ConfigError(name, "the adapter does not say what its base is", fix="Give the base first")
    revision = adapter.base.get("commit") or adapter.base.get("revision")
    base = beneath or open_weights(adapter.base["name"], revision)
    if adapter.peft_config is not None:
        return load_peft(name, str(folder), base)
    return AdaptedWeights.of_adapter(name, base, adapter, FactorCache())


def _open_peft(name: str, folder: Path, beneath: Weights | None) -> Weights:
    config = read_config(name, folder)
    own, revision = config.get("base_model_name_or_path"), config.get("revision")
    if beneath is None and not (own and isinstance(own, str) and isinstance(revision, str | None)):
        raise ConfigError(name, "the adapter does not say what its base is", fix="Give the base first")
    return load_peft(name, str(folder), beneath or open_weights(str(own), revision))


def _files_in(folder: Path, name: str) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        return [folder / shard for shard in index_of(index)]
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    raise _no_safetensors(name)


def _no_safetensors(name: str) -> ConfigError:
    return ConfigError(
        name, "it holds no safetensors files", allowed="a checkpoint in safetensors, a run, or an adapter",
        fix="Convert it: load it with transformers and call save_pretrained",
    )  # fmt: skip
