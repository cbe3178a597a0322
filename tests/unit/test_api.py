# SPDX-License-Identifier: Apache-2.0
"""api: the five functions for other people's loops."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mirrortune
from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.adapters.files.load import adapt
from mirrortune.adapters.inject import adapter_parameters
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.cli.flags import FLAGS
from mirrortune.config.schema import Recipe
from mirrortune.errors import ConfigError, DataError, VerificationError
from mirrortune.models.new_tokens import make_room
from tests.tiny_models import tiny_bert, tiny_causal
from tests.tiny_runs import logits


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """The model after a few steps of a loop that knows nothing of us."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids, labels = torch.randint(5, 45, (8, 9)), torch.randint(2, (8,))
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def load_base(folder: Path, **options: Any) -> nn.Module:
    """The tiny model as a user loads it, with a new head."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    assert isinstance(model, nn.Module)
    return model


def test_the_public_names() -> None:
    assert set(mirrortune.__all__) == {
        "AdapterBank",
        "__version__",
        "adapter_trainer",
        "attach",
        "load_adapter",
        "merge_adapter",
        "save_adapter",
        "trainable_parameters",
    }
    assert all(callable(getattr(mirrortune, name)) for name in mirrortune.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        mirrortune.atach  # noqa: B018


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, mirrortune; assert 'torch' not in sys.modules, 'torch'; print(mirrortune.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mirrortune.__version__


def test_one_method_is_the_default_everywhere() -> None:
    default = Recipe().adapter.method
    assert AdapterSpec().method == inspect.signature(mirrortune.attach).parameters["method"].default == default
    (flag,) = (flag for flag in FLAGS if flag.key == "adapter.method")
    assert f"; {default} by default" in flag.help


def test_attach_changes_the_model_in_place() -> None:
    model = tiny_bert()
    before = logits(model)
    assert mirrortune.attach(model) is model
    # Factored layers equal the base to float32 rounding.
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert mirrortune.trainable_parameters(model) == 13 * (16 + 32)
    assert model.mirrortune.spec.method == "mirror-scale"


def test_every_argument_is_used() -> None:
    model = mirrortune.attach(
        tiny_bert(),
        method="random",
        rank=6,
        pairing="neighbor",
        target_modules="query|value",
        seed=4,
        side="input",
        scale_top_k=2,
    )
    assert mirrortune.trainable_parameters(model) == 4 * (3 + 2)
    spec = model.mirrortune.spec
    assert (spec.method, spec.rank, spec.pairing, spec.seed) == ("random", 6, "neighbor", 4)
    assert spec.options == {"side": "input", "scale_top_k": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "miror"}, "Did you mean 'mirror'"),
        ({"rank": 99}, "rank 99 does not fit"),
        ({"pairing": "mirr"}, "unknown pairing"),
        ({"target_modules": "nothing"}, "matches none"),
        ({"scale_topk": 2}, "Did you mean 'scale_top_k'"),
        ({"scale_top_k": -2}, "scale_top_k: got -2"),
        ({"target_module": "query"}, r"has no option 'target_module'\. Did you mean target_modules\? Allowed: "),
        ({"method": "lora", "also_trains": "norms"}, r"Did you mean also_train\?"),
        ({"method": "adaptive"}, "is measured on a task, and there is none here"),
        ({"r": 8}, r"has no option 'r'\. It is rank here\.$"),
        ({"modules_to_save": ["pooler"]}, r"It is also_train here\.$"),
        ({"layers_to_transform": [0]}, r"It is adapter\.layers in a recipe\.$"),
        ({"use_dora": True}, r"Use method=dora, or remove it if false\.$"),
        ({"method": "lora", "lora_r": 8}, r"It is rank here\.$"),
        ({"method": "lora", "r": 8}, r"it follows from rank\. Set rank in its place"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(arguments: dict[str, Any], message: str) -> None:
    model = tiny_bert()
    asking = [p.requires_grad for p in model.parameters()]
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=message):
        mirrortune.attach(model, **arguments)
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == asking


def test_saved_and_loaded_is_the_same_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = trained(mirrortune.attach(load_base(tiny_model_dir), scale_top_k="all"))
    mirrortune.save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    torch.manual_seed(9)  # another head to begin with
    loaded = mirrortune.load_adapter(load_base(tiny_model_dir), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    mirrortune.save_adapter(loaded, tmp_path / "again")
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_listed_pairs_are_saved_and_loaded(tiny_model_dir: Path, tmp_path: Path) -> None:
    pairing = {"query|key": [[[0, 5], [1, 7]], [[0, 1]]], "all-linear": [[[3, 2]], [[2, 9]]]}
    model = trained(mirrortune.attach(load_base(tiny_model_dir), method="givens", pairing=pairing, rounds=2))
    assert mirrortune.trainable_parameters(model) == 4 * 3 + 9 * 2
    mirrortune.save_adapter(model, tmp_path / "adapter")
    loaded = mirrortune.load_adapter(load_base(tiny_model_dir), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_a_loaded_adapter_trains_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = trained(mirrortune.attach(load_base(tiny_model_dir)))
    mirrortune.save_adapter(model, tmp_path / "adapter")
    loaded = mirrortune.load_adapter(load_base(tiny_model_dir), tmp_path / "adapter")
    before = {name: p.detach().clone() for name, p in adapter_parameters(loaded).items()}
    trained(loaded)
    assert all(not torch.equal(p, before[name]) for name, p in adapter_parameters(loaded).items())


def test_merged_equals_adapted(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = trained(mirrortune.attach(load_base(tiny_model_dir)))
    mirrortune.save_adapter(model, tmp_path / "adapter")
    verdict = mirrortune.merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")
    assert verdict["passed"] is True
    assert {"max_abs_logit_error", "max_rel_weight_error", "tolerance"} <= verdict.keys()
    torch.testing.assert_close(logits(load_base(tmp_path / "merged")), logits(model), rtol=1e-5, atol=1e-5)


def test_a_head_of_another_size_is_merged_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = trained(mirrortune.attach(load_base(tiny_model_dir, num_labels=5)))
    mirrortune.save_adapter(model, tmp_path / "adapter")
    mirrortune.merge_adapter(str(tiny_model_dir), tmp_path / "adapter", tmp_path / "merged")
    merged = load_base(tmp_path / "merged")
    assert logits(merged).shape == (3, 5)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_names_of_classes_give_way_to_real_ones_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    names, others = {0: "pos", 1: "neg"}, {0: "up", 1: "down"}
    mirrortune.save_adapter(mirrortune.attach(load_base(tiny_model_dir)), tmp_path / "unnamed")
    mirrortune.save_adapter(mirrortune.attach(load_base(tiny_model_dir, id2label=others)), tmp_path / "named")
    for folder, expected in (("unnamed", names), ("named", others)):
        loaded: Any = mirrortune.load_adapter(load_base(tiny_model_dir, id2label=names), tmp_path / folder)
        assert loaded.config.id2label == expected


def test_only_the_known_format_is_merged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format"):
        mirrortune.merge_adapter(None, tmp_path, tmp_path / "merged", format="onnx")


def test_what_has_no_adapter_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has no adapter"):
        mirrortune.save_adapter(tiny_bert(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_head_that_was_replaced_is_named(tmp_path: Path) -> None:
    model: Any = mirrortune.attach(tiny_bert())
    model.classifier = nn.Sequential(model.classifier)
    with pytest.raises(ConfigError, match=r"no parameters of these names any more.*: classifier\.weight"):
        mirrortune.trainable_parameters(model)


@pytest.mark.parametrize("place", [None, 3, ["adapter"]])
def test_what_is_no_path_is_refused(place: Any) -> None:
    with pytest.raises(ConfigError, match=r"path: got .*\. Allowed: a text or a pathlib.Path"):
        mirrortune.load_adapter(tiny_bert(), place)
    with pytest.raises(ConfigError, match=r"path: got .*\. Allowed: a text or a pathlib.Path"):
        mirrortune.save_adapter(mirrortune.attach(tiny_bert(), target_modules="query"), place)


def test_what_has_diverged_is_not_saved(tmp_path: Path) -> None:
    model = mirrortune.attach(tiny_bert(), target_modules="query")
    adapter_parameters(model)["bert.encoder.layer.0.attention.self.query.theta"].data.view(-1)[0] = torch.nan
    with pytest.raises(ConfigError, match=r"diverged: .* hold NaN or infinities: bert\.encoder.*query\.theta"):
        mirrortune.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_is_loaded_once(tmp_path: Path) -> None:
    mirrortune.save_adapter(mirrortune.attach(tiny_bert(), target_modules="query"), tmp_path / "adapter")
    model = mirrortune.load_adapter(tiny_bert(), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"load_adapter: the model has an adapter already.*Load the base model again"):
        mirrortune.load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(("method", "rank"), [("mirror", "full"), ("mirror", 4), ("pissa", 4)])
def test_a_model_that_an_attach_has_left_half_changed_is_refused(method: str, rank: Any, tmp_path: Path) -> None:
    model = tiny_bert()
    weight = model.get_parameter("bert.encoder.layer.1.output.dense.weight")
    with torch.no_grad():
        kept = float(weight[0, 0])
        weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layer\.1\.output\.dense: the weight holds NaN"):
        mirrortune.attach(model, method=method, rank=rank)
    with torch.no_grad():
        weight[0, 0] = kept
    if method == "pissa":  # all weights are read before the first layer is changed
        mirrortune.attach(model, method=method, rank=rank)
        return
    refused = "an earlier attach.* has failed and left the model half changed.*Load the base model again"
    for use in (mirrortune.attach, mirrortune.AdapterBank):
        with pytest.raises(ConfigError, match=refused):
            use(model)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=refused):
        mirrortune.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("method", ["mirror", "lora"])
def test_an_attach_that_is_interrupted_is_not_continued(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    # The tuner is attached to a copy first.
    monkeypatch.setattr("mirrortune.adapters.inject.attach_rows", lambda own, _: own is not model or interrupted())
    with pytest.raises(KeyboardInterrupt):
        mirrortune.attach(model, method=method)
    with pytest.raises(ConfigError, match="half changed"):
        mirrortune.attach(model, method=method)


def test_a_model_that_a_load_has_left_half_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrortune.save_adapter(mirrortune.attach(tiny_bert(), rank=4), tmp_path / "adapter")
    other = tiny_bert()
    with torch.no_grad():
        other.get_parameter("bert.encoder.layer.1.output.dense.weight").add_(1)
    with pytest.raises(VerificationError, match="the base weight is not the one"):
        mirrortune.load_adapter(other, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"load_adapter: an earlier .* half changed"):
        mirrortune.load_adapter(other, tmp_path / "adapter")
    model = tiny_bert()
    monkeypatch.setattr("mirrortune.adapters.files.adapter_file.AdapterFile.restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mirrortune.load_adapter(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="half changed"):
        mirrortune.save_adapter(model, tmp_path / "again")


def test_a_load_that_fails_before_the_first_layer_is_repeated_by_force(tmp_path: Path) -> None:
    mirrortune.save_adapter(mirrortune.attach(tiny_bert(), target_modules="query"), tmp_path / "adapter")
    other = tiny_bert()
    with torch.no_grad():
        other.get_parameter("bert.encoder.layer.0.attention.self.query.weight").mul_(1.001)
    with pytest.raises(VerificationError, match="the base weight is not the one"):
        mirrortune.load_adapter(other, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="by force"):
        mirrortune.load_adapter(other, tmp_path / "adapter", force_base=True)


def test_a_load_that_fails_after_the_embeddings_were_made_longer_is_not_repeated(tmp_path: Path) -> None:
    model = make_room(tiny_causal("Llama", num_hidden_layers=1), 272, 274)
    book = adapt(model, AdapterSpec(new_rows=(272, 274)), factor_source=FactorCache())
    base = {"name": None, "dtype": "float32", "auto_class": "LlamaForCausalLM", "new_tokens": ["<a>", "<b>"]}
    write_adapter(tmp_path, model, book.entries, base=base, task=None, extra={})
    other = tiny_causal("Llama", seed=1, num_hidden_layers=1)
    with pytest.raises(VerificationError, match="the base weight is not the one"):
        mirrortune.load_adapter(other, tmp_path)
    with pytest.raises(ConfigError, match="half changed"):
        mirrortune.attach(other)
    # Also if it fails before the first layer.
    other = tiny_causal("Llama", hidden_size=16, num_hidden_layers=1)
    with pytest.raises(VerificationError, match="of shape"):
        mirrortune.load_adapter(other, tmp_path)
    with pytest.raises(ConfigError, match="half changed"):
        mirrortune.attach(other)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


WRAPPERS = [
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
    lambda model: torch.compile(model, backend="eager"),
    lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_saved_like_the_model(tmp_path: Path, wrap: Any) -> None:
    model = trained(mirrortune.attach(tiny_bert(), target_modules="query"))
    wrapped = wrap(model)
    assert mirrortune.trainable_parameters(wrapped) == mirrortune.trainable_parameters(model)
    mirrortune.save_adapter(wrapped, tmp_path / "wrapped")
    mirrortune.save_adapter(model, tmp_path / "bare")
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_nothing_is_attached_to_a_wrapper(tmp_path: Path, wrap: Any) -> None:
    mirrortune.save_adapter(mirrortune.attach(tiny_bert(), target_modules="query"), tmp_path)
    wrapped = wrap(tiny_bert())
    with pytest.raises(ConfigError, match=r"attach: got a model in .* Call attach with the model itself"):
        mirrortune.attach(wrapped)
    with pytest.raises(ConfigError, match="load_adapter: got a model in"):
        mirrortune.load_adapter(wrapped, tmp_path)
    with pytest.raises(ConfigError, match="AdapterBank: got a model in"):
        mirrortune.AdapterBank(wrapped)


def test_a_module_around_the_model_is_named(tmp_path: Path) -> None:
    outer = nn.Sequential(nn.Identity(), mirrortune.attach(tiny_bert(), target_modules="query"))
    with pytest.raises(ConfigError, match=r"its adapter is that of the module .1. inside\. Pass that module"):
        mirrortune.save_adapter(outer, tmp_path)
    with pytest.raises(ConfigError, match="its adapter is that of the module '1' inside"):
        mirrortune.trainable_parameters(outer)


def test_parameters_that_would_not_be_saved_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    model = mirrortune.attach(load_base(tiny_model_dir), target_modules="query")
    norm = model.get_submodule("bert.encoder.layer.0.output.LayerNorm").requires_grad_(requires_grad=True)
    message = r"outside the adapter .*: bert\.encoder\.layer\.0\.output\.LayerNorm\.weight, .*also_train"
    with pytest.raises(ConfigError, match=message):
        mirrortune.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    trainer = mirrortune.adapter_trainer(Trainer)(model, arguments_for(tmp_path, 2), train_dataset=rows_of())
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    norm.requires_grad_(requires_grad=False)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    other = mirrortune.attach(load_base(tiny_model_dir), target_modules="query", also_train=["output.LayerNorm"])
    mirrortune.save_adapter(trained(other), tmp_path / "adapter")
    mirrortune.save_adapter(mirrortune.load_adapter(load_base(tiny_model_dir), tmp_path / "adapter"), tmp_path / "b")


def test_a_trainer_without_an_adapter_is_refused_before_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    model = load_base(tiny_model_dir)
    trainer = mirrortune.adapter_trainer(Trainer)(model, arguments_for(tmp_path, 2), train_dataset=rows_of())
    with pytest.raises(ConfigError, match="it has no adapter"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_save_pretrained_of_an_adapted_model_warns(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = mirrortune.attach(load_base(tiny_model_dir), target_modules="query")
    for adapted in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match=r"^save_pretrained writes .*save_adapter.*merge") as said:
            adapted.save_pretrained(tmp_path / "model")
        assert said[0].filename == __file__
    load_base(tiny_model_dir).save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    bare = mirrortune.attach(load_base(tiny_model_dir), method="bitfit")
    bare.save_pretrained(tmp_path / "bitfit")  # type: ignore[operator]
    assert torch.equal(logits(load_base(tmp_path / "bitfit")), logits(bare))


def test_a_model_that_saves_itself_by_another_name_warns_once(tmp_path: Path) -> None:
    class Embedder(Sentences):
        """Saves its parts like a SentenceTransformer."""

        def save(self, folder: Path) -> None:
            self.encoder.save_pretrained(folder)  # type: ignore[operator]

        def save_pretrained(self, folder: Path) -> None:
            self.save(folder)

    whole = mirrortune.attach(Embedder(tiny_bert()), target_modules="query")
    inside = Embedder(mirrortune.attach(tiny_bert(), target_modules="query"))
    for embedder, said in ((whole, "^save writes .*save_adapter.*load_adapter"), (inside, "^save_pretrained writes")):
        for save in (embedder.save, embedder.save_pretrained):
            with pytest.warns(UserWarning, match=said) as given:
                save(tmp_path / "model")
            assert len(given) == 1


def test_lists_and_single_texts_mean_the_same() -> None:
    def layers(**arguments: Any) -> dict[str, bool]:
        model = mirrortune.attach(tiny_bert(), **arguments)
        return {name: p.requires_grad for name, p in model.named_parameters()}

    assert layers(target_modules=["query", "value"]) == layers(target_modules="query|value")
    assert layers(target_modules=["all-linear"]) == layers()
    assert layers(also_train="norms") == layers(also_train=["norms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": "8"}, "rank: got '8'. Allowed: a whole number"),
        ({"rank": True}, "rank: got True"),
        ({"rank": 4.0}, "rank: got 4.0"),
        ({"rank": -1}, "rank: got -1. Allowed: a whole number above 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": "1"}, "seed: got '1'"),
        ({"method": None}, "method: got None"),
        ({"pairing": 3}, "pairing: got 3"),
        ({"split": "c_attn"}, "split: got 'c_attn'"),
        ({"target_modules": 3}, "target_modules: got 3"),
        ({"target_modules": ["query", 3]}, "target_modules: got"),
        ({"target_modules": ["all-linear", "query"]}, "'all-linear' cannot be combined"),
        ({"also_train": [3]}, "also_train: got"),
    ],
)
def test_wrong_types_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        mirrortune.attach(tiny_bert(), **arguments)


@pytest.mark.parametrize("model", ["roberta-base", Path("bert"), None, tiny_bert])
def test_what_is_no_model_is_refused(model: Any, tmp_path: Path) -> None:
    for call in (
        mirrortune.attach,
        mirrortune.trainable_parameters,
        mirrortune.AdapterBank,
        lambda given: mirrortune.save_adapter(given, tmp_path / "a"),
        lambda given: mirrortune.load_adapter(given, tmp_path / "a"),
    ):
        with pytest.raises(ConfigError, match="model: got"):
            call(model)


def test_other_wrong_arguments_are_refused(tmp_path: Path) -> None:
    from transformers import Trainer

    with pytest.raises(ConfigError, match="form: got 'portabel'"):
        mirrortune.save_adapter(mirrortune.attach(tiny_bert()), tmp_path / "a", form="portabel")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rank: got '8'"):
        mirrortune.merge_adapter(None, tmp_path, tmp_path / "m", format="lora", rank="8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="base: got BertForSequenceClassification"):
        mirrortune.merge_adapter(tiny_bert(), tmp_path, tmp_path / "m")  # type: ignore[arg-type]
    for call in (mirrortune.attach, lambda model: mirrortune.load_adapter(model, tmp_path / "a")):
        with pytest.raises(ConfigError, match="the model is on the meta device"):
            call(tiny_bert().to("meta"))
    for wrong in ("Trainer", nn.Module, object.__new__(Trainer)):
        with pytest.raises(ConfigError, match="trainer_class: got"):
            mirrortune.adapter_trainer(wrong)  # type: ignore[arg-type]


def test_errors_name_arguments_instead_of_flags(tiny_model_dir: Path, tmp_path: Path) -> None:
    mirrortune.save_adapter(mirrortune.attach(tiny_bert(), target_modules="query"), tmp_path / "a")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"Choose another with output_dir\.$"):
        mirrortune.merge_adapter(tiny_model_dir, tmp_path / "a", tmp_path / "used")
    with pytest.raises(ConfigError, match=r"Name it with base\.$"):
        mirrortune.merge_adapter(None, tmp_path / "a", tmp_path / "m")
    with pytest.raises(ConfigError, match=r"Lower rank, or leave this layer out with target_modules\.$"):
        mirrortune.attach(tiny_bert(), rank=99)


def test_a_base_may_be_a_path(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = mirrortune.attach(load_base(tiny_model_dir), target_modules="query")
    mirrortune.save_adapter(model, tmp_path / "a")
    assert mirrortune.merge_adapter(tiny_model_dir, tmp_path / "a", tmp_path / "m")["passed"]


def test_a_foreign_base_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    mirrortune.save_adapter(mirrortune.attach(load_base(tiny_model_dir)), tmp_path / "adapter")
    with pytest.raises(VerificationError, match="the base weight is not the one"):
        mirrortune.load_adapter(tiny_bert(seed=2), tmp_path / "adapter")


@pytest.mark.parametrize("method", ["mirror", "lora"])
def test_a_base_with_another_number_of_classes_is_told_the_right_one(
    tiny_model_dir: Path, tmp_path: Path, method: str
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    mirrortune.save_adapter(mirrortune.attach(load_base(tiny_model_dir, num_labels=3), method), tmp_path / "adapter")
    with pytest.raises(VerificationError, match=r"shape \(3,.*Allowed: \(2,.*Load the base with num_labels=3"):
        mirrortune.load_adapter(load_base(tiny_model_dir), tmp_path / "adapter")


def test_any_torch_module_will_do(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    model = mirrortune.attach(build(), method="neighbor")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_()
    mirrortune.save_adapter(model, tmp_path / "adapter")
    x = torch.randn(5, 6)
    assert torch.equal(mirrortune.load_adapter(build(), tmp_path / "adapter")(x), model(x))


def test_the_transformers_trainer_trains_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = mirrortune.attach(load_base(tiny_model_dir))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": torch.randint(5, 45, (9,)), "labels": i % 2} for i in range(16)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=8, report_to=[], save_strategy="no",
        learning_rate=1e-2, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def rows_of(count: int = 24) -> list[dict[str, Any]]:
    """Token ids and labels that a Trainer takes."""
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(5, 45, (9,), generator=generator), "labels": i % 2} for i in range(count)]


def arguments_for(folder: Path, steps: int, **options: Any) -> Any:
    """Settings of a Trainer that saves a checkpoint every two steps."""
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, report_to=[], save_steps=2, learning_rate=1e-2,
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, lr_scheduler_type="constant", **options,
    )  # fmt: skip


def test_checkpoints_of_the_trainer_hold_the_adapter_and_resume(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    cls = mirrortune.adapter_trainer(Trainer)
    base = load_base(tiny_model_dir)
    head = {name: p.detach().clone() for name, p in base.named_parameters() if name.startswith("classifier")}

    def fresh() -> nn.Module:
        model = load_base(tiny_model_dir)
        model.load_state_dict(head, strict=False)
        return mirrortune.attach(model)

    whole = fresh()
    cls(whole, arguments_for(tmp_path / "whole", 4), train_dataset=rows_of()).train()
    half = tmp_path / "half"
    cls(fresh(), arguments_for(half, 2), train_dataset=rows_of()).train()
    saved = half / "checkpoint-2"
    assert {p.name for p in (saved / "adapter").iterdir()} == {"adapter.json", "adapter.safetensors"}
    assert not [p.name for p in saved.rglob("*") if "model" in p.name]
    resumed = fresh()
    cls(resumed, arguments_for(half, 4), train_dataset=rows_of()).train(resume_from_checkpoint=str(saved))
    for name, parameter in adapter_parameters(resumed).items():
        assert torch.equal(parameter, adapter_parameters(whole)[name])
    loaded = mirrortune.load_adapter(load_base(tiny_model_dir), half / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(resumed))


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps, of the default method."""
    from transformers import Trainer

    folder = tmp_path_factory.mktemp("trainer")
    model = mirrortune.attach(load_base(tiny_model_dir))
    mirrortune.adapter_trainer(Trainer)(model, arguments_for(folder, 2), train_dataset=rows_of()).train()
    return folder / "checkpoint-2"


def noisy(model: nn.Module) -> nn.Module:
    """Add noise to a weight of the encoder."""
    with torch.no_grad():
        weight = model.get_parameter("bert.encoder.layer.1.output.dense.weight")
        weight += 0.1 * torch.randn_like(weight)
    return model


def flipped(model: nn.Module) -> nn.Module:
    """Turn a layer's basis into another valid one, as another machine may compute it."""
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    with torch.no_grad():
        layer.get_parameter("U")[:, ::2] *= -1
        layer.get_parameter("Vh")[::2] *= -1
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda base: mirrortune.attach(base, pairing="neighbor"), "pair the directions of this weight differently"),
        (lambda base: mirrortune.attach(base, pairing="random"), "pair the directions of this weight differently"),
        (lambda base: mirrortune.attach(base, unit="angle"), "its adapter has options"),
        (lambda base: mirrortune.attach(base, method="mirror"), "its adapter has method 'mirror-scale'"),
        (lambda base: mirrortune.attach(base, target_modules="query"), "differ in the layers that they adapt"),
        (lambda base: mirrortune.attach(base, rank=8), "a basis of rank 32, the model has one of rank 8"),
        (lambda base: mirrortune.attach(noisy(base)), r"layer\.1\.output\.dense: the base weight is not the one"),
        (lambda base: flipped(mirrortune.attach(base)), "another basis of this weight"),
    ],
)
def test_a_checkpoint_is_restored_in_its_own_adapter_only(
    tiny_model_dir: Path, checkpoint: Path, tmp_path: Path, build: Any, message: str
) -> None:
    from transformers import Trainer

    model = build(load_base(tiny_model_dir))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = mirrortune.adapter_trainer(Trainer)(model, arguments_for(tmp_path, 4), train_dataset=rows_of())
    with pytest.raises(VerificationError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_checkpoint_that_was_loaded_is_resumed(tiny_model_dir: Path, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    model = mirrortune.load_adapter(load_base(tiny_model_dir), checkpoint)
    trainer = mirrortune.adapter_trainer(Trainer)(model, arguments_for(tmp_path, 4), train_dataset=rows_of())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4


def test_an_attached_model_works_inside_a_pipeline(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    model = trained(mirrortune.attach(load_base(tiny_model_dir)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    answers = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(["a good film", "bad"])
    with torch.no_grad():
        scores = model(**tokenizer(["a good film", "bad"], return_tensors="pt", padding=True)).logits.softmax(-1)
    assert [a["score"] for a in answers] == pytest.approx(scores.max(dim=-1).values.tolist(), abs=1e-5)


class Sentences(nn.Module):
    """An adapted model inside another, as in a SentenceTransformer."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.encoder = inside
        self.dense = nn.Linear(2, 2)

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_inside_the_trainers_is_saved_and_resumed(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    cls = mirrortune.adapter_trainer(Trainer)
    model = Sentences(mirrortune.attach(load_base(tiny_model_dir)))
    with pytest.raises(ConfigError, match=r"require gradients: dense\.weight, dense\.bias"):
        cls(model, arguments_for(tmp_path, 2), train_dataset=rows_of()).train()
    model.dense.requires_grad_(requires_grad=False)
    cls(model, arguments_for(tmp_path, 2), train_dataset=rows_of()).train()
    saved = tmp_path / "checkpoint-2"
    loaded = mirrortune.load_adapter(load_base(tiny_model_dir), saved)
    assert torch.equal(logits(loaded), logits(model.encoder))

    again = Sentences(loaded)
    again.dense.requires_grad_(requires_grad=False)
    trainer = cls(again, arguments_for(tmp_path, 4), train_dataset=rows_of())
    trainer.train(resume_from_checkpoint=str(saved))
    assert trainer.state.global_step == 4


@pytest.mark.sft
def test_sentence_transformers_trains_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from datasets import Dataset

    parts = st.sentence_transformer.modules
    embedder = st.SentenceTransformer(modules=[parts.Transformer(str(tiny_model_dir)), parts.Pooling(32)])
    mirrortune.attach(embedder[0].auto_model)
    rows = Dataset.from_dict({"a": ["a good film"] * 8, "b": ["a bad plot"] * 8, "score": [0.9, 0.1] * 4})
    loss = st.sentence_transformer.losses.CoSENTLoss(embedder)
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True
    )
    cls = mirrortune.adapter_trainer(st.SentenceTransformerTrainer)
    cls(model=embedder, args=arguments, train_dataset=rows, loss=loss).train()
    assert not [p.name for p in (tmp_path / "checkpoint-2").rglob("*.safetensors") if p.parent.name != "adapter"]
    mirrortune.merge_adapter(tiny_model_dir, tmp_path / "checkpoint-2", tmp_path / "merged")


@pytest.mark.sft
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own
def test_trl_trains_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import tiny_causal, tiny_chat_tokenizer

    tiny_causal().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = mirrortune.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rank=8)
    arguments = trl.SFTConfig(
        str(tmp_path / "out"), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, bf16=False,
    )  # fmt: skip
    rows = Dataset.from_dict({"text": ["a good film", "a bad film", "a long plot", "the cast"]})
    cls = mirrortune.adapter_trainer(trl.SFTTrainer)
    before = adapter_parameters(model)["model.layers.0.mlp.up_proj.theta"].detach().clone()
    cls(model, arguments, train_dataset=rows, processing_class=tiny_chat_tokenizer()).train()
    last = tmp_path / "out" / "checkpoint-2"
    assert not torch.equal(adapter_parameters(model)["model.layers.0.mlp.up_proj.theta"], before)
    assert not [p.name for p in last.rglob("*.safetensors") if p.parent.name != "adapter"]
    loaded = mirrortune.load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), last)
    for name, parameter in adapter_parameters(loaded).items():
        assert torch.equal(parameter, adapter_parameters(model)[name])
    again = mirrortune.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rank=8)
    cls(again, arguments, train_dataset=rows, processing_class=tiny_chat_tokenizer()).train(
        resume_from_checkpoint=str(last)
    )
    for name, parameter in adapter_parameters(again).items():  # nothing was left to train
        assert torch.equal(parameter, adapter_parameters(model)[name])


def _compiled_regions(model: Any) -> Any:
    from accelerate.utils import compile_regions

    return compile_regions(model, backend="eager")


def _compiled_layers(model: Any) -> Any:
    layers = model.bert.encoder.layer
    for index in range(len(layers)):
        layers[index] = torch.compile(layers[index], backend="eager")
    return model


def _checkpointed(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, type(model.bert.encoder.layer[0])))
    return model


@pytest.mark.parametrize("wrap", [_compiled_regions, _compiled_layers, _checkpointed])
def test_a_model_whose_layers_are_wrapped_is_saved(tmp_path: Path, wrap: Any) -> None:
    model = wrap(trained(mirrortune.attach(tiny_bert())))
    mirrortune.save_adapter(model, tmp_path / "adapter")
    loaded = mirrortune.load_adapter(tiny_bert(), tmp_path / "adapter")
    assert not torch.allclose(logits(loaded), logits(tiny_bert()), atol=1e-3)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_module_that_forwards_attributes_is_saved(tmp_path: Path) -> None:
    class Forwarding(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inside"), name)

    model = mirrortune.attach(tiny_bert().bert)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.uniform_(-0.1, 0.1)
    model.more = nn.Linear(2, 2)  # as PEFT puts its parameters into the model that it wraps
    with pytest.raises(ConfigError, match=r"parameters outside the adapter .*: more\.weight, more\.bias"):
        mirrortune.save_adapter(Forwarding(model), tmp_path / "adapter")
    del model.more
    mirrortune.save_adapter(Forwarding(model), tmp_path / "adapter")
    loaded = mirrortune.load_adapter(tiny_bert().bert, tmp_path / "adapter")
    found, expected = adapter_parameters(loaded), adapter_parameters(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], p) and p.any() for name, p in expected.items())


def test_an_adapted_model_goes_with_its_last_reference(tmp_path: Path) -> None:
    model = mirrortune.attach(tiny_bert())
    other = copy.deepcopy(model)
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()
    with pytest.warns(UserWarning, match="save_pretrained"):
        other.save_pretrained(tmp_path)  # of the copy itself


def test_whole_numbers_of_numpy_are_taken() -> None:
    spec = mirrortune.attach(tiny_bert(), rank=np.int64(4), seed=np.int64(3)).mirrortune.spec  # type: ignore[arg-type]
    assert (type(spec.rank), spec.rank, type(spec.seed), spec.seed) == (int, 4, int, 3)


@pytest.mark.parametrize(
    "options", [{"method": "mirror", "rank": 4}, {"method": "mirror"}, {"method": "lora", "rank": 2}]
)
def test_base_weights_that_change_after_attach_are_named_when_the_adapter_is_saved(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = mirrortune.attach(tiny_bert(), target_modules="query|value", **options)
    mirrortune.save_adapter(model.half().float(), tmp_path / "cast")
    layer = model.get_submodule("bert.encoder.layer.1.attention.self.value")
    with torch.no_grad():
        layer.base_layer.weight.data.mul_(1.1)
    with pytest.warns(UserWarning, match=r"changed after the adapter was attached: bert\S+layer\.1\S+value\. The"):
        mirrortune.save_adapter(model, tmp_path / "edited")
