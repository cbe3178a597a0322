# SPDX-License-Identifier: Apache-2.0
"""adapter_file: what is written, and that nothing damaged, foreign or newer is ever loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.files.adapter_file import Form, read_adapter, write_adapter
from mirrortune.adapters.files.description import FORMAT_VERSION
from mirrortune.adapters.files.load import load_into, stored_targets
from mirrortune.adapters.files.tensors import pack_tensors, to_bits, unpack_tensors
from mirrortune.adapters.fingerprint import fingerprint
from mirrortune.adapters.inject import spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.errors import MirrortuneError, VerificationError
from tests.spectral import relative, train_a_little
from tests.tiny_models import tiny_bert, tiny_roberta
from tests.tiny_runs import adapt, logits

QUERY = "bert.encoder.layer.0.attention.self.query"
# Two layers: loading is a matter of milliseconds.
SMALL = AdapterSpec(method="random", target_modules="attention.self.query", options={"scale_top_k": 2})


def compute(name: str, weight: Tensor, rank: int) -> Factors:
    """A factor source without a memory."""
    return factorize(weight, rank, name=name)


def load(folder: Path) -> torch.nn.Module:
    """The tiny BERT with the adapter in ``folder``."""
    model = tiny_bert()
    load_into(model, read_adapter(folder), compute)
    return model


def spelt_out(folder: Path) -> dict[str, Any]:
    """What the description says, with what its layers share in each of them; and without its own hash."""
    description: dict[str, Any] = json.loads((folder / "adapter.json").read_text())
    del description["description_sha256"]
    shared = json.dumps(description.pop("layers_share", {}))
    description["layers"] = {name: {**json.loads(shared), **own} for name, own in description["layers"].items()}
    return description


def sign(folder: Path, description: dict[str, Any], data: bytes | None = None) -> None:
    """Write a description, and the file of tensors if it is another one, with hashes that fit."""
    if data is not None:
        (folder / "adapter.safetensors").write_bytes(data)
        description["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(description, sort_keys=True)
    description["description_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(description))


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change an adapter as a program would that knows the format: layer by layer, and put together again."""
    description = spelt_out(folder)
    tensors = unpack_tensors(load_file(folder / "adapter.safetensors"), description["layers"])
    change(description, tensors)
    layers = description.get("layers", {})
    signs = [tensors.pop(key) for key in list(tensors) if key.startswith("signs.")]
    packed, holds = pack_tensors(tensors, list(layers))
    for name, own in holds.items():
        layers[name]["holds"] = own
    sign(folder, description, save(packed | ({"signs": torch.cat([*map(to_bits, signs)])} if signs else {})))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trained adapter on disk."""
    return adapt(SMALL).save(tmp_path / "adapter")


def test_the_files_hold_what_the_format_says(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    layers = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert set(tensors) == {
        "core.theta",
        "core.scale",
        "partners",
        "effects",
        "signs",
        "param.classifier.weight",
        "param.classifier.bias",
    }
    assert {t.dtype for n, t in tensors.items() if n not in ("partners", "signs")} == {torch.float32}
    assert (tensors["partners"].dtype, tensors["partners"].shape) == (torch.int16, (2 * 16,))
    assert (tensors["signs"].dtype, tensors["signs"].shape) == (torch.uint8, (2 * 32 // 8,))
    description = json.loads((folder / "adapter.json").read_text())
    assert description["format_version"] == FORMAT_VERSION
    assert description["adapter"]["method"] == "random"
    assert description["head"] == ["classifier.weight", "classifier.bias"]
    assert list(description["layers"]) == layers
    assert description["layers_share"]["layout"]["shape"] == [32, 32]
    assert description["layers_share"]["holds"] == {"core.scale": [2], "core.theta": [16], "partners": [16]}
    assert description["layers"][QUERY].keys() == {"weight"}
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_an_adapter_is_a_few_kilobytes(tmp_path: Path) -> None:
    adapted = adapt()
    (tmp_path / "a").mkdir()
    size = write_adapter(
        tmp_path / "a", adapted.model, adapted.book.entries, base={"name": "tiny"}, task=None, extra={"max_length": 7}
    )
    assert size == sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) < 20_000
    found = read_adapter(tmp_path / "a")
    assert found.extra == {"max_length": 7}
    assert found.base == {"name": "tiny"}
    assert found.spec == AdapterSpec().settled()


def test_an_untouched_adapter_loads(folder: Path) -> None:
    assert torch.equal(logits(load(folder)), adapt(SMALL).logits())
    rewrite(folder, lambda description, tensors: None)
    assert torch.equal(logits(load(folder)), adapt(SMALL).logits())
    rewrite(folder, in_shards(lambda sketch: sketch))
    assert torch.equal(logits(load(folder)), adapt(SMALL).logits())


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder: Path, name: str, share: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VerificationError) as caught:
        load(folder)
    assert caught.value.exit_code == 5
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(VerificationError, match="missing"):
        load(folder)


@pytest.fixture(scope="module")
def shared_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter that is put back after every example."""
    return adapt(SMALL).save(tmp_path_factory.mktemp("shared") / "adapter")


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
@settings(max_examples=150)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(shared_adapter: Path, name: str, place: int, bit: int) -> None:
    whole, path = read_adapter(shared_adapter), shared_adapter / name
    data = path.read_bytes()
    changed = bytearray(data)
    changed[place % len(data)] ^= 1 << bit
    path.write_bytes(changed)
    try:
        found = read_adapter(shared_adapter)
    except VerificationError as error:
        assert "Restore" in str(error) or "Give the folder" in str(error) or "Upgrade" in str(error)  # noqa: PT017
    else:  # 1e-05 may become 1E-05
        assert name == "adapter.json"
        assert found.spec == whole.spec
        assert found.base == whole.base
        assert {n: (f.probe_seeds, f.side, f.clusters) for n, f in found.fingerprints.items()} == {
            n: (f.probe_seeds, f.side, f.clusters) for n, f in whole.fingerprints.items()
        }
    finally:
        path.write_bytes(data)


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """A change that leaves one tensor out."""

    def apply(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return apply


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """A change of one tensor."""

    def apply(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return apply


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    """One number of a tensor becomes ``value``."""

    def apply(tensor: Tensor) -> Tensor:
        tensor.view(-1)[1] = value
        return tensor

    return apply


def in_shards(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """The file is as one of a model in shards, which has whole sketches and no effects; one of them is changed."""

    def apply(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors["effects"]
        for name in description["layers"]:
            weight = tiny_bert().get_parameter(f"{name}.weight").detach()
            del tensors[f"signs.{name}"]
            tensors[f"sketch.{name}"] = fingerprint(weight, factorize(weight), "output").sketch
        tensors[SKETCH] = change(tensors[SKETCH])

    return apply


THETA, HEAD, SKETCH = f"core.{QUERY}.theta", "param.classifier.weight", f"sketch.{QUERY}"
WRONG: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = {
    "a head of 8 bits": (put(HEAD, lambda t: t.to(torch.float8_e4m3fn)), f"dtype float8_e4m3fn of tensor '{HEAD}'"),
    "a layer of 8 bits": (
        lambda d, t: d["layers"][QUERY].update(dtype="float8_e4m3fn"),
        f"the dtype of '{QUERY}' is invalid",
    ),
    "no angles": (drop(THETA), f"tensor '{THETA}' is missing from the adapter"),
    "no head": (drop(HEAD), f"tensor '{HEAD}' is missing from the adapter"),
    "no signs": (drop(f"signs.{QUERY}"), "damaged"),
    "no effects": (drop("effects"), "signs without effects"),
    "one tensor more": (
        lambda d, t: t.update({"core.other.theta": torch.zeros(1)}),
        "'core.other.theta' is invalid",
    ),
    "NaN angle": (put(THETA, spoil(float("nan"))), f"tensor '{THETA}' holds NaN or infinities"),
    "infinite head": (put(HEAD, spoil(float("inf"))), f"tensor '{HEAD}' holds NaN or infinities"),
    "NaN sketch": (in_shards(spoil(float("nan"))), f"the sketch of '{QUERY}' holds NaN"),
    "another sketch": (
        in_shards(spoil(0.25)),
        f"{QUERY}: the basis of this weight cannot be aligned.* direction 1 of 32",
    ),
    "angles of another shape": (put(THETA, lambda t: t[:-1]), rf"'{THETA}' has shape \(15,\).*Allowed: \(16,\)"),
    "head of another shape": (put(HEAD, lambda t: t.T.contiguous()), rf"'{HEAD}' has shape \(32, 2\)"),
    "a number in place of the head's bias": (
        put("param.classifier.bias", torch.sum),
        r"bias' has shape \(\)\. Allowed: \(2,\)",
    ),
    "sketch of another rank": (
        in_shards(lambda t: t[:, :-1].contiguous()),
        f"{QUERY}: the adapter holds a basis of rank 31",
    ),
    "another weight": (
        lambda d, t: d["layers"][QUERY].update(weight=f"values:{'0' * 64}"),
        f"{QUERY}: the base weight is not",
    ),
    "another shape": (
        lambda d, t: d["layers"][QUERY]["layout"].update(shape=[32, 16]),
        rf"{QUERY}: .*shape \(32, 16\)",
    ),
    "one layer less": (lambda d, t: d["layers"].pop(QUERY), "damaged"),
    "a newer format": (
        lambda d, t: d.update(format_version=FORMAT_VERSION + 1),
        f"format version {FORMAT_VERSION + 1}.*Upgrade mirrortune",
    ),
    "a format without a number": (lambda d, t: d.update(format_version="1"), "format version '1'"),
    "no layers": (lambda d, t: d.pop("layers"), "damaged"),
    "unknown spec": (lambda d, t: d["adapter"].update(colour="red"), "damaged"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(folder: Path, wrong: str) -> None:
    change, message = WRONG[wrong]
    rewrite(folder, change)
    with pytest.raises(VerificationError, match=message) as caught:
        load(folder)
    assert caught.value.exit_code == 5


ODD: list[Any] = [None, True, -1, 10**30, 0.5, "", "a", "\n", [], [1], [[1, 2]], {}, {"a": 1}]


def places(value: Any, *keys: Any) -> list[tuple[Any, ...]]:
    """The keys of every value inside JSON data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, own in inner for found in ((*keys, key), *places(own, *keys, key))]


@pytest.mark.parametrize("method", ["random", "lora"])
def test_any_value_of_the_description_may_be_anything(tmp_path: Path, method: str) -> None:
    model = mirrortune.attach(tiny_bert(), method=method, target_modules="layer.0.attention.self.query", rank=4)
    mirrortune.save_adapter(model, tmp_path)
    whole = spelt_out(tmp_path)
    assert len(places(whole)) > 30
    for keys in places(whole):
        for odd in ODD:
            description = json.loads(json.dumps(whole))
            place = description
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = odd
            sign(tmp_path, description)
            with suppress(VerificationError):  # and nothing else; some values mean something
                found = read_adapter(tmp_path)
                with suppress(MirrortuneError):
                    stored_targets(tiny_bert(), found)


def test_any_value_of_pefts_configuration_may_be_anything(tmp_path: Path) -> None:
    model = mirrortune.attach(tiny_bert(), method="lora", target_modules="layer.0.attention.self.query", rank=4)
    mirrortune.save_adapter(model, tmp_path)
    path, description = tmp_path / "adapter_config.json", spelt_out(tmp_path)
    whole = json.loads(path.read_text())
    for key in whole:
        for odd in ODD:
            data = json.dumps({**whole, key: odd}).encode()
            path.write_bytes(data)
            sign(tmp_path, {**description, "config_sha256": hashlib.sha256(data).hexdigest()})
            with suppress(VerificationError):
                read_adapter(tmp_path)


def test_a_method_that_is_not_known_here_is_named(folder: Path) -> None:
    rewrite(folder, lambda description, tensors: description["adapter"].update(method="toy"))
    with pytest.raises(VerificationError, match=r"unknown method 'toy'.*import what defines its method"):
        read_adapter(folder)


def test_errors_of_other_kinds_are_not_taken_for_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), TypeError("a mistake"), AttributeError("another")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("mirrortune.adapters.files.adapter_file.check_tensors", fail)
        with pytest.raises(type(error)):
            read_adapter(folder)


def test_text_that_is_no_description_is_refused(folder: Path) -> None:
    for text in ("", "[]", "null", "3", '"text"', "{}", "{", "\x00"):
        (folder / "adapter.json").write_text(text)
        with pytest.raises(VerificationError, match=r"adapter\.json: "):
            read_adapter(folder)


def test_an_edited_description_is_refused(folder: Path) -> None:
    path = folder / "adapter.json"
    path.write_text(path.read_text().replace('"random"', '"mirror"'))
    with pytest.raises(VerificationError, match="damaged or edited"):
        read_adapter(folder)


def test_another_model_is_refused_by_layer(folder: Path) -> None:
    with pytest.raises(VerificationError, match=rf"^{QUERY}: .*no such layer"):
        load_into(tiny_roberta(), read_adapter(folder), compute)
    with pytest.raises(VerificationError, match=rf"^{QUERY}: .*\(32, 32\).*\(16, 16\)"):
        load_into(tiny_bert(hidden_size=16), read_adapter(folder), compute)
    with pytest.raises(VerificationError, match=rf"^{QUERY}: the base weight is not"):
        load_into(tiny_bert(seed=1), read_adapter(folder), compute)


def test_refusing_trained_tensors_names_the_place(folder: Path) -> None:
    model = adapt(SMALL).model
    with pytest.raises(VerificationError, match=rf"^{folder}: tensor .* is missing"):
        replace(read_adapter(folder), tensors={}).restore(model)


def test_an_adapter_without_a_core_holds_parameters_alone(tmp_path: Path) -> None:
    adapted = adapt(AdapterSpec(method="bitfit"))
    with torch.no_grad():
        adapted.model.get_parameter("bert.pooler.dense.bias").add_(1)
    folder = adapted.save(tmp_path / "adapter")
    assert all(name.startswith("param.") for name in load_file(folder / "adapter.safetensors"))
    loaded = load(folder)
    assert not spectral_layers(loaded)
    assert torch.equal(logits(loaded), adapted.logits())


def base_of(dtype: torch.dtype) -> torch.nn.Module:
    """Return the tiny BERT in ``dtype``."""
    return tiny_bert().to(dtype)


def trained(model: torch.nn.Module, method: str = "mirror") -> torch.nn.Module:
    """Attach an adapter to ``model`` and give its cores random parameters."""
    return train_cores(mirrortune.attach(model, method=method), 0)


@torch.no_grad()
def train_cores(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give all cores of ``model`` random parameters."""
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, seed + index)
    return model


WIDER = [
    ("mirror", torch.bfloat16),
    ("mirror-scale", torch.bfloat16),
    ("scale", torch.float16),
    ("svft", torch.float16),
]


@pytest.mark.parametrize("form", ["compact", "portable"])
@pytest.mark.parametrize(("method", "dtype"), WIDER)
def test_an_adapter_loaded_in_a_wider_dtype_can_be_saved_again(
    tmp_path: Path, method: str, dtype: torch.dtype, form: Form
) -> None:
    narrow = trained(base_of(dtype), method)
    mirrortune.save_adapter(narrow, tmp_path / "first", form=form)
    wide = mirrortune.load_adapter(base_of(dtype).float(), tmp_path / "first")
    for again in ("compact", "portable"):
        mirrortune.save_adapter(wide, tmp_path / again, form=again)
        assert set(read_adapter(tmp_path / again).dtypes.values()) == {str(dtype).removeprefix("torch.")}
        loaded = mirrortune.load_adapter(base_of(dtype).float(), tmp_path / again)
        assert torch.equal(logits(loaded), logits(wide))
        assert torch.equal(logits(mirrortune.load_adapter(base_of(dtype), tmp_path / again)), logits(narrow))
    train_cores(wide, 5)
    mirrortune.save_adapter(wide, tmp_path / "trained", form=form)
    loaded = mirrortune.load_adapter(base_of(dtype).float(), tmp_path / "trained")
    assert torch.equal(logits(loaded), logits(wide))


@pytest.mark.parametrize("strategy", [None, "factored", "dense"])
def test_an_untrained_adapter_loaded_in_a_wider_dtype_is_its_base(tmp_path: Path, strategy: Strategy | None) -> None:
    narrow = adapt(AdapterSpec(method="mirror", strategy=strategy), model=base_of(torch.bfloat16), trained=None)
    folder = narrow.save(tmp_path / "adapter", dtype="bfloat16")
    base = base_of(torch.bfloat16).float()
    expected = logits(base)
    assert relative(logits(mirrortune.load_adapter(base, folder)), expected) <= 1e-6


@pytest.mark.parametrize("form", ["compact", "portable"])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_an_adapter_converted_to_a_narrower_dtype_is_saved_with_it(tmp_path: Path, form: Form, is_loaded: bool) -> None:
    model = trained(base_of(torch.bfloat16).float())
    if is_loaded:
        mirrortune.save_adapter(model, tmp_path / "first")
        model = mirrortune.load_adapter(base_of(torch.bfloat16).float(), tmp_path / "first")
    mirrortune.save_adapter(model.bfloat16(), tmp_path / "adapter", form=form)
    assert set(read_adapter(tmp_path / "adapter").dtypes.values()) == {"bfloat16"}
    for base in (base_of(torch.bfloat16), base_of(torch.bfloat16).float()):
        loaded = mirrortune.load_adapter(base, tmp_path / "adapter")
        for name, layer in spectral_layers(loaded).items():  # outputs differ: the loaded core computes in float32
            assert relative(layer.delta_weight(), spectral_layers(model)[name].delta_weight()) <= 1e-4


def test_the_coarser_of_two_16_bit_dtypes_is_saved(tmp_path: Path) -> None:
    mirrortune.save_adapter(trained(base_of(torch.bfloat16)), tmp_path / "first")
    model = mirrortune.load_adapter(base_of(torch.bfloat16).float(), tmp_path / "first").half()
    mirrortune.save_adapter(model, tmp_path / "adapter", form="compact")
    loaded = mirrortune.load_adapter(base_of(torch.bfloat16).float(), tmp_path / "adapter")
    for name, layer in spectral_layers(loaded).items():
        assert relative(layer.delta_weight(), spectral_layers(model)[name].delta_weight()) <= 1e-4


@pytest.mark.parametrize("form", ["compact", "portable"])
def test_a_layer_of_one_output_is_saved_in_its_own_dtype(tmp_path: Path, form: Form) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))

    model = trained(base(), "svft")  # the left factor of the second layer is 1, which 16 bits hold exactly
    mirrortune.save_adapter(model, tmp_path / "adapter", form=form)
    assert set(read_adapter(tmp_path / "adapter").dtypes.values()) == {"float32"}
    x = torch.randn(4, 16)
    torch.testing.assert_close(mirrortune.load_adapter(base(), tmp_path / "adapter")(x), model(x))
