"""The validation that was still to come after the checkpoint from which a run goes on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class DueValidation(Callback):
    """When a run is resumed, does first the validation that the interrupted run had left to do.

    A checkpoint that is saved after an optimizer step may precede a validation that is due there.
    Lightning takes that validation as done, so that its scores would be missing.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        run = loop.run

        def catch_up_and_run() -> None:
            del vars(loop)["run"]
            if not loop.restarting:
                run()
                return
            loop.setup_data()
            if validation_is_due(trainer):
                validate(trainer)
            run()

        vars(loop)["run"] = catch_up_and_run


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the restored state is one between an optimizer step and its validation."""
    loop = trainer.fit_loop.epoch_loop
    total: Any = loop.batch_progress.total
    before_the_end = total.completed == total.processed - 1  # saved in on_train_batch_end
    return before_the_end and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def validate(trainer: Trainer) -> None:
    """Validate as the training loop does."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting = False
    trainer.validating = True
    validation.run()
    trainer.training = True
