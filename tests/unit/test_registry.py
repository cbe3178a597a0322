# SPDX-License-Identifier: Apache-2.0
"""registry: names, options and their errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from mirrortune.errors import ConfigError
from mirrortune.registry import Registry


@pytest.fixture
def registry() -> Registry:
    """Two items, one with options."""
    found: Registry = Registry("pairing")

    @found.register("mirror")
    def mirror(rank: int) -> int:
        return rank

    @found.register("block")
    def block(
        rank: int, *, size: int = 2, overlap: bool = False, top: int | Literal["all"] = "all", gain: float = 1.0
    ) -> int:
        return rank * size

    return found


def test_items_are_found_by_name(registry: Registry) -> None:
    assert registry.get("block", "adapter.pairing")(3) == 6
    assert registry.names() == list(registry) == ["block", "mirror"]


def test_the_decorator_leaves_its_target_as_it_is(registry: Registry) -> None:
    def plain(rank: int) -> int:
        return rank

    assert registry.register("plain")(plain) is plain
    assert registry.get("plain", "test") is plain


def test_a_name_is_registered_once(registry: Registry) -> None:
    with pytest.raises(ValueError, match="pairing 'mirror' is registered already"):
        registry.register("mirror")


def test_an_unknown_name_is_refused_with_the_nearest(registry: Registry) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.get("miror", "recipe.yaml:7: adapter.pairing")
    expected = "recipe.yaml:7: adapter.pairing: unknown pairing 'miror'. Did you mean 'mirror'? Allowed: block, mirror."
    assert str(caught.value) == expected
    assert caught.value.exit_code == 2


def test_a_name_that_is_near_nothing_gets_no_suggestion(registry: Registry) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.get("xyz", "here")
    assert "Did you mean" not in str(caught.value)


def test_options_are_the_keyword_only_parameters(registry: Registry) -> None:
    assert registry.options("mirror") == {}
    defaults = {name: p.default for name, p in registry.options("block").items()}
    assert defaults == {"size": 2, "overlap": False, "top": "all", "gain": 1.0}


def test_unknown_options_are_refused_all_at_once(registry: Registry) -> None:
    registry.check_options("block", {"size": 3}, "adapter.options")
    with pytest.raises(ConfigError, match=r"adapter\.options\.sise: pairing 'block' has no option 'sise'.*'size'"):
        registry.check_options("block", {"sise": 3}, "adapter.options")
    with pytest.raises(ConfigError) as caught:
        registry.check_options("mirror", {"a": 1, "rank": 2}, "adapter.options")
    assert str(caught.value).count("Allowed: no options") == 1
    assert "adapter.options.rank: pairing 'mirror' has no option 'rank'. It is adapter.rank here." in str(caught.value)
    with pytest.raises(ConfigError, match=r"has no option 'paring'\. Did you mean adapter\.pairing\? Allowed: "):
        registry.check_options("block", {"paring": "random"}, "adapter.options")
    with pytest.raises(ConfigError, match=r"has no option 'lora_alpha'\. Allowed: "):  # not a setting of all methods
        registry.check_options("block", {"lora_alpha": 3}, "adapter.options")
    with pytest.raises(ConfigError, match=r"has no option 'learning_rate'\. Allowed: "):  # of another section
        registry.check_options("block", {"learning_rate": 3}, "adapter.options")


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({"size": 2.0}, "a whole number"),
        ({"size": True}, "a whole number"),
        ({"size": "2"}, "a whole number"),
        ({"size": None}, "a whole number"),
        ({"overlap": "yes"}, "true or false"),
        ({"overlap": 1}, "true or false"),
        ({"top": "some"}, "a whole number or all"),
        ({"top": ["all"]}, "a whole number or all"),
        ({"gain": "1"}, "a number"),
        ({"gain": float("nan")}, "a number"),
    ],
)
def test_values_of_another_type_are_refused(registry: Registry, given: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.check_options("block", given, "adapter.options")
    ((key, value),) = given.items()
    assert str(caught.value) == f"adapter.options.{key}: got {value!r}. Allowed: {allowed}."


def test_values_of_the_right_type_are_taken(registry: Registry) -> None:
    for given in ({"size": 3, "overlap": True, "top": "all", "gain": 2}, {"top": 4, "gain": 0.5}):
        registry.check_options("block", given, "adapter.options")


def test_names_of_a_package_are_those_of_its_files_and_cost_no_import(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "somebodys_shapes"
    folder.mkdir()
    (folder / "__init__.py").write_text("from somebodys_shapes import big_square\n")
    (folder / "_drawing.py").write_text("")
    (folder / "big_square.py").write_text(
        f"from {__name__} import SHAPES\n@SHAPES.register('big-square')\ndef big_square(*, side=2):\n    return side\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert SHAPES.names() == ["big-square"]
    assert "somebodys_shapes" not in sys.modules
    assert set(SHAPES.options("big-square")) == {"side"}
    assert SHAPES.get("big-square", "test")() == 2
    SHAPES.register("dot")(lambda: 0)  # what registers itself elsewhere is known too
    assert SHAPES.names() == ["big-square", "dot"]
    with pytest.raises(ConfigError, match=r"unknown shape 'dott'\. Did you mean 'dot'"):
        SHAPES.get("dott", "test")


SHAPES: Registry[Any] = Registry("shape", package="somebodys_shapes")
