# SPDX-License-Identifier: Apache-2.0
"""The settings of an adapter, their checks, and the cores and pairs that are built from them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mirrortune.adapters.core import CoreStack
from mirrortune.adapters.cores import CORES, Core
from mirrortune.adapters.methods import PeftTuner, Preset, method_names, preset
from mirrortune.adapters.pairings.listed import PairLists, check_lists, list_for
from mirrortune.adapters.pairings.rules import PAIRINGS
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Rank
from mirrortune.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """The settings of an adapter, independent of the weights of a model; the fields are JSON data.

    ``pairing`` is the name of a pairing, or the pairs for the pairing ``explicit``: a list of pairs, or lists by layer
    name or pattern.
    """

    method: str = "mirror-scale"
    rank: Rank | None = None
    pairing: str | PairLists | None = None
    target_modules: str = "all-linear"
    seed: int = 0
    strategy: Strategy | None = None
    options: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int | str, ...] | None = None
    also_train: tuple[str, ...] = ()
    new_rows: tuple[int, int] | None = None

    @property
    def preset(self) -> Preset:
        """The preset that ``method`` names."""
        return preset(self.method)

    @property
    def resolved_rank(self) -> Rank:
        """The requested rank, or that of the preset."""
        return self.preset.rank if self.rank is None else self.rank

    @property
    def resolved_pairing(self) -> str | None:
        """The name of the requested pairing, or of that of the preset."""
        if self.pairing is None or isinstance(self.pairing, str):
            return self.pairing or self.preset.pairing
        return "explicit"

    @property
    def pair_lists(self) -> PairLists | None:
        """The pairs listed by the user, if any."""
        return None if isinstance(self.pairing, str) else self.pairing

    @property
    def resolved_options(self) -> dict[str, Any]:
        """The requested options, and those of the preset that are not requested."""
        return {**self.preset.options, **self.options}

    @property
    def rounds(self) -> int:
        """Number of rounds of pairs: the option ``rounds`` of the core, 1 if the core has no such option."""
        return int(self.resolved_options.get("rounds", 1))

    @property
    def basis(self) -> Literal["weight", "gradient"] | None:
        """Source of the singular vectors that the adapter uses, see ``Core.basis``; None without a core."""
        core = self.preset.core
        return None if core is None else CORES.get(core, "adapter.method").basis

    @property
    def trains_base(self) -> bool:
        """Whether parameters of the base are trained as they are, of which some may have no part in a loss."""
        return self.preset.plain != "none" or bool(self.also_train)

    def settled(self) -> AdapterSpec:
        """Return this spec with the pairing and options of the method filled in, so that it depends on no default.

        ``rank`` is not filled in, because a default rank is lowered for a layer with fewer directions, whereas a
        requested rank is refused.
        """
        if self.preset.core is None:
            return self
        options = CORES.options(self.preset.core)
        own = {key: p.default for key, p in options.items() if p.default is not inspect.Parameter.empty}
        pairing = self.pairing or self.preset.pairing
        return replace(self, pairing=pairing, options=own | self.resolved_options)

    def to_dict(self) -> dict[str, Any]:
        """Return the settled fields as JSON data; of listed pairs, which adapters store as tensors, only the name.

        Without ``layers``, ``also_train`` and ``new_rows``: adapters list the names of what these have chosen.
        """
        found = asdict(self.settled())
        del found["layers"], found["also_train"], found["new_rows"]
        return found if self.pair_lists is None else {**found, "pairing": self.resolved_pairing}


def as_asked(spec: AdapterSpec) -> AdapterSpec:
    """Return the spec for a user's settings.

    ``rank`` sets the option that the method's paper calls the rank, and the strategy for a basis that is not that of
    the weight defaults to ``branch``. Options that follow from the seed are filled in. Settings that
    :func:`check_asked` refuses are unchanged. Specs from files must not be passed.
    """
    if spec.method not in method_names():
        return spec
    if spec.preset.core is not None:
        given = spec.resolved_options
        seeded = CORES.get(spec.preset.core, "adapter.method").seeded(given, spec.seed)
        drawn = {name: value for name, value in seeded.items() if name not in given}
        spec = replace(spec, options={**spec.options, **drawn})
    if spec.basis == "gradient" and spec.strategy is None:
        spec = replace(spec, strategy="branch")  # the factors cannot replace the weight, and few directions cost little
    option = spec.preset.rank_option
    if option is None or not isinstance(spec.rank, int) or option in spec.options:
        return spec
    return replace(spec, rank=None, options={**spec.options, option: spec.rank})


def check_asked(spec: AdapterSpec) -> None:
    """Check what only a user can correct: that :func:`as_asked` can use the rank, and that PEFT's tuners get no split.

    Raises:
        ConfigError: the rank is not an integer, or the option that it sets is given as well; or layers are to be split.
    """
    if spec.split and spec.preset.peft is not None:
        raise _no_such(spec, "split", spec.split)
    option = spec.preset.rank_option
    if option is None or spec.rank is None:
        return
    if option in spec.options:
        raise ConfigError(f"adapter.options.{option}", "it is the same as adapter.rank", fix="Give one of the two")
    raise ConfigError(
        "adapter.rank", f"got {spec.rank!r}", allowed=f"a number, for method '{spec.method}': it sets {option}"
    )


def unused_layer_settings(spec: AdapterSpec) -> str | None:
    """Return a remark if settings of layers have no effect, or None.

    They are no error: recipes set them for their adapters, and are trained with ``full`` and ``none`` to compare.
    """
    is_default = spec.target_modules == AdapterSpec().target_modules
    given = {"target_modules": not is_default, "split": bool(spec.split), "strategy": spec.strategy is not None}
    if spec.preset.is_adapter or not any(given.values()):
        return None
    names = [f"adapter.{key}" for key, is_given in given.items() if is_given]
    return f"not used, since '{spec.method}' adapts no layers: {', '.join(names)}"


def _no_such(spec: AdapterSpec, key: str, value: object) -> ConfigError:
    return ConfigError(f"adapter.{key}", f"method '{spec.method}' has no {key}, got {value!r}", fix="Remove it")


def check_spec(spec: AdapterSpec) -> None:
    """Check that the method, pairing and options exist, and that the method uses all settings.

    Raises:
        ConfigError: it reports all problems together, each with the nearest name and the allowed values.
    """
    errors: list[ConfigError] = []
    try:
        chosen = spec.preset
    except ConfigError as error:  # other settings depend on the method, but names can still be checked
        unknown = _unknown_pairing(spec.pairing)
        raise ConfigError.several([error, *([unknown] if unknown else [])]) from None
    if chosen.plain != "none" and spec.also_train:
        problem = f"method '{spec.method}' chooses itself what it trains of the base, got {list(spec.also_train)}"
        errors.append(ConfigError("adapter.also_train", problem, fix="Remove it, or use --method none"))
    if chosen.peft is not None:  # its options are checked against PEFT's by peft_bridge.options.check_options
        errors += _peft_errors(spec, chosen.peft)
    elif chosen.core is None:
        ignored = {
            "rank": spec.rank, "pairing": spec.pairing, "options": spec.options or None, "layers": spec.layers,
        }  # fmt: skip
        errors += [_no_such(spec, key, value) for key, value in ignored.items() if value is not None]
    else:
        core = CORES.get(chosen.core, "adapter.method")
        checks: list[Callable[[], object]] = [
            lambda: CORES.check_options(chosen.core or "", spec.options, "adapter.options")
        ]
        if "pairs" in inspect.signature(core).parameters:
            checks.append(lambda: _check_pairing(spec))
        elif spec.pairing is not None:
            errors.append(ConfigError("adapter.pairing", f"method '{spec.method}' pairs nothing"))
        if spec.strategy == "factored" and core.basis == "gradient":
            problem = f"factored replaces the weight by its factors, and the basis of '{spec.method}' is another"
            errors.append(ConfigError("adapter.strategy", problem, allowed="auto, branch or dense"))
        if spec.resolved_rank == "out" and spec.resolved_options.get("side", core.side) != "output":
            errors.append(_no_rank_out(spec))
        for check in checks:
            try:
                check()
            except ConfigError as error:
                errors.append(error)
    if errors:
        raise ConfigError.several(errors)


def _peft_errors(spec: AdapterSpec, tuner: PeftTuner) -> list[ConfigError]:
    """Return errors for the settings common to all methods that a PEFT tuner would ignore."""
    errors = []
    ignored = {"pairing": spec.pairing, "strategy": spec.strategy}
    if tuner.rank is None:
        ignored["rank"] = None if spec.rank is None else str(spec.rank)
    elif isinstance(spec.rank, str):
        errors.append(ConfigError("adapter.rank", f"got {spec.rank!r}", allowed=f"a number for method '{spec.method}'"))
    return errors + [_no_such(spec, key, value) for key, value in ignored.items() if value is not None]


def _no_rank_out(spec: AdapterSpec) -> ConfigError:
    problem = f"out keeps output directions that no input reaches; '{spec.method}' does not rotate only the output side"
    return ConfigError("adapter.rank", problem, allowed="full or a number")


def build_core(spec: AdapterSpec, S: Tensor, name: str, shape: tuple[int, int], pairs: Tensor | None = None) -> Core:
    """Build the untrained core of the layer ``name`` from ``spec``.

    Args:
        spec: settings of the adapter.
        S: singular values (R,), or (E, R) for a stack of matrices, each with its own core.
        name: name of the layer.
        shape: shape (O, I) of each matrix.
        pairs: pairs (T, 2) or (E, T, 2) that replace those of the pairing.
    """
    if S.ndim == 2:
        chosen = [None] * len(S) if pairs is None else pairs
        own = _named(spec, name)
        return CoreStack([build_core(own, S[i], f"{name}.{i}", shape, chosen[i]) for i in range(len(S))])
    core_name = spec.preset.core
    assert core_name is not None
    core_class = CORES.get(core_name, "adapter.method")
    wanted = inspect.signature(core_class).parameters
    runtime: list[Any] = [S.float()]
    if "pairs" in wanted:
        runtime.append(pairs if pairs is not None else make_pairs(spec, S.shape[0], name))
    if "shape" in wanted:
        runtime.append(shape)
    if "generator" in wanted:
        runtime.append(_generator(spec, name))
    return core_class(*runtime, **spec.resolved_options)


def needs_saliency(spec: AdapterSpec) -> bool:
    """Return whether the pairing needs gradients measured on the task."""
    return "saliency" in _asked(spec)


def follows_from_rank(pairs: Tensor, spec: AdapterSpec, rank: int, count: int = 1) -> bool:
    """Return whether every layer with this ``rank`` and ``count`` of matrices has ``pairs``, (T, 2) or (E, T, 2)."""
    if _asked(spec) & _OUTSIDE.keys():
        return False
    # No layer has an empty name, so these pairs equal those of the layer only if the pairing ignores its generator.
    return torch.equal(pairs, make_pairs(spec, rank, "", count=count))


def make_pairs(spec: AdapterSpec, rank: int, name: str, saliency: Tensor | None = None, count: int = 1) -> Tensor:
    """Return the pairs of one layer, round by round: (T, 2), or (E, T, 2) for ``count`` = E > 1 stacked matrices.

    Args:
        spec: settings of the adapter; its seed and ``name`` seed the generator of the pairing.
        rank: number of directions R.
        name: name of the layer.
        saliency: measured gradients (R, R) or (E, R, R), for a pairing that needs them.
        count: number of stacked matrices, E.

    Raises:
        ConfigError: gradients or listed pairs that the pairing needs are missing.
    """
    if count > 1:
        each = [None] * count if saliency is None else saliency
        return torch.stack([make_pairs(_named(spec, name), rank, f"{name}.{i}", each[i]) for i in range(count)])
    listed = None if spec.pair_lists is None else list_for(spec.pair_lists, name)
    given = {"rounds": spec.rounds, "saliency": saliency, "listed": listed}
    asked = _asked(spec)
    for what, (problem, fix) in _OUTSIDE.items():
        if what in asked and given[what] is None:
            raise ConfigError("adapter.pairing", f"'{spec.resolved_pairing}' {problem}", fix=fix)
    pairing = PAIRINGS.get(spec.resolved_pairing or "", "adapter.pairing")
    return pairing(rank, _generator(spec, name), **{what: value for what, value in given.items() if what in asked})


def _generator(spec: AdapterSpec, name: str) -> torch.Generator:
    """Return the random generator of the layer ``name``, which the seed of ``spec`` and the name determine."""
    digest = hashlib.sha256(f"{spec.seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _named(spec: AdapterSpec, name: str) -> AdapterSpec:
    """Return ``spec`` for each matrix of the layer ``name``, with the pairs listed for this layer."""
    listed = None if spec.pair_lists is None else list_for(spec.pair_lists, name)
    return spec if listed is None else replace(spec, pairing=listed)


# Arguments of pairings that follow neither from the rank nor from the seed: problem and fix where they are missing.
_MOST_ROUNDS = 10_000  # upper limit; any rotation can be composed of as many rounds as there are directions
_OUTSIDE = {
    "saliency": (
        "is measured on a task, and there is none here",
        "Use mirrortune train, or another pairing",
    ),
    "listed": (
        "takes pairs that you list, and there are none here",
        "Give the list in its place, adapter.pairing=[[0, 5], [1, 7]], or a .json file",
    ),
}


def _asked(spec: AdapterSpec) -> set[str]:
    """Return the parameter names of the pairing; empty if there is no pairing."""
    pairing = spec.resolved_pairing
    return set(inspect.signature(PAIRINGS.get(pairing, "adapter.pairing")).parameters) if pairing else set()


def _unknown_pairing(name: object) -> ConfigError | None:
    try:
        if isinstance(name, str):
            PAIRINGS.get(name, "adapter.pairing")
    except ConfigError as error:
        return error
    return None


def _check_pairing(spec: AdapterSpec) -> None:
    rounds = spec.options.get("rounds", 1)
    errors = [_unknown_pairing(spec.resolved_pairing)]
    if type(rounds) is int and not 1 <= rounds <= _MOST_ROUNDS:
        errors.append(
            ConfigError("adapter.options.rounds", f"got {rounds}", allowed=f"1 or more, up to {_MOST_ROUNDS}")
        )
    if found := [error for error in errors if error is not None]:
        raise ConfigError.several(found)
    if type(rounds) is not int:  # refused as an option
        return
    pairing = PAIRINGS.get(spec.resolved_pairing or "", "adapter.pairing")
    if rounds > 1 and "rounds" not in inspect.signature(pairing).parameters:
        raise ConfigError(
            "adapter.options.rounds", f"pairing '{spec.pairing}' has one round, got {rounds}", allowed="1"
        )
    if spec.pair_lists is not None:
        check_lists(spec.pair_lists, rounds)
