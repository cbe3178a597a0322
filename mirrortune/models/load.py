# SPDX-License-Identifier: Apache-2.0
"""Load configuration, processor and model through transformers' Auto classes, from the Hub, a folder or a package.

The code knows no model families. Parameters that the checkpoint lacks (``new_parameters``) are taken as the task head.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from mirrortune.errors import ConfigError
from mirrortune.models.gaps import check_loaded, check_shapes, missing_in_base
from mirrortune.models.load_errors import damage_errors, load_errors, quiet
from mirrortune.models.new_tokens import add_tokens, make_room, token_rows
from mirrortune.models.quantized import can_be_dequantised, is_quantised, keep_trainable, loading_config
from mirrortune.models.remote_code import announce_code, refuse_foreign_files, refuse_kernels
from mirrortune.system.devices import is_slow
from mirrortune.system.hub import hub_errors, resolve_commit
from mirrortune.system.outputs import restore
from mirrortune.system.paths import ModelPlace
from mirrortune.system.tensor_files import INDEX, WHOLE, index_of

_LARGEST_DEFAULT = 1000  # tokens; a tokenizer without files has fewer: special tokens, and T5's sentinels
_TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "special_tokens_map.json",
)  # fmt: skip
_PICKLED = "pytorch_model.bin.index.json"
_COUNT = re.compile(r"(layers?|blocks?|depths?|experts|stages)$")  # suffixes of configuration keys that count modules
_MOST_LAYERS = 10_000
_SIZE = re.compile(r"(hidden_size|intermediate_size|ffn_dim|d_model|d_ff|n_embd|n_inner)$")
_LARGEST_SIZE = 2**20  # inputs or outputs of a layer; the largest known model has 53,248
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NoProcessorError(ConfigError):
    """A model lacks the files of its tokenizer, image processor or feature extractor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The source of a base model, with its configuration.

    Attributes:
        name: name as given by the user: Hub id, folder, or ``package:...``.
        location: argument of ``from_pretrained``.
        revision: revision of a Hub repository, or None.
        commit: commit of ``revision``, or None for local folders.
        trust_remote_code: run code from the repository.
        config: transformers' configuration.
        code_revision: commit of another repository that holds the model's code, or None.
        load_in: quantise the weights while loading, to ``8bit`` or ``4bit``; or None.
        gguf_file: name of the file of a GGUF model, which is dequantised while loading; or None.
        attention: transformers' ``attn_implementation``, or None for the model's default.
        is_local: ``name`` is not a Hub id.
        new_tokens: added to its tokenizer, each with a row of the embeddings.
    """

    name: str
    location: str
    revision: str | None
    commit: str | None
    trust_remote_code: bool
    config: Any
    code_revision: str | None = None
    load_in: str | None = None
    gguf_file: str | None = None
    attention: str | None = None
    is_local: bool = False
    new_tokens: tuple[str, ...] = ()

    @property
    def is_quantised(self) -> bool:
        """Whether the loaded model has quantised weights."""
        return self.load_in is not None or (is_quantised(self.config) and not can_be_dequantised(self.config))

    @property
    def is_stored_packed(self) -> bool:
        """Whether the files or the loaded model have quantised weights, so that the files differ from the adapted
        weights.
        """
        return self.is_quantised or self.gguf_file is not None or is_quantised(self.config)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for ``from_pretrained``, pinned to the commit if it is known."""
        revision = self.commit or self.revision
        pinned = {"revision": revision} if revision else {}
        if self.gguf_file:
            pinned["gguf_file"] = self.gguf_file
        if self.code_revision:
            pinned["code_revision"] = self.code_revision
        return {**pinned, "trust_remote_code": self.trust_remote_code}

    def file(self, name: str) -> Path | None:
        """Return the path of a file of the model, downloaded if necessary, or None if it does not exist."""
        from transformers.utils.hub import cached_file  # noqa: PLC0415

        with hub_errors(f"model '{self.name}'", flag="--model"), quiet():
            path = cached_file(self.location, name, revision=self.commit, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model and the names of the parameters that its checkpoint lacks; ``missing`` are those of the base model."""

    model: nn.Module
    new_parameters: tuple[str, ...]
    missing: tuple[str, ...] = ()


def find_model(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, load_in: str | None = None,
    new_tokens: Sequence[str] = (),
) -> ModelSource:  # fmt: skip
    """Find a model and read its configuration, without weights.

    Args:
        name: Hub id, folder, or ``package:...``; may end in the name of a GGUF file.
        revision: revision of a Hub repository.
        trust_remote_code: run code from the repository.
        load_in: see :class:`ModelSource`.
        new_tokens: see :class:`ModelSource`.

    Raises:
        ConfigError: the folder does not exist or holds no usable model.
        HubError: the download failed.
    """
    place, gguf_file = _split_gguf(name)
    location = str(ModelPlace.parse(place).path())
    restore(Path(location))
    is_local = ModelPlace.parse(name).is_local  # only now, since a folder of that name may have been restored
    is_folder = is_local and (gguf_file is None or ModelPlace.parse(place).is_local or Path(location).is_dir())
    if is_folder:
        folder = Path(location)
        if not folder.is_dir():
            fix = "Check the path; if the model has moved, give its place with --model"
            raise ConfigError("model.name", f"no such folder: {location}", fix=fix)
        if pipe := next((p for p in folder.iterdir() if p.exists() and not (p.is_file() or p.is_dir())), None):
            raise ConfigError(f"model '{name}'", f"{pipe} is a pipe or a device, and is not opened", fix="Remove it")
        if gguf_file and not (folder / gguf_file).is_file():
            raise ConfigError(
                "model.name", f"no such file: {folder / gguf_file}", fix="Check the path given to --model"
            )
        if not gguf_file and not (folder / "config.json").is_file():
            is_own = any((place / "adapter.json").is_file() for place in (folder, folder / "adapter"))
            fix = f"It holds an adapter: merge it (mirrortune merge {quote(name)} -o merged), and name that" * is_own
            what = f"{location} holds no config.json"
            raise ConfigError("model.name", what, allowed="a folder in the Hub's layout", fix=fix or None)
        if (folder / INDEX).is_file() and not (folder / WHOLE).is_file():
            index_of(folder / INDEX)  # checked, because transformers would follow file names out of the folder
        if (folder / _PICKLED).is_file():
            index_of(folder / _PICKLED, ".bin")
    commit = None if is_folder else resolve_commit(name, location, revision, "model", "--model")
    code_revision = announce_code(name, location, commit or revision) if trust_remote_code else None
    config = _read_config(
        name, location, commit or revision, gguf_file, trust_remote_code=trust_remote_code, code_revision=code_revision
    )
    if load_in is not None and is_quantised(config):
        raise ConfigError("model.load_in", f"the checkpoint is quantised already, got {load_in}", fix="Remove it")
    return ModelSource(
        name=name, location=location, revision=revision, commit=commit, trust_remote_code=trust_remote_code,
        code_revision=code_revision, config=config, load_in=load_in, gguf_file=gguf_file, is_local=is_local,
        new_tokens=tuple(new_tokens),
    )  # fmt: skip


def _read_config(
    name: str, location: str, revision: str | None, gguf_file: str | None, *, trust_remote_code: bool,
    code_revision: str | None,
) -> Any:  # fmt: skip
    from transformers import AutoConfig  # noqa: PLC0415  (a second to import)

    more = {"gguf_file": gguf_file} if gguf_file else {}
    more |= {"code_revision": code_revision} if code_revision else {}
    with (
        damage_errors(name, trust_remote_code=trust_remote_code),
        hub_errors(f"model '{name}'", flag="--model"),
        load_errors(name),
    ):
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code, **more)
    if not trust_remote_code:
        refuse_kernels(name, config)
        _check_values(name, config)
    return config


def _check_values(name: str, config: Any) -> None:
    """Raise ConfigError for configuration values with which transformers fails or builds an absurd number of layers."""
    if not isinstance(getattr(config, "dtype", None), torch.dtype | str | None):
        raise _unusable(name, f"(dtype is {config.dtype!r})")
    sections = [config.__dict__]
    while sections:
        for key, value in sections.pop().items():
            if isinstance(value, dict) or hasattr(value, "model_type"):
                sections.append(value if isinstance(value, dict) else value.__dict__)
            counts = value if isinstance(value, list) else [value]
            for pattern, most in ((_COUNT, _MOST_LAYERS), (_SIZE, _LARGEST_SIZE)):
                if pattern.search(str(key)) and any(isinstance(count, int) and count > most for count in counts):
                    raise _unusable(name, f"({key} is {value!r}, allowed are {most:,})")


def _unusable(name: str, why: str) -> ConfigError:
    return ConfigError(f"model '{name}'", f"its configuration cannot be used {why}", fix="Download or copy it again")


def _split_gguf(name: str) -> tuple[str, str | None]:
    """Split ``folder/x.gguf`` or ``owner/name/x.gguf`` into folder or repository and file; None without a file."""
    if not name.lower().endswith(".gguf"):
        return name, None
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("model.name", "GGUF files need the package gguf", fix="pip install 'mirrortune[gguf]'")
    place, _, file = name.replace("\\", "/").rpartition("/")
    return place or ".", file


def load_tokenizer(source: ModelSource, **options: Any) -> Any:
    """Load the tokenizer of a model, with a padding token that has an embedding (the end token if necessary).

    Raises:
        NoProcessorError: the model has no tokenizer files.
        ConfigError: the files cannot be read.
        HubError: the files cannot be downloaded.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    where = f"model '{source.name}'"
    no_files = NoProcessorError(where, "it has no tokenizer files", fix="Put its tokenizer beside it")
    refuse_foreign_files(source.name, map(source.file, ("tokenizer_config.json", "special_tokens_map.json")))
    with hub_errors(where, flag="--model"), load_errors(source.name):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments(), **options)
        except (ValueError, TypeError, KeyError, OSError) as error:
            if _has_tokenizer_files(source):
                raise
            raise no_files from error
        # If the files are missing, transformers builds a default tokenizer.
        if len(tokenizer) < _LARGEST_DEFAULT and not _has_tokenizer_files(source):
            raise no_files
    return _with_padding(add_tokens(tokenizer, source.new_tokens) if source.new_tokens else tokenizer, source)


def _has_tokenizer_files(source: ModelSource) -> bool:
    return source.gguf_file is not None or any(source.file(name) is not None for name in _TOKENIZER_FILES)


def _with_padding(tokenizer: Any, source: ModelSource) -> Any:
    """Return the tokenizer with a padding token for which the model has an embedding."""
    rows = getattr(source.config.get_text_config(), "vocab_size", None)
    rows = rows if isinstance(rows, int) else len(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < rows:
        return tokenizer
    ends = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id, *_end_ids(source))
    found = next((i for i in ends if i is not None and i < min(rows, len(tokenizer))), None)
    if found is None:
        raise ConfigError(
            f"model '{source.name}'", "its tokenizer has neither a padding nor an end token",
            fix="Set eos_token or pad_token in its tokenizer_config.json",
        )  # fmt: skip
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found)
    return tokenizer


def with_end_token(tokenizer: Any, source: ModelSource) -> Any:
    """Return the tokenizer with an end token, which may come from the model's configuration or generation settings.

    Raises:
        ConfigError: neither of them has an end token.
    """
    if tokenizer.eos_token_id is None:
        found = next((i for i in _end_ids(source) if i < len(tokenizer)), None)
        if found is None:
            raise ConfigError(
                f"model '{source.name}'", "neither its tokenizer nor its configuration has an end token, which answers"
                " are learned with", fix="Set eos_token in its tokenizer_config.json",
            )  # fmt: skip
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(found)
    return tokenizer


def _end_ids(source: ModelSource) -> list[int]:
    """Return the end token ids of the model's configuration, or else of its generation configuration."""
    from transformers import GenerationConfig  # noqa: PLC0415

    config = source.config
    found = [getattr(part, "eos_token_id", None) for part in (config, config.get_text_config())]
    if all(value is None for value in found):
        # Most models have no generation configuration.
        with quiet(), contextlib.suppress(OSError, ValueError, TypeError):
            revision = source.commit or source.revision
            pinned: dict[str, Any] = {"revision": revision} if revision else {}
            found.append(GenerationConfig.from_pretrained(source.location, **pinned).eos_token_id)
    return [i for value in found for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def pad_token_id(processor: Any) -> int | None:
    """Return the id of the padding token, or None for a processor of images or audio."""
    found = getattr(processor, "pad_token_id", None)
    return found if isinstance(found, int) else None


def load_feature_extractor(source: ModelSource) -> Any:
    """Load the feature extractor of an audio model."""
    from transformers import AutoFeatureExtractor  # noqa: PLC0415

    where, allowed = f"model '{source.name}'", "a model of recordings with a preprocessor_config.json"
    absent = NoProcessorError(where, "it has no feature extractor", allowed=allowed, fix="Put one beside it")
    found = _load_processor(AutoFeatureExtractor, source, absent)
    if not hasattr(found, "sampling_rate"):
        raise absent
    return found


def load_image_processor(source: ModelSource) -> Any:
    """Load the model's image processor in its Pillow version, so that pixels do not depend on torchvision."""
    from transformers import AutoImageProcessor  # noqa: PLC0415

    where, allowed = f"model '{source.name}'", "a vision model with a preprocessor_config.json"
    absent = NoProcessorError(where, "it has no image processor", allowed=allowed, fix="Put one beside it")
    return _load_processor(AutoImageProcessor, source, absent, backend="pil")


def _load_processor(auto_class: Any, source: ModelSource, absent: NoProcessorError, **options: Any) -> Any:
    """Load a processor; raises ``absent`` if the model has none."""
    with hub_errors(f"model '{source.name}'", flag="--model"), load_errors(source.name):
        try:
            return auto_class.from_pretrained(source.location, **options, **source.arguments())
        except OSError as error:
            if "preprocessor_config.json" in str(error) and (source.is_local or error.__cause__ is None):
                raise absent from error
            raise


def model_class(auto_class: str, config: Any) -> Any:
    """Return the model class that an Auto class selects for a configuration, or None if there is none.

    The name of a model class selects that class.
    """
    import transformers  # noqa: PLC0415

    found = getattr(transformers, auto_class)
    if hasattr(found, "_model_mapping"):  # transformers has no public way from a configuration to its class
        found = found._model_mapping.get(type(config), None)  # noqa: SLF001
    if isinstance(found, (list, tuple)):
        named = getattr(config, "architectures", None) or ()
        found = next((one for one in found if one.__name__ in named), found[0])
    return found


def forward_parameters(auto_class: str, config: Any) -> set[str]:
    """Return the parameter names of a model's ``forward``; empty for a class that transformers does not know."""
    found = model_class(auto_class, config)
    return set(inspect.signature(found.forward).parameters) if found is not None else set()


def resolve_dtype(asked: str, config: Any, device: torch.device) -> torch.dtype:
    """Return the dtype of the base weights.

    This is the requested dtype or, for ``"auto"``, the stored dtype; but float32 if that is a 16-bit dtype in which
    ``device`` is slow.
    """
    if asked != "auto":
        return DTYPES[asked]
    stored = _stored_dtype(config)
    return torch.float32 if is_slow(stored, device) else stored


def describe_widening(asked: str, config: Any, device: torch.device) -> str | None:
    """Return a note that weights are widened to float32 and how to prevent it, or None if they are not."""
    stored = _stored_dtype(config)
    if asked != "auto" or not is_slow(stored, device):
        return None
    name = str(stored).removeprefix("torch.")
    return (
        f"base weights: stored in {name}, loaded in float32, because this CPU is slow in {name}; "
        f"a merge writes {name} again (model.dtype={name} computes in it all the same)"
    )


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None) or torch.float32
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    return stored if stored in DTYPES.values() else torch.float32


def load_model(
    source: ModelSource, auto_class: str, config_fields: dict[str, Any], dtype: torch.dtype, pad_token_id: int | None
) -> LoadedModel:
    """Load a model with a head for the task; a head of another size in the checkpoint is replaced by a new one.

    Args:
        source: source of the model.
        auto_class: name of a transformers Auto class, or of a model class.
        config_fields: fields of the configuration that the task determines, such as labels.
        dtype: dtype of the weights.
        pad_token_id: id of the tokenizer's padding token, or None.

    Raises:
        ConfigError: the model has no class for this kind of task, or its weights do not fit its configuration.
        HubError: the model cannot be downloaded.
        ResourceError: the model does not fit into memory.
    """
    import transformers  # noqa: PLC0415

    config = task_config(source, config_fields, pad_token_id)
    packing = {"quantization_config": loading_config(source.load_in, dtype)} if source.load_in else {}
    with (
        damage_errors(source.name, "its files cannot be loaded", trust_remote_code=source.trust_remote_code),
        hub_errors(f"model '{source.name}'", flag="--model"),
        load_errors(source.name),
    ):
        model, info = getattr(transformers, auto_class).from_pretrained(
            source.location,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source.arguments(),
            **packing,
        )
    mismatched = {key: tuple(stored) for key, stored, _ in info["mismatched_keys"]}
    check_shapes(source.name, model, mismatched, task_config(source, {}, None))
    missing = missing_in_base(model, info["missing_keys"], auto_class)
    check_loaded(source.name, model, missing)
    new = tuple(sorted({*info["missing_keys"], *mismatched}))
    return LoadedModel(model=keep_trainable(with_room(model, source)), new_parameters=new, missing=missing)


def with_room(model: nn.Module, source: ModelSource) -> nn.Module:
    """Give a model of ``source`` embeddings for the source's new tokens, in place."""
    return make_room(model, *token_rows(load_tokenizer(source), source.new_tokens)) if source.new_tokens else model


def empty_model(source: ModelSource, auto_class: str, config_fields: dict[str, Any]) -> nn.Module:
    """Build the model on the meta device, with names and shapes but without weights."""
    import transformers  # noqa: PLC0415

    config = task_config(source, config_fields, None)
    trusted = source.trust_remote_code
    with damage_errors(source.name, trust_remote_code=trusted), load_errors(source.name), torch.device("meta"):
        pinned = {"code_revision": source.code_revision} if source.code_revision else {}
        model = getattr(transformers, auto_class).from_config(config, trust_remote_code=trusted, **pinned)
    assert isinstance(model, nn.Module)
    return with_room(model, source)


def task_config(source: ModelSource, config_fields: dict[str, Any], pad_token_id: int | None) -> Any:
    """Copy the configuration of a model and adapt it to a task.

    The copy has the fields of the task, a padding id if the original has none, and requests that quantised weights are
    dequantised while loading if transformers can do so.

    Args:
        source: source of the model.
        config_fields: fields that the task determines, such as labels.
        pad_token_id: id of the tokenizer's padding token, or None.
    """
    config = type(source.config).from_dict(source.config.to_dict())
    if can_be_dequantised(config):
        config.quantization_config["dequantize"] = True
    for key, value in config_fields.items():
        setattr(config, key, value)
    own, rows = getattr(config, "pad_token_id", None), getattr(config.get_text_config(), "vocab_size", None)
    if own is not None and isinstance(rows, int) and own >= rows:
        own = config.pad_token_id = None  # the token was added to the tokenizer only, and has no embedding
    if own is None and pad_token_id is not None:
        config.pad_token_id = pad_token_id
    if source.attention is not None:
        config._attn_implementation = source.attention  # noqa: SLF001  (as from_pretrained does)
    return config


def checkpoint_activations(model: nn.Module) -> nn.Module:
    """Enable gradient checkpointing of ``model``, in place.

    Raises:
        ConfigError: transformers does not support gradient checkpointing for this model.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError("train.gradient_checkpointing", f"{type(model).__name__} has none", fix="Remove it")
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # of newer and older transformers
    enable: Any = next(found for name in names if (found := getattr(model, name, None)) is not None)
    # Reentrant checkpointing needs an input that requires a gradient, which frozen embeddings lack.
    enable({"use_reentrant": False})
    return model
