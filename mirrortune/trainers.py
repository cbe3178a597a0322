# SPDX-License-Identifier: Apache-2.0
"""Make Trainer classes of transformers and TRL whose checkpoints hold the adapter instead of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mirrortune.adapters.inject import Attachment
from mirrortune.api import check_saved_whole, restore_adapter, save_adapter
from mirrortune.errors import ConfigError, first_of


def adapter_trainer(trainer_class: type[Any]) -> type[Any]:
    """Return a Trainer class whose checkpoints hold the model's adapter in a subfolder ``adapter``.

    Saving, resuming and loading the best model then involve only an adapter of a few kilobytes; everything else
    (optimizer, schedule, random states) is left to the Trainer. The model passed to it, or one model inside it, as in a
    ``SentenceTransformer``, must have an adapter.

    Args:
        trainer_class: ``transformers.Trainer``, ``trl.SFTTrainer``, ``SentenceTransformerTrainer``, or another subclass
            of the first.

    Returns:
        A subclass of ``trainer_class`` with the same arguments.

    Example:
        >>> Trainer = mirrortune.adapter_trainer(transformers.Trainer)  # doctest: +SKIP

    Raises:
        ConfigError: ``trainer_class`` is not such a class. Raised by ``train`` if the model has no adapter, or if
            parameters require gradients that no adapter would hold.
        VerificationError: raised by ``train`` if it resumes from a checkpoint of another adapter or base.
    """
    import transformers  # noqa: PLC0415

    if not (isinstance(trainer_class, type) and issubclass(trainer_class, transformers.Trainer)):
        problem, allowed = f"got {trainer_class!r:.60}", "the class transformers.Trainer, or a subclass of it"
        raise ConfigError("trainer_class", problem, allowed=allowed)

    class AdapterTrainer(trainer_class):  # type: ignore[misc]  # a class chosen by the caller
        def train(self, *args: Any, **kwargs: Any) -> Any:
            _check(self)  # before the training instead of at its first checkpoint
            return super().train(*args, **kwargs)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if not self.args.should_save:
                return
            folder = Path(output_dir or self.args.output_dir)
            save_adapter(_adapted(self), folder / "adapter")
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            _restore(self, resume_from_checkpoint)

        def _load_best_model(self) -> None:
            _restore(self, self.state.best_model_checkpoint)

    AdapterTrainer.__name__ = AdapterTrainer.__qualname__ = f"Adapter{trainer_class.__name__}"
    return AdapterTrainer


def _bare(trainer: Any) -> nn.Module:
    found: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return found


def _adapted(trainer: Any) -> nn.Module:
    """Return the model of a trainer, or the one model inside it that has an adapter."""
    bare = _bare(trainer)
    found = [module for module in bare.modules() if isinstance(vars(module).get("mirrortune"), Attachment)]
    return found[0] if len(found) == 1 else bare


def _check(trainer: Any) -> None:
    """Check that checkpoints will hold all that is trained."""
    model = _adapted(trainer)
    check_saved_whole(model)
    inside = {id(parameter) for parameter in model.parameters()}
    outside = [name for name, p in _bare(trainer).named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise ConfigError(
            "model", f"parameters outside its adapted part require gradients: {first_of(outside, 3)}",
            fix="Freeze them with requires_grad_(False): a checkpoint holds the adapter alone",
        )  # fmt: skip


def _restore(trainer: Any, checkpoint: str) -> None:
    restore_adapter(_adapted(trainer), checkpoint)
