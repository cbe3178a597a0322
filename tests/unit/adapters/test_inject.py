# SPDX-License-Identifier: Apache-2.0
"""inject: which layers are adapted, which parameters are trained, and what is refused; for four model families."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mirrortune.adapters.inject import (
    adapter_parameters,
    attach,
    attachment,
    head_parameters,
    plain_parameters,
    spectral_layers,
    trainable_parameters,
    weights_kept,
)
from mirrortune.adapters.spec import AdapterSpec, check_asked, check_spec, make_pairs, unused_layer_settings
from mirrortune.adapters.targets import find_targets
from mirrortune.errors import ConfigError
from tests.spectral import relative, train_a_little
from tests.tiny_models import FAMILIES, tiny_albert, tiny_bert, tiny_causal, tiny_roberta
from tests.tiny_runs import logits

# (adapted layers, names of the head) when the checkpoint held the base model only; new parameters are what
# from_pretrained reports then.
EXPECTED = {
    "bert": (13, {"classifier"}),
    "roberta": (12, {"classifier.dense", "classifier.out_proj"}),
    "albert": (8, {"classifier"}),
    "distilbert": (12, {"pre_classifier", "classifier"}),
}


def trained(model: nn.Module) -> set[str]:
    """Names of the parameters that ask for gradients."""
    return {name for name, p in model.named_parameters() if p.requires_grad and p.numel()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_base_is_adapted_and_the_head_trained(family: str) -> None:
    model = FAMILIES[family]()
    count, head = EXPECTED[family]
    untouched = {name: p.clone() for name, p in model.named_parameters()}
    before = logits(model)
    assert attach(model, AdapterSpec()) is model
    layers = spectral_layers(model)
    assert len(layers) == count
    assert {name.rpartition(".")[0] for name in attachment(model).targets.head} == head
    cores = {f"{name}.core.{part}" for name in layers for part in ("theta", "scale")}
    assert trained(model) == cores | set(attachment(model).targets.head)
    # The factored layers of an untrained adapter equal the base to float32 rounding.
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    for name, layer in layers.items():
        assert torch.equal(layer.base_layer.weight, untouched[f"{name}.weight"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_branch_gives_exactly_the_base_model(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family]().to(dtype)
    before = logits(model)
    attach(model, AdapterSpec(strategy="branch"))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["mirror", "mirror-scale"])
def test_counts_are_one_angle_a_pair_and_one_scale_a_direction(family: str, method: str) -> None:
    model = attach(FAMILIES[family](), AdapterSpec(method=method))
    ranks = [min(layer.out_features, layer.in_features) for layer in spectral_layers(model).values()]
    scales = sum(ranks) if method == "mirror-scale" else 0
    assert trainable_parameters(model) == sum(rank // 2 for rank in ranks) + scales
    assert head_parameters(model) == sum(p.numel() for p in plain_parameters(model).values())
    assert trainable_parameters(model) + head_parameters(model) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_a_layer_that_runs_twice_is_adapted_once() -> None:
    model = attach(tiny_albert(), AdapterSpec())
    model.train()
    model(input_ids=torch.tensor([[2, 7, 8, 3]])).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model).values())
    shared = [name for name in spectral_layers(model) if "albert_layers" in name]
    assert len(shared) == len({name.rsplit(".", 1)[-1] for name in shared}) == 6


def test_a_new_layer_inside_the_base_belongs_to_the_head() -> None:
    new = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    model = attach(tiny_bert(), AdapterSpec(), new_parameters=new)
    assert set(attachment(model).targets.head) == set(new)
    assert "bert.pooler.dense" not in spectral_layers(model)
    assert isinstance(model.get_submodule("bert.pooler.dense"), nn.Linear)


def test_skipped_weights_have_a_reason() -> None:
    targets = find_targets(tiny_bert(), AdapterSpec())
    assert targets.skipped == {
        f"bert.embeddings.{name}_embeddings": "embedding, adapted on request only"
        for name in ("word", "position", "token_type")
    }


def test_a_shared_weight_is_adapted_once_for_all_who_hold_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    seen = []
    attach(model, AdapterSpec(), on_layer=lambda name, *_: seen.append(name))
    assert seen == ["0", "2"]
    assert attachment(model).targets.layers["0"].tensors == ("0.weight", "1.weight")
    with torch.no_grad():
        adapter_parameters(model)["0.theta"].add_(0.3)
    assert torch.equal(model[0].weight, model[1].weight)
    model[1](torch.ones(1, 4)).sum().backward()
    assert adapter_parameters(model)["0.theta"].grad.any()


def test_a_module_with_two_parents_is_replaced_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

    model = attach(Twice(), AdapterSpec())
    assert model.first is model.second
    assert attachment(model).targets.layers["first"].tensors == ("first.weight", "second.weight")


def test_weights_that_are_read_around_their_layer_are_adapted_all_the_same() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    before = model(x, x, x)[0]
    attach(model, AdapterSpec())
    assert set(spectral_layers(model)) == {"in_proj_weight", "out_proj"}
    torch.testing.assert_close(model(x, x, x)[0], before)
    for name in spectral_layers(model):
        after = model.eval()(x, x, x)[0]
        with torch.no_grad():
            adapter_parameters(model)[f"{name}.theta"].add_(0.3)
            assert not torch.allclose(model(x, x, x)[0], after)
    model(x, x, x)[0].square().sum().backward()
    assert all(p.grad.any() for p in adapter_parameters(model).values())


def test_what_only_asks_for_the_shape_of_a_weight_costs_nothing() -> None:
    model = attach(nn.Sequential(nn.Linear(4, 3)), AdapterSpec())
    computed = []
    plain = model[0].adapted_weight
    model[0].adapted_weight = lambda: computed.append(1) or plain()
    weight = model[0].weight
    assert (weight.shape, weight.dtype, weight.ndim, weight.size(1)) == ((3, 4), torch.float32, 2, 4)
    assert weight.device == torch.device("cpu")
    assert not computed
    assert torch.equal(weight + 0, plain())
    assert computed
    assert (weight + 0).requires_grad


def test_a_language_models_output_embedding_stays_frozen() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = attach(GPTNeoXForCausalLM(config), AdapterSpec(method="mirror"))
    assert attachment(model).targets.head == ()
    assert "embed_out" not in spectral_layers(model)
    assert trained(model) == {f"{name}.core.theta" for name in spectral_layers(model)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("query|value", 4),
        ("attention.self.query", 2),
        (r"encoder\.layer\.0\..*", 6),
        (r"bert\.pooler\.dense", 1),
        ("dense", 7),
    ],
)
def test_a_pattern_chooses_layers_from_any_dot_on(pattern: str, expected: int) -> None:
    model = attach(tiny_bert(), AdapterSpec(target_modules=pattern))
    assert len(spectral_layers(model)) == expected


def test_a_tied_weight_is_found_by_any_of_its_names() -> None:
    model = tiny_causal("Llama", tie_word_embeddings=True)
    for pattern in ("embed_tokens", "lm_head"):
        assert list(find_targets(model, AdapterSpec(target_modules=pattern)).layers) == ["model.embed_tokens"]
    # A pattern that matches first names means those alone.
    spec = AdapterSpec(target_modules=r".*(lm_head|up_proj)")
    assert list(find_targets(model, spec).layers) == [f"model.layers.{index}.mlp.up_proj" for index in range(2)]


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'querry' matches none of the 13 linear layers\. Nearest: query") as caught:
        find_targets(tiny_bert(), AdapterSpec(target_modules="querry"))
    assert "dense, key, query, value" in str(caught.value)
    with pytest.raises(ConfigError, match="not a regular expression"):
        find_targets(tiny_bert(), AdapterSpec(target_modules="query("))


def test_an_alternative_that_matches_nothing_is_an_error_unless_bracketed() -> None:
    with pytest.raises(ConfigError, match=r"'valeu' \(an alternative of 'query\|valeu'\) .* Nearest: value"):
        find_targets(tiny_bert(), AdapterSpec(target_modules="query|valeu"))
    assert len(find_targets(tiny_bert(), AdapterSpec(target_modules="(query|q_proj)")).layers) == 2


def test_a_rank_that_fits_no_layer_is_refused() -> None:
    model = tiny_bert()
    with pytest.raises(ConfigError, match=r"^bert\.encoder\.layer\.0\.attention\.self\.query: rank 33 does not fit"):
        attach(model, AdapterSpec(rank=33))
    assert not spectral_layers(model)


def test_a_rank_above_that_of_some_layers_leaves_them_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    targets = find_targets(model, AdapterSpec(rank=5))
    assert {name: target.rank for name, target in targets.layers.items()} == {"0": 5, "1": 3}
    assert targets.clipped == ("1",)
    # The preset's own rank was not asked for, so that it may be above that of every layer.
    assert find_targets(model, AdapterSpec(method="psoft")).clipped == ("0", "1")


METHODS: dict[str, Callable[[str], bool]] = {
    "none": lambda name: False,
    "bitfit": lambda name: name.endswith("bias"),
    "full": lambda name: True,
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_a_core_train_plain_parameters(method: str) -> None:
    model = attach(tiny_roberta(), AdapterSpec(method=method))
    assert not spectral_layers(model)
    base = {name for name, _ in model.named_parameters() if name.startswith("roberta.")}
    assert trained(model) - set(attachment(model).targets.head) == {name for name in base if METHODS[method](name)}
    sizes = dict(model.named_parameters())
    assert trainable_parameters(model) == sum(sizes[name].numel() for name in base if METHODS[method](name))


def test_a_plain_module_is_adapted_as_a_whole() -> None:
    model = attach(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), AdapterSpec())
    assert set(spectral_layers(model)) == {"0", "2"}


@pytest.mark.parametrize("method", ["mirror", "neighbor", "random"])
def test_layers_get_the_pairs_of_their_names(method: str) -> None:
    spec = AdapterSpec(method=method, seed=5)
    for name, layer in spectral_layers(attach(tiny_bert(), spec)).items():
        assert torch.equal(layer.core.get_buffer("pairs"), make_pairs(spec, layer.rank, name))


def test_given_pairs_and_factors_are_used_and_the_hook_sees_both() -> None:
    seen = {}
    pairs = {"0": torch.tensor([[1, 2]])}

    def source(name: str, weight: torch.Tensor, rank: int):
        from mirrortune.adapters.svd import factorize

        seen[name] = (tuple(weight.shape), rank)
        return factorize(weight, rank)

    hooked = []
    model = nn.Sequential(nn.Linear(4, 3))
    attach(model, AdapterSpec(rank=3), pairs=pairs, factor_source=source, on_layer=lambda *given: hooked.append(given))
    assert seen == {"0": ((3, 4), 3)}
    assert model[0].core.get_buffer("pairs").tolist() == [[1, 2]]
    assert [(name, tuple(weight.shape), factors.rank) for name, weight, factors, _ in hooked] == [("0", (3, 4), 3)]


def test_a_second_adapter_is_refused() -> None:
    model = attach(tiny_bert(), AdapterSpec())
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach(model, AdapterSpec())


def test_a_model_without_an_adapter_says_so() -> None:
    with pytest.raises(ConfigError, match="it has no adapter"):
        attachment(tiny_bert())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (AdapterSpec(method="miror"), ["unknown method 'miror'", "Did you mean 'mirror'"]),
        (AdapterSpec(pairing="neighbour"), ["unknown pairing 'neighbour'", "Did you mean 'neighbor'"]),
        (AdapterSpec(options={"scale_topk": 3}), ["no option 'scale_topk'", "Did you mean 'scale_top_k'"]),
        (AdapterSpec(method="bitfit", rank=3), ["adapter.rank", "'bitfit' has no rank"]),
        (AdapterSpec(method="none", pairing="mirror"), ["adapter.pairing", "'none' has no pairing"]),
        (AdapterSpec(method="full", options={"side": "input"}), ["adapter.options", "'full' has no options"]),
        (AdapterSpec(pairing="x", options={"y": 1}), ["unknown pairing 'x'", "no option 'y'"]),
    ],
)
def test_settings_that_mean_nothing_are_refused_all_at_once(spec: AdapterSpec, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_spec(spec)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


def test_settings_of_layers_are_remarked_where_none_is_adapted() -> None:
    asked = AdapterSpec(method="full", target_modules="query", split={"c_attn": 3}, strategy="dense")
    check_asked(asked)  # a recipe for adapters is trained with other methods to compare
    said = "not used, since 'full' adapts no layers: adapter.target_modules, adapter.split, adapter.strategy"
    assert unused_layer_settings(asked) == said
    assert unused_layer_settings(AdapterSpec(method="full")) is None
    assert unused_layer_settings(AdapterSpec(target_modules="query")) is None


def test_layers_that_a_model_calls_through_a_list_are_adapted_where_they_are() -> None:
    """As MaskFormer's pixel decoder does: a module put in the place of theirs would never run."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = [nn.Linear(6, 6), nn.Linear(6, 4)]
            for index, stage in enumerate(self.stages):
                self.add_module(str(index), stage)

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            return x

    torch.manual_seed(0)
    model, x = Listed(), torch.randn(5, 6)
    before = model(x)
    attach(model, AdapterSpec())
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    for index, layer in enumerate(spectral_layers(model).values()):
        assert all(bool(p.grad.any()) for p in layer.core.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in layer.core.parameters())
        train_a_little(layer.core, index)
    assert relative(model(x), before) > 1e-2


@pytest.mark.parametrize("strategy", ["dense", "branch"])
@pytest.mark.parametrize("method", ["mirror", "scale", "psoft", "svft", "lora-xs", "speclora"])
def test_a_float64_model_is_adapted_in_float64(method: str, strategy: str) -> None:
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        model = tiny_bert().to(dtype)
        attach(model, AdapterSpec(method=method, rank=8, strategy=strategy))
        for parameter in adapter_parameters(model).values():
            torch.nn.init.constant_(parameter, 0.03)
        outputs[dtype] = model(input_ids=torch.arange(8)[None]).logits
        outputs[dtype].sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter_parameters(model).values())
    assert outputs[torch.float64].dtype == torch.float64
    torch.testing.assert_close(outputs[torch.float64].float(), outputs[torch.float32], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "computed"),
    [
        (AdapterSpec(strategy="dense"), "mirrortune.adapters.layers.Spectral.adapt"),
        (AdapterSpec(strategy="factored"), "mirrortune.adapters.cores.givens.Givens.coefficients"),
        (AdapterSpec(method="psoft", rank=4), "mirrortune.adapters.cores.psoft.Psoft.turned"),
    ],
)
def test_kept_weights_are_computed_once_and_dropped_when_training_goes_on(
    spec: AdapterSpec, computed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of dense layers, and coefficients of others."""
    model = attach(tiny_causal(), spec).eval()
    layers = spectral_layers(model)
    for number, layer in enumerate(layers.values()):
        train_a_little(layer.core, number)
    ids = torch.arange(8)[None] + 3
    write = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True,
             "return_dict_in_generate": True, "pad_token_id": 0}  # fmt: skip
    expected = model.generate(ids, **write)  # type: ignore[operator]
    compute, calls = pkgutil.resolve_name(computed), []

    def counted(own: object, *given: object, **named: object) -> object:
        calls.append(own)
        return compute(own, *given, **named)

    monkeypatch.setattr(computed, counted)

    with torch.no_grad(), weights_kept(model):
        found = model.generate(ids, **write)  # type: ignore[operator]
    assert len(calls) == len(layers) == len(set(calls))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))

    for number, layer in enumerate(layers.values()):
        train_a_little(layer.core, 100 + number)
    with torch.no_grad():
        changed = model(input_ids=ids).logits[:, -1]
    assert not torch.equal(changed, expected.logits[0])
    model(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model).values())


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(8, 8, 1)])
def test_a_compiled_model_is_not_compiled_again_when_values_are_held(layer: nn.Module) -> None:
    compiled: list[object] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    model = attach(nn.Sequential(layer), AdapterSpec(method="mirror", rank=4, target_modules="all-layers")).eval()
    run, x = torch.compile(model, backend=count), torch.ones(8, 8)
    with torch.no_grad():
        run(x)
        with weights_kept(model):
            model(x)
            run(x)
        run(x)
    assert len(compiled) == 1
