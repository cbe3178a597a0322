# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models and a word tokenizer for them, all deterministic: mechanics without a download.

Every builder takes the seed of its weights. Hidden size 32 and two layers: a training step takes milliseconds, and
shapes are still rectangular in both directions (32 x 32, 64 x 32, 32 x 64).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

# fmt: off
WORDS = (
    "the", "a", "an", "this", "that", "it", "film", "movie", "plot", "story", "actor", "cast", "is", "was", "looks",
    "seems", "not", "very", "really", "and", "but", "so", "good", "bad", "great", "awful", "wonderful", "terrible",
    "lovely", "boring", "brilliant", "dreadful", "fun", "dull", "long", "short", "new", "old", "quiet", "loud",
)
# fmt: on
_SIZES = {"vocab_size": 128, "max_position_embeddings": 64, "num_labels": 2}
_BERT_SIZES = {**_SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_bert(seed: int = 0, *, dropout: float = 0.0, **fields: Any) -> nn.Module:
    """A BERT sequence classifier."""
    return _build("Bert", seed, {**_BERT_SIZES, **_dropout(dropout), **fields})


def tiny_roberta(seed: int = 0, *, dropout: float = 0.0, **fields: Any) -> nn.Module:
    """A RoBERTa sequence classifier: no pooler, a head of two layers."""
    sizes = {**_BERT_SIZES, "max_position_embeddings": 66, "pad_token_id": 0}
    return _build("Roberta", seed, {**sizes, **_dropout(dropout), **fields})


def tiny_albert(seed: int = 0, *, dropout: float = 0.0, **fields: Any) -> nn.Module:
    """An ALBERT sequence classifier: one set of layer modules, run twice."""
    return _build("Albert", seed, {**_BERT_SIZES, "embedding_size": 16, **_dropout(dropout), **fields})


def tiny_distilbert(seed: int = 0, *, dropout: float = 0.0, **fields: Any) -> nn.Module:
    """A DistilBERT sequence classifier: other names for everything, and no token types."""
    sizes = {**_SIZES, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    rates = {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
    return _build("DistilBert", seed, {**sizes, **rates, **fields})


def tiny_deberta(seed: int = 0, *, dropout: float = 0.0, **fields: Any) -> nn.Module:
    """A DeBERTa sequence classifier of the first version, whose attention adds biases of query and value itself."""
    sizes = {**_BERT_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_dropout": dropout}
    return _build("Deberta", seed, {**sizes, **_dropout(dropout), **fields})


FAMILIES = {"bert": tiny_bert, "roberta": tiny_roberta, "albert": tiny_albert, "distilbert": tiny_distilbert}


def tiny_tokenizer() -> Any:
    """A word tokenizer with BERT's special tokens that knows ``WORDS`` and splits any other word into letters."""
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "!", "?", *WORDS]
    pieces += [letter for letter in letters if letter not in pieces]
    pieces += [f"##{letter}" for letter in letters]
    assert len(pieces) <= _SIZES["vocab_size"]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=64)


def write_tiny_model(folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A saved tiny BERT (without a trained head) and its tokenizer, as a model folder in the Hub's layout."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_bert(**fields).get_submodule("bert").to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_vision(folder: Path, *, family: str = "Dinov2", num_channels: int = 3, seed: int = 0) -> Path:
    """A saved tiny vision backbone (16 x 16 pixels, patches of 4) and its image processor, which scales to 20 and cuts.

    Args:
        folder: is made.
        family: ``Dinov2`` or ``ViT``.
        num_channels: of the images.
        seed: of the weights.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    fields = {"image_size": 16, "patch_size": 4, "num_channels": num_channels}
    config = getattr(transformers, f"{family}Config")(**sizes, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}Model")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(folder)
    statistics = {"image_mean": [0.5] * num_channels, "image_std": [0.25] * num_channels}
    crop = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    transformers.BitImageProcessorPil(**crop, **statistics).save_pretrained(folder)
    return folder


# The form of ChatML: every turn between marks, the assistant's with generation marks in the second.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# As ChatML, with tools in a system turn of their own and calls as JSON.
TOOL_CHATML = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m.content %}{{ m['content'] }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_chat_tokenizer(template: str | None = CHATML, *, eos: str | None = "<|im_end|>") -> Any:
    """A byte-level tokenizer with a chat template, whose every other piece is one byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t) for t in ("<|end|>", "<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, model_max_length=256)
    tokenizer.chat_template = template
    return tokenizer


def tiny_causal(family: str = "Llama", seed: int = 0, **fields: Any) -> nn.Module:
    """A language model of 272 pieces: ``Llama``, ``GPT2``, ``Qwen2``, ``Mistral``, ..."""
    import transformers

    sizes = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None}
    if family == "GPT2":
        sizes = {"vocab_size": 272, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0}
        sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": None, "eos_token_id": 258}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **tokens, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.02))
    assert isinstance(model, nn.Module)
    return model.eval()


def write_tiny_causal(folder: Path, *, template: str | None = CHATML, eos: str = "<|im_end|>", **fields: Any) -> Path:
    """A saved tiny Llama and its chat tokenizer."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_causal(**fields).save_pretrained(folder)
    tiny_chat_tokenizer(template, eos=eos).save_pretrained(folder)
    return folder


def write_tiny_seq2seq(folder: Path, *, seed: int = 0) -> Path:
    """A saved tiny T5 and its byte-level tokenizer."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = {"vocab_size": 272, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 256, "eos_token_id": 258, "pad_token_id": 256, "dropout_rate": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens))
    model.save_pretrained(folder)
    tokenizer = tiny_chat_tokenizer(None)
    tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_audio(folder: Path, *, seed: int = 0) -> Path:
    """A saved tiny wav2vec 2.0 and its feature extractor, at 16 kHz."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    front = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
    rates = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
    rates |= {"layerdrop": 0.0, "mask_time_prob": 0.0, "final_dropout": 0.0}
    places = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.Wav2Vec2Config(**sizes, **front, **rates, **places)
        transformers.Wav2Vec2Model(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    return folder


def _build(family: str, seed: int, fields: dict[str, Any]) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForSequenceClassification")(config)
        with torch.no_grad():  # real weights have a spectrum that falls off, and biases that are not zero
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    assert isinstance(model, nn.Module)
    return model.eval()


def _dropout(rate: float) -> dict[str, float]:
    return {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate, "classifier_dropout_prob": rate}


def normed_bert(seed: int = 0, **fields: Any) -> nn.Module:
    """A BERT sequence classifier with batch normalisations: one in the pooler, and one in the head."""
    model: Any = tiny_bert(seed, **fields)
    model.bert.pooler.activation = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(32))
    model.classifier = nn.Sequential(nn.BatchNorm1d(32), model.classifier)
    found: nn.Module = model.eval()
    return found


def write_tiny_levit(folder: Path, *, seed: int = 0) -> Path:
    """A saved tiny LeViT (32 x 32 pixels), which has batch normalisations throughout and in its head."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    small: dict[str, Any] = {"hidden_sizes": [16] * 3, "num_attention_heads": [2] * 3, "depths": [1] * 3}
    small |= {"key_dim": [4] * 3, "attention_ratio": [1] * 3, "mlp_ratio": [1] * 3, "image_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = transformers.LevitForImageClassification(transformers.LevitConfig(**small))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            model.train()(pixel_values=torch.rand(8, 3, 32, 32))  # running statistics as training leaves them
    model.levit.save_pretrained(folder)
    crop = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    transformers.BitImageProcessorPil(**crop).save_pretrained(folder)
    return folder
