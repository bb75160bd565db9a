"""Checkpoints as artifacts of a W&B run."""

import base64
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint

from tx_lightning.errors import ConfigurationError
from tx_lightning.metrics_file import plain
from tx_lightning.runs import shown
from tx_lightning.strict_json import finite


class CheckpointArtifacts:
    """Logs each checkpoint once, as Lightning's WandbLogger describes it for `log_model`.

    All are versions of one artifact of type model, which holds `model.ckpt`. `latest` is the newest
    version, `best` that of the best score.

    Args:
        log_model: True: when training ends, or at once for a `ModelCheckpoint` that keeps all;
            "all": when a checkpoint is saved; False: never.
        name: The name of the artifact; model-ID by default.
        policy: Whether files are copied before the upload ("mutable") or not.
        run: Returns the run, None where nothing is to be logged.

    Attributes:
        logged: Name and digest of the files that the run has logged, in earlier starts as well.

    Raises:
        ConfigurationError: When an argument is not allowed.
    """

    def __init__(
        self,
        log_model: Literal["all"] | bool,
        name: str | None,
        policy: Literal["mutable", "immutable"],
        run: Callable[[], Any],
    ) -> None:
        if log_model not in (False, True, "all"):
            raise ConfigurationError(
                f"log_model={log_model!r} of WandB must be True, False or 'all'"
            )
        if name is not None:
            import wandb

            try:
                wandb.Artifact(name, type="model")
            except ValueError as error:
                said = " ".join(str(error).split())
                raise ConfigurationError(f"checkpoint_name={name!r} of WandB: {said}") from error
        self.log_model = log_model
        self.name = name
        self.policy = policy
        self.run = run
        self.logged: set[tuple[str, str]] = set()
        self._waiting: dict[int, ModelCheckpoint] = {}
        self._seen: set[tuple[Path, int]] = set()  # files and the times when they were written

    def saved(self, callback: ModelCheckpoint) -> None:
        """A callback has saved a checkpoint."""
        if self.log_model == "all" or (self.log_model and callback.save_top_k == -1):
            self._log_all(callback)
        elif self.log_model:
            self._waiting[id(callback)] = callback

    def end(self, *, log: bool) -> None:
        """Training has ended: log what is waiting, or drop it."""
        waiting, self._waiting = self._waiting, {}
        for callback in waiting.values() if log else ():
            self._log_all(callback)

    def _log_all(self, callback: ModelCheckpoint) -> None:
        scores = {
            callback.last_model_path: callback.current_score,
            callback.best_model_path: callback.best_model_score,
            **callback.best_k_models,
        }
        settings = {
            "monitor": callback.monitor,
            "mode": callback.mode,
            "save_last": callback.save_last,
            "save_top_k": callback.save_top_k,
            "save_weights_only": callback.save_weights_only,
        }
        paths = {Path(path): score for path, score in scores.items() if Path(path).is_file()}
        for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path)):
            best = ["best"] if path == Path(callback.best_model_path) else []
            about = {"score": plain(paths[path]), "ModelCheckpoint": settings}
            self.log(path, ["latest", *best], about)

    def log(
        self, path: Path, aliases: Sequence[str], about: Mapping[str, Any] | None = None
    ) -> None:
        """Log a checkpoint, unless it was logged or `log_model` is False.

        Args:
            path: The checkpoint.
            aliases: Names of this version.
            about: Metadata of the artifact.

        What keeps it from being logged is printed; training goes on.
        """
        run = self.run() if self.log_model else None
        if run is None:
            return
        seen = (path.resolve(), path.stat().st_mtime_ns)
        if seen in self._seen:
            return
        import wandb

        metadata = finite({**(about or {}), "original_filename": path.name})
        try:
            file = (path.name, _digest(path))
            if file not in self.logged:
                name = self.name or f"model-{run.id}"
                artifact = wandb.Artifact(name, type="model", metadata=metadata)
                artifact.add_file(str(path), name="model.ckpt", policy=self.policy)
                run.log_artifact(artifact, aliases=list(aliases))
        except (OSError, ValueError, wandb.errors.Error) as error:
            said = " ".join(str(error).split())
            print(f"W&B: checkpoint {shown(path)} was not logged: {said}", file=sys.stderr)
            return
        self._seen.add(seen)
        self.logged.add(file)


def _digest(path: Path) -> str:
    """The digest of a file as W&B records it."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return base64.b64encode(digest.digest()).decode()
