# SPDX-License-Identifier: Apache-2.0
"""A tiny configuration of any model type, made from its default one by rules about names of fields, of no model family.

Widths are divided by common factors, so that what has to divide or equal something else still does; depths, experts and
vocabularies are cut to a few. The factors are lowered until the model can be built and run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

VOCABULARY = 160
_EXPERTS = 4

_WIDTH = re.compile(
    r"(hidden|intermediate|embed|d_model|d_ff|d_kv|d_inner|dff|n_embd|n_inner|dim|rank|width|channels?|filters|inner"
    r"|proj|ffn|latents?|feed_forward|head_size|bottleneck|conv_size|output_size|kv_channels|true_hidden|xpath_unit|head_dim|key_dim"
    r"|coordinate_size|shape_size|lru|feat_size)"
)
_NO_WIDTH = re.compile(
    r"(vocab|token|_id$|image_size|patch|window|kernel|chunk|block_size|crop|layers?$|heads$|num_|ratio|factor|groups"
    r"|position|type|stride|depth|interval|expand|bins|mel|max_|^n_(?!embd|inner)|labels|num_channels|^in_channels$"
    r"|audio_channels|conv_L|hidden_groups|interp|dropout|prob|stem_num_channels|temperature|^channels$|stack)"
)
_HEADS = re.compile(
    r"(^|_)(n_heads?|num_heads|attention_heads|kv_heads|key_value_heads|key_heads|value_heads|n_heads)$"
)
_HEAD_WIDTH = re.compile(r"(head_dim|head_size|d_kv|kv_channels|dim_head|d_head|key_dim|headdim|rotary_dim)")
_DEPTH = re.compile(
    r"(^|_)(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|[lxr]_layers|depth"
    r"|num_layers_per_stack|num_self_attends_per_block|num_global_layers|num_blocks)$"
)
_DEPTHS = re.compile(r"^(depths?|block_sizes|n_attn_blocks|stage_numb_of_layers|stage_num_blocks|num_block_repeats)$")
_PERIOD = re.compile(
    r"(period|interval|every_n|sparse_step|sliding_window_pattern|layer_group_size|per_attn_res_block)"
)
_TABLES = re.compile(
    r"(vocab_size|vocab_size_per_layer_input|num_hash_buckets|byte_group_vocab|codebook_size|entity_vocab)"
)
_FEW = {
    "num_experts": _EXPERTS, "n_routed_experts": _EXPERTS, "num_local_experts": _EXPERTS, "moe_num_experts": _EXPERTS,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k": 2,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "zero_expert_num": 2, "ngram_vocab_size_base": 256,
    "num_hidden_groups": 1, "num_object_labels": 5, "num_attr_labels": 5, "num_qa_labels": 5,
}  # fmt: skip
_MISSING = {"pad_token_id": 3, "decoder_start_token_id": 2, "num_experts_per_tok": 2, "n_routed_experts": _EXPERTS,
            "n_shared_experts": 1}  # fmt: skip


_SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
}
"""What the defaults of a type lack, or what no rule about single fields would find."""


def tiny_configs(config_class: type) -> Iterator[Any]:
    """Configurations from the smallest to the largest; those that the class refuses are left out.

    Raises:
        Exception: whatever the class says to its own defaults.
    """
    default = config_class()
    for width, heads in [*_factors(default), (1, 1)]:
        try:
            config = config_class(**{**shrunk(default, width, heads), **_SETTINGS.get(default.model_type, {})})
        except Exception:
            if width == 1:
                raise
            continue
        for part in _all_configs(config):
            for name, value in _MISSING.items():
                if _get(part, name) is None and (name in vars(part) or name.endswith("token_id")):
                    setattr(part, name, value)
            sizes = _get(part, "hidden_size"), _get(part, "num_attention_heads")
            if "head_dim" in vars(part) and _get(part, "head_dim") is None and all(isinstance(n, int) for n in sizes):
                part.head_dim = sizes[0] // sizes[1]
            part.use_cache = False  # as in training; half of the caches have rules of their own
        yield config


def shrunk(default: Any, width: int, heads: int) -> dict[str, Any]:
    """Arguments for a smaller ``default``: widths of heads divided by ``width``, other widths by ``width`` x ``heads``,
    and numbers of heads by ``heads``.
    """
    known = set(inspect.signature(type(default).__init__).parameters) | set(vars(default))
    depth = _depth(default)
    small: dict[str, Any] = {}
    for name, value in _settings(default).items():
        if hasattr(value, "to_dict"):
            small[name] = {**shrunk(value, width, heads), "model_type": value.model_type}
        elif value is None and name in ("vocab_size", "src_vocab_size", "tgt_vocab_size"):
            small[name] = VOCABULARY
        elif name == "rope_parameters" and isinstance(value, dict) and not _has_base(value):
            small[name] = {"rope_type": "default", "rope_theta": 10000.0}
        elif name in known and (found := _smaller(name, value, width, heads, depth)) != value:
            small[name] = found
    limit = small.get("vocab_size", getattr(default, "vocab_size", None))
    if isinstance(limit, int):
        small |= _special_tokens(default, limit)
    return small


def _has_base(rope: dict[str, Any]) -> bool:
    """Whether the base of the rotary embedding is set, for all layers or for each kind of them."""
    kinds = [v for v in rope.values() if isinstance(v, dict)]
    return all(v.get("rope_theta") for v in kinds) if kinds else bool(rope.get("rope_theta"))


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001
        return None  # what differs between layers has no value of its own


def _settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _smaller(name: str, value: Any, width: int, heads: int, depth: int) -> Any:
    if isinstance(value, (list, tuple)) and value:
        if _DEPTHS.search(name) and all(isinstance(v, int) for v in value):
            return type(value)(1 for _ in value)
        if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return type(value)(_smaller(name, v, width, heads, depth) for v in value)
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name in _FEW:
        return min(value, _FEW[name]) if value > 0 else value
    if _DEPTH.search(name):
        return min(value, depth)
    if _TABLES.search(name) and value > VOCABULARY and "type_vocab" not in name:
        return VOCABULARY
    if _HEADS.search(name):
        return max(1, value // heads)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name):
        factor = width if _HEAD_WIDTH.search(name) else width * heads
        if value % factor and value > 1000:
            return value // factor // 4 * 4 or value  # a width that is related to no other
        return value // factor if value >= 2 * factor and value % factor == 0 else value
    return value


def _depth(config: Any) -> int:
    """Layers that show every kind of layer of a model that alternates between kinds."""
    settings = _settings(config)
    periods = [v for n, v in settings.items() if _PERIOD.search(n) and isinstance(v, int)]
    dense = [
        v + 1 for n, v in settings.items() if n in ("first_k_dense_replace", "num_dense_layers") and isinstance(v, int)
    ]
    for value in settings.values():
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
            periods.append(1 + max(list(value).index(kind) for kind in set(value)))
    return min(8, max(2, *periods, *dense, 2))


def _factors(config: Any) -> list[tuple[int, int]]:
    """Powers of two for the widths of heads, which keep 4 numbers, and for the number of heads, largest first."""
    parts = [_head_sizes(c) for c in _all_configs(config)]
    smallest = min((width for width, _ in parts if width), default=32)
    fewest = [count for _, count in parts if count]
    widths = [f for f in (64, 32, 16, 8, 4, 2) if smallest / f >= 4]
    most = max((h for h in (32, 16, 8, 4, 2, 1) if all(n % h == 0 and n >= 2 * h for n in fewest)), default=1)
    return [(f, h) for f in widths for h in dict.fromkeys((most, 1))]


def _all_configs(config: Any) -> Iterator[Any]:
    yield config
    for value in _settings(config).values():
        if hasattr(value, "to_dict"):
            yield from _all_configs(value)


def _head_sizes(config: Any) -> tuple[int | None, int | None]:
    """Width of the narrowest kind of head, and the number of heads."""
    widths = [_get(config, name) for name in ("head_dim", "d_kv", "qk_rope_head_dim", "attention_head_size")]
    hidden = next((v for n in ("hidden_size", "d_model", "n_embd", "dim") if (v := _get(config, n))), None)
    names = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
    heads = next((v for n in names if (v := _get(config, n))), None)
    if isinstance(hidden, int) and isinstance(heads, int):
        widths.append(hidden // heads)
    found = [w for w in widths if isinstance(w, int) and w > 0]
    return min(found, default=None), heads if isinstance(heads, int) else None


def _special_tokens(config: Any, limit: int) -> dict[str, Any]:
    """Token numbers inside the vocabulary, different from each other where that is possible."""
    found: dict[str, Any] = {}
    names = [
        n for n, v in _settings(config).items() if n.endswith(("_token_id", "_token_index", "_index")) and v is not None
    ]
    for place, name in enumerate(sorted(names)):
        value = getattr(config, name)
        if isinstance(value, list):
            value = value[0]
        if isinstance(value, int) and value >= limit:
            found[name] = limit - 1 - place % (limit // 4)
    return found
