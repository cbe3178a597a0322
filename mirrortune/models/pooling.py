# SPDX-License-Identifier: Apache-2.0
"""Compute sentence embeddings as the sentence-transformers files of a model define them.

The files define how texts are prepared, how token vectors are pooled, and whether the result is normalised. The package
sentence-transformers is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mirrortune.errors import ConfigError
from mirrortune.models.load import ModelSource

_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
"""Flags of older configurations, in the order in which pooled vectors are concatenated."""
MODES = tuple(_LEGACY_MODES.values())
_MODULES, _MODEL_CONFIG = "modules.json", "config_sentence_transformers.json"
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceModules:
    """How a model turns a text into an embedding, as its sentence-transformers files define it.

    Attributes:
        modes: pooling modes from :data:`MODES`, whose results are concatenated.
        is_normalised: embeddings are scaled to unit length.
        max_length: maximum length of a text in tokens; None for the model's limit.
        lowercase: texts are lowercased before tokenisation.
        prompt: text prepended to every text.
        files: contents of the JSON files by relative path; those of sentence-transformers' default if there are none.
        notes: notes for the user about the files.
    """

    modes: tuple[str, ...]
    is_normalised: bool
    max_length: int | None
    lowercase: bool
    prompt: str
    files: dict[str, Any]
    notes: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write the JSON files into ``folder``."""
        for name, value in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_modules(source: ModelSource) -> SentenceModules:
    """Read how a model turns texts into embeddings.

    Without ``modules.json``, sentence-transformers' default applies: the mean of the token vectors, or the last token
    vector for a causal language model.

    Raises:
        ConfigError: the files are damaged, or require a module or an option that is not implemented here.
    """
    where = f"model '{source.name}'"
    if source.config.is_encoder_decoder:
        raise ConfigError(where, "it is an encoder-decoder, whose token vectors are those of the decoder's texts",
                          allowed="an encoder or a decoder")  # fmt: skip
    stored = _json(source, _MODULES, where, list)
    if stored is None:
        return _default(source)
    files: dict[str, Any] = {_MODULES: stored}
    modes: tuple[str, ...] | None = None
    is_normalised = False
    options: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for number, module in enumerate(stored):
        kind, path = _kind(module, where), _path(module, where)
        config_file = f"{path}/config.json"
        if kind == "Transformer" and number == 0 and not path:
            own = _transformer(source, files, where)
        elif kind == "Pooling" and path and modes is None:
            options = files[config_file] = _json(source, config_file, where, dict) or {}
            modes = _modes(options, f"{where}: {config_file}")
        elif kind == "Normalize" and modes is not None:
            is_normalised = True
            if path and (found := _json(source, config_file, where, dict)) is not None:
                files[config_file] = found
        else:
            raise ConfigError(
                f"{where}: {_MODULES}", f"module {number} is {kind} in '{path}', which is not applied here",
                allowed="Transformer in the model's own folder, Pooling, Normalize, in this order",
                fix="Choose another model, or train it with sentence-transformers around mirrortune.attach()",
            )  # fmt: skip
    if modes is None:
        raise ConfigError(f"{where}: {_MODULES}", "it has no Pooling", fix="Restore the file")
    prompt, notes = _prompt(source, files, where)
    if prompt and not options.get("include_prompt", True):
        raise ConfigError(f"{where}: include_prompt", "got false, with a default prompt", allowed="true")
    return SentenceModules(
        modes=modes, is_normalised=is_normalised, max_length=_length(own, where),
        lowercase=bool(own.get("do_lower_case")), prompt=prompt, files=files, notes=notes,
    )  # fmt: skip


def _default(source: ModelSource) -> SentenceModules:
    architecture = (getattr(source.config, "architectures", None) or [""])[0]
    is_causal = architecture.endswith("ForCausalLM") and getattr(source.config, "is_causal", True)
    mode = "lasttoken" if is_causal else "mean"
    types = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(types.items())
    ]
    size = source.config.get_text_config().hidden_size
    flags = {flag: own == mode for flag, own in _LEGACY_MODES.items()}
    what = "last token vector" if is_causal else "mean of the token vectors"
    return SentenceModules(
        modes=(mode,), is_normalised=False, max_length=None, lowercase=False, prompt="",
        files={_MODULES: modules, "1_Pooling/config.json": {"word_embedding_dimension": size, **flags}},
        notes=(f"the model has no modules.json of sentence-transformers: a text's embedding is the {what}",),
    )  # fmt: skip


def _json(source: ModelSource, name: str, where: str, kind: type) -> Any:
    """Return the content of a JSON file of the model, or None if it does not exist."""
    path = source.file(name)
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {name}", f"damaged ({type(error).__name__})", fix="Restore the file") from error
    if not isinstance(found, kind):
        raise ConfigError(f"{where}: {name}", f"damaged (it holds a {type(found).__name__})", fix="Restore the file")
    return found


def _kind(module: Any, where: str) -> str:
    """Return the class name of a module of sentence-transformers, or the full name of any other module."""
    name = module.get("type") if isinstance(module, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f"{where}: {_MODULES}", "damaged (a module without a type)", fix="Restore the file")
    return name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name


def _path(module: dict[str, Any], where: str) -> str:
    path = module.get("path", "")
    if not isinstance(path, str) or len(PurePosixPath(path).parts) > 1 or path.startswith((".", "/")) or "\\" in path:
        raise ConfigError(f"{where}: {_MODULES}", f"got the path {path!r}", allowed="a folder in the model's folder")
    return path


def _transformer(source: ModelSource, files: dict[str, Any], where: str) -> dict[str, Any]:
    for name in _TRANSFORMER_CONFIGS:
        found = _json(source, name, where, dict)
        if found is not None:
            files[name] = found
            break
    else:
        return {}
    modalities = found.get("modality_config") or {}
    method = modalities.get("text") or {} if isinstance(modalities, dict) else None
    if not isinstance(method, dict):
        raise ConfigError(f"{where}: {name}", "damaged (its modality_config is not an object)", fix="Restore the file")
    stated = {
        "transformer_task": (found.get("transformer_task"), "feature-extraction"),
        "method_output_name": (method.get("method_output_name"), "last_hidden_state"),
    }
    for key, (value, known) in stated.items():
        if value not in (None, known):
            raise ConfigError(f"{where}: {name}", f"{key} is {value!r}, which is not applied here", allowed=known)
    return dict(found)


def _modes(options: dict[str, Any], where: str) -> tuple[str, ...]:
    stated = options.get("pooling_mode")
    found: Any = [mode for flag, mode in _LEGACY_MODES.items() if options.get(flag)] or ["mean"]
    if stated is not None:
        found = [stated] if isinstance(stated, str) else stated
    if not isinstance(found, list) or not found or not set(map(str, found)) <= set(MODES):
        raise ConfigError(where, f"pooling_mode is {stated!r}", allowed=", ".join(MODES))
    return tuple(found)


def _length(options: dict[str, Any], where: str) -> int | None:
    length = options.get("max_seq_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ConfigError(f"{where}: max_seq_length", f"got {length!r}", allowed="a number of tokens")
    return length


def _prompt(source: ModelSource, files: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """Return the default prompt, and notes about other prompts and about a similarity other than cosine."""
    found = _json(source, _MODEL_CONFIG, where, dict)
    if found is None:
        return "", ()
    files[_MODEL_CONFIG] = found
    prompts, default = found.get("prompts") or {}, found.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ConfigError(f"{where}: {_MODEL_CONFIG}", "damaged (its prompts are not texts)", fix="Restore the file")
    if not isinstance(default, str | None):
        problem = f"damaged (default_prompt_name is {default!r:.60})"
        raise ConfigError(f"{where}: {_MODEL_CONFIG}", problem, allowed="a name", fix="Restore the file")
    notes = []
    others = [name for name, text in prompts.items() if text and name != default]
    if others:
        notes.append(f"prompts of the model that are not applied: {', '.join(others)}; write them into the texts")
    similarity = found.get("similarity_fn_name")
    if similarity not in (None, "cosine"):
        notes.append(f"the model's own similarity is {similarity}; it is trained and scored by the cosine here")
    return (prompts.get(default) or "") if default else "", tuple(notes)


def pool(vectors: Tensor, mask: Tensor, modes: Sequence[str], *, is_normalised: bool) -> Tensor:
    """Pool token vectors into one embedding per text, like sentence-transformers' Pooling and Normalize.

    Args:
        vectors: token vectors, shape (B, L, H).
        mask: 1 for tokens and 0 for padding, which may be on either side, shape (B, L).
        modes: pooling modes, M of them.
        is_normalised: scale embeddings to unit length.

    Returns:
        Embeddings in float32, shape (B, M H).
    """
    values, weights = vectors.float(), mask.unsqueeze(-1).float()
    found = torch.cat([_pooled(values, mask, weights, mode) for mode in modes], dim=-1)
    return F.normalize(found, dim=-1) if is_normalised else found


def _pooled(values: Tensor, mask: Tensor, weights: Tensor, mode: str) -> Tensor:
    if mode == "max":
        return values.masked_fill(weights == 0, -torch.inf).amax(dim=1)
    if mode == "weightedmean":  # the first token has weight 1, the second 2, ...
        weights = weights * mask.cumsum(dim=1).unsqueeze(-1)
    total, count = (values * weights).sum(dim=1), weights.sum(dim=1).clamp(min=1e-9)
    if mode in ("mean", "weightedmean"):
        return total / count
    if mode == "mean_sqrt_len_tokens":
        return total / count.sqrt()
    last = mask.shape[1] - 1
    place = mask.int().argmax(dim=1) if mode == "cls" else last - mask.int().flip(1).argmax(dim=1)
    return values.gather(1, place[:, None, None].expand(-1, 1, values.shape[-1])).squeeze(1)


def without_pooler(model: nn.Module) -> nn.Module:
    """Replace the ``pooler`` of a transformers model by the identity; token vectors do not depend on it."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = nn.Identity()
    return model
