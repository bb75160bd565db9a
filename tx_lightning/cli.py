"""The command line: Lightning's verbs over any task and data that a YAML file names.

`tx-lightning fit --config base.yaml --config overlay.yaml` merges the files in order. Any class is
reachable by its `class_path`; there is no list of names to edit. Two values follow from others and
cannot be set apart from them: the model's `vocab_size` from the data's, the data's `seed` from
`seed_everything`.
"""

import contextlib
import copy
import functools
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as Bar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from tx_lightning import __version__
from tx_lightning.building import all_but, only, try_parsing
from tx_lightning.callbacks.due_validation import DueValidation
from tx_lightning.callbacks.graceful_stop import GracefulStop
from tx_lightning.callbacks.predictions import PredictionWriter
from tx_lightning.callbacks.progress_bar import ProgressBar
from tx_lightning.callbacks.run_record import RunRecord
from tx_lightning.checkpoints import (
    RECORD,
    AtomicCheckpointIO,
    CheckpointError,
    Rebuildable,
    check_settings,
    newest_checkpoint,
    read_checkpoint,
    settings_of,
)
from tx_lightning.configuration import (
    ConfigurationParser,
    DuplicateKey,
    differences,
    dumped,
    given,
    load_yaml,
    upgraded_settings,
    without_option,
)
from tx_lightning.data.module import TextData
from tx_lightning.diagnosis import explain, reason_among_types
from tx_lightning.errors import ConfigurationError, is_restoring, one_line
from tx_lightning.loggers import MetricsFile, WandB, read_metrics
from tx_lightning.nn.linear import MatmulPrecision, set_matmul_precision
from tx_lightning.pretrained import Pretrained, initialize, tokenizers_of
from tx_lightning.runs import (
    APPENDED,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    is_first_process,
    rewind,
    run_folder,
    shown,
)
from tx_lightning.settings import check_run, packages_of
from tx_lightning.tasks.companions import StepNumbers
from tx_lightning.tasks.task import Task
from tx_lightning.trust import HELP, own_names, take_trust, trust_words
from tx_lightning.walking import Approved

LINKS = {
    "data.init_args.vocab_size": "model.init_args.vocab_size",
    "data.init_args.n_classes": "model.init_args.n_classes",
    "data.init_args.n_tags": "model.init_args.n_tags",
    "seed_everything": "data.init_args.seed",
}
MOST_SEED = 2**32 - 1  # of NumPy
MOST = 2**31 - 1
LIMITS = {  # of the trainer's arguments
    "accumulate_grad_batches": (1, 10_000),
    "check_val_every_n_epoch": (1, MOST),
    "devices": (-1, 10_000),
    "gradient_clip_val": (0, MOST),
    "log_every_n_steps": (0, MOST),
    "num_nodes": (1, 100_000),
    "num_sanity_val_steps": (-1, MOST),
}
# Options that not every verb has, and the one that no file may have.
ONE_VERB = ("resume", "verbose", "return_predictions", "trust")
ModelFrom = Literal["agree", "checkpoint", "config"]
OnDivergence = Literal["stop", "ignore"]
_LIGHTNING = logging.getLogger("lightning.pytorch.utilities.rank_zero")


class CommandLine(LightningCLI):
    """LightningCLI with run folders, resuming, and checkpoints that bring their model section.

    Args:
        words: The words of the command, the verb first.
        run: Whether to carry it out, or only to parse and build (then without a verb).
        foreign: A configuration among the words that may be of others.
    """

    def __init__(
        self, words: Sequence[str], *, run: bool = True, foreign: Path | None = None
    ) -> None:
        _silence_libraries()
        self.verb = words[0] if run else None
        self.trust, words = take_trust(words)
        self.foreign = foreign
        if foreign is None:
            self.trust = self.trust.naming(*own_names(words))
        self.folder: Path | None = None
        self.resumed: Path | None = None
        self.checkpoint: Path | None = None
        self._recorded: Approved | None = None  # the model section of the checkpoint
        self._texts: frozenset[str] = frozenset()  # in the checkpoint, which name no class
        self._approved: Approved | None = None  # a configuration of others
        self._undescribed: dict[str, str] = {}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_class=ConfigurationParser,
            trainer_defaults={
                "logger": {"class_path": "tx_lightning.loggers.WandB"},
                "use_distributed_sampler": False,
                "enable_autolog_hparams": False,
            },
            parser_kwargs=_parser_options(self.verb),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(words),
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb alone: the parsers of the others take time to build, and are not asked."""
        every = LightningCLI.subcommands()
        return {self.verb: every[self.verb]} if self.verb in every else every

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="Seed of everything random; the data's seed follows it.",
        )
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the experiment; that of the first --config file by default.",
        )
        parser.add_argument(
            "--runs_dir",
            type=str,
            default="runs",
            help="Folder in which <name>/<time> is made, one for each run.",
        )
        parser.add_argument(
            "--model_from",
            type=ModelFrom,
            default="agree",
            help="With --ckpt_path, whose model section holds where the two differ: agree is an "
            "error that lists the keys.",
        )
        parser.add_argument("--trust", type=list[str] | None, default=None, help=HELP)
        # For every verb, so that the file of an experiment serves them all.
        parser.add_argument(
            "--matmul_precision",
            type=MatmulPrecision,
            default="highest",
            help="How float32 matrices are multiplied: highest is exact; high uses TF32 on CUDA; "
            "medium uses bfloat16 factors on CUDA and on CPUs that have such an instruction.",
        )
        parser.add_argument(
            "--pretrained",
            type=str | None,
            default=None,
            help="A checkpoint whose weights fit starts from, wherever name and shape agree, and "
            "whose tokenizers the data use.",
        )
        parser.add_argument(
            "--on_divergence",
            type=OnDivergence,
            default="stop",
            help="What fit does when a logged loss or gradient norm is NaN or infinite: stop ends "
            "the run with an error, ignore trains on.",
        )
        parser.add_argument(
            "--test_after",
            type=bool,
            default=False,
            help="Whether fit goes on to test when training has ended: the averaged checkpoint "
            "where there is one, else the best, else the last.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Trainer, "trainer")
        defaults = {f"trainer.{key}": value for key, value in self.trainer_defaults.items()}
        parser.set_defaults(defaults)
        # The model section may come from a checkpoint instead.
        parser.add_lightning_class_args(LightningModule, "model", True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for source, target in LINKS.items():
            parser.link_arguments(source, target)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=str | None,
                default=None,
                help="A run folder: go on in it, with its configuration, from its newest "
                "checkpoint; what else is given here is merged on top.",
            )
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        words = self._with_resumed_run(args)
        if self.foreign is not None:
            self._approved = check_run(self.foreign, self.trust)
        values = given(words)
        if self.verb and values.get("ckpt_path"):
            self.checkpoint = Path(str(values["ckpt_path"]))
        if self.resumed:
            self.checkpoint = newest_checkpoint(self.resumed / CHECKPOINTS) or self.checkpoint
        own_model = _has_class(values, "model")
        if self.checkpoint is not None:
            self._read_recorded(self.checkpoint, own_model=own_model)
        elif values.get("pretrained"):
            # Only its weights are used; still, it is not opened where it is not trusted.
            check_settings(values["pretrained"], self.trust)
        self._model_from_checkpoint = self.checkpoint is not None and not own_model
        if self._model_from_checkpoint:
            assert self._recorded is not None
            words = [words[0], f"--model={json.dumps(self._recorded.settings)}", *words[1:]]
        try:
            with self._guarded():
                self.config = parser.parse_args(words)
        except (ArgumentError, DuplicateKey) as error:
            verb_parser = self._parser(self.verb)
            why = explain(str(error), words, verb_parser)
            if why.startswith("model.vocab_size: null") and not _has_class(values, "data"):
                why = "no data section: give --config with one"
            raise ConfigurationError(why) from error
        self._check_trust_and_loading()
        self._check_links(values)
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Refuse numbers that Lightning takes and fails with later, or not at all."""
        section = self._section()
        seed = section.seed_everything
        if not 0 <= seed <= MOST_SEED:
            raise ConfigurationError(f"seed_everything is {seed}; it must be from 0 to {MOST_SEED}")
        if section.name is not None and not section.name.isprintable():
            raise ConfigurationError(
                f"name is {section.name!r}; it may have no line breaks, only text"
            )
        for name, (least, most) in LIMITS.items():
            value = section.trainer.get(name)
            if isinstance(value, str) and value.removeprefix("-").isdecimal():
                value = int(value)  # of devices
            if isinstance(value, int | float) and value < least:
                raise ConfigurationError(f"trainer.{name} is {value}; it must be at least {least}")
            if isinstance(value, int) and value > most:
                raise ConfigurationError(f"trainer.{name} is {value}; it must be at most {most:,}")
        if section.trainer.val_check_interval == 0:
            raise ConfigurationError("trainer.val_check_interval is 0; it must be above 0")

    def _with_resumed_run(self, words: list[str]) -> list[str]:
        """Replace `--resume FOLDER` by the configuration of that run."""
        folder = given(words).get("resume") if self.verb == "fit" else None
        if not folder:
            return words
        self.resumed = Path(str(folder)).absolute()
        config = self.resumed / CONFIG
        if not config.is_file():
            raise ConfigurationError(
                f"--resume {folder}: it has no {CONFIG}, so it is no run folder"
            )
        self.foreign = config
        rest = without_option(words[1:], "resume")
        return ["fit", "--config", str(config), *rest]

    def _read_recorded(self, path: Path, *, own_model: bool) -> None:
        """Take the model section of a checkpoint, once it is found harmless."""
        checkpoint = read_checkpoint(path, lazily=True)
        if self.verb == "fit" and "optimizer_states" not in checkpoint:
            raise ConfigurationError(
                f"checkpoint {shown(path)} holds weights alone, as averaged and imported ones do, "
                f"so training cannot go on from it: start from them with --pretrained {shown(path)}"
            )
        record = checkpoint[RECORD]
        if record["task"] is None and own_model:
            return
        self._recorded = settings_of(checkpoint, path, self.trust)
        self._texts |= self._recorded.texts
        self._undescribed = record.get("undescribed", {})
        try_parsing(self._recorded, f"checkpoint {shown(path)}")
        if self.verb == "fit" and self._undescribed and not own_model:
            what = ", ".join(f"{name} is {why}" for name, why in self._undescribed.items())
            raise ConfigurationError(
                f"checkpoint {shown(path)}: {what}, which a file cannot hold, so training cannot "
                "go on as it was: give a model section of your own with --config"
            )

    def _guarded(self) -> contextlib.AbstractContextManager[None]:
        """In this context the parser imports nothing that a file of others should not lead to.

        Beside a configuration of others it imports only what was approved there and what the user's
        words name; beside a checkpoint anything but what is mere text in that.
        """
        if self._approved is not None:
            recorded = frozenset() if self._recorded is None else self._recorded.names
            names = self._approved.names | recorded
            return only(replace(self._approved, names=names), "a configuration of others")
        return all_but(self._texts, "a checkpoint of others")

    def _check_trust_and_loading(self) -> None:
        """Refuse in files what belongs on the command line, and loading that would run code."""
        section = self._section()
        if section.trust is not None:
            raise ConfigurationError("trust: no file can give consent; say --trust PACKAGE")
        if self.verb and section.weights_only is False:
            raise ConfigurationError(
                "weights_only=false: checkpoints hold nothing that would need it; leave it out"
            )

    def _check_links(self, values: dict[str, Any]) -> None:
        """A value that follows from another may be repeated, but not set to something else."""
        section = self._section()
        for source, target in LINKS.items():
            key = target.replace(".init_args", "")
            asked, taken = values.get(key), section.get(target)
            if asked is not None and taken is not None and asked != taken:
                raise ConfigurationError(
                    f"{key}={asked} contradicts {source.replace('.init_args', '')}={taken}, from "
                    f"which it follows: leave {key} out"
                )

    def _section(self) -> Any:
        """The part of the configuration that belongs to the verb."""
        return self.config[self.verb] if self.verb else self.config

    def _parse_ckpt_path(self) -> None:
        """Compare the model section with the checkpoint's; neither silently replaces the other."""
        section = self._section()
        if section.get("model") is None:
            raise ConfigurationError(
                "no model section: give --config with one, or --ckpt_path with a checkpoint"
            )
        self._keep_settings_of_format_1()
        if self.checkpoint is None:
            return
        if self._recorded is None or section.model_from == "config":
            return
        ours = self._plain(self.config)["model"]
        recorded = copy.deepcopy(self._recorded.settings)
        if ours == recorded:
            return
        rest = self.config.clone()
        rest[self.verb].model = None  # nothing of it may be merged with the checkpoint's
        try:
            with self._guarded():
                base = self.parser.parse_object({self.verb: {"model": recorded}}, rest)
        except ArgumentError as error:
            why = explain(str(error), [], self._parser(self.verb))
            raise ConfigurationError(
                f"the model section of checkpoint {shown(self.checkpoint)} is not accepted: {why}. "
                "Keep your own with --model_from config"
            ) from error
        theirs = self._plain(base)["model"]
        differing = {
            key: pair
            for key, pair in differences(ours, theirs).items()
            if key.partition(".")[0] not in self._undescribed
        }
        size, vocabulary = (m.get("init_args", {}).get("vocab_size") for m in (ours, recorded))
        if size != vocabulary:
            raise ConfigurationError(
                f"data.vocab_size is {size}, the checkpoint's {vocabulary}: they must be equal"
            )
        if section.model_from == "checkpoint":
            self.config = base
        elif differing:
            shown_keys = "; ".join(
                f"model.{key}: {here!r} here, {there!r} there"
                for key, (here, there) in differing.items()
            )
            raise ConfigurationError(
                f"the model section differs from that of checkpoint {shown(self.checkpoint)}: "
                f"{shown_keys}. Choose with --model_from config or --model_from checkpoint"
            )

    def _keep_settings_of_format_1(self) -> None:
        """Read the model section as it was meant when the checkpoint to go on from was written."""
        path = self.checkpoint or self._section().pretrained
        if path and read_checkpoint(path, lazily=True)[RECORD]["format"] == 1:
            section = {"model": upgraded_settings(self._plain(self.config)["model"])}
            tree = {self.verb: section} if self.verb else section
            self.config = self.parser.parse_object(tree, self.config)

    @functools.cached_property
    def written(self) -> dict[str, Any]:
        """The verb's configuration, which is final by now, as plain values."""
        return self._plain(self.config)

    def _plain(self, config: Any) -> dict[str, Any]:
        """The verb's configuration as plain values, complete, linked ones included."""
        tree = load_yaml(dumped(self.parser, config, links=True))
        plain = tree[self.verb] if self.verb else tree
        assert isinstance(plain, dict)
        return plain

    def instantiate_classes(self) -> None:
        with self._guarded():
            try:
                super().instantiate_classes()
            except ValueError as error:
                why = reason_among_types(str(error))
                if why is None or one_line(error) is not None:
                    raise
                raise ConfigurationError(why) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer in the run's own folder, with what every run has."""
        self.folder = self._make_folder()
        asked = self._get(self.config_init, "trainer")
        if asked.barebones and isinstance(asked.logger, WandB):
            kwargs["logger"] = None  # our default, which Lightning would refuse
        try:
            # Any: Lightning sets attributes of a trainer where type checkers do not see them.
            trainer: Any = super().instantiate_trainer(default_root_dir=str(self.folder), **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ConfigurationError(f"trainer: {' '.join(str(error).split())}") from error
        set_matmul_precision(self._section().matmul_precision, trainer.strategy.root_device.type)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / CHECKPOINTS)
        with contextlib.suppress(NotImplementedError):  # strategies that write files of their own
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        own = asked.callbacks or []
        trainer.callbacks = [
            ProgressBar() if isinstance(callback, Bar) and callback not in own else callback
            for callback in trainer.callbacks
        ]
        if not trainer.fast_dev_run and not trainer.barebones:
            trainer.loggers = [*trainer.loggers, MetricsFile(self.folder)]
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                logger.open_in(self.folder, self.verb or "build")
        trainer.callbacks.insert(0, RunRecord(self.written, self.folder))
        trainer.callbacks.insert(0, DueValidation())
        trainer.callbacks.insert(0, StepNumbers())
        trainer.callbacks.append(GracefulStop(self.folder, self._resume_words(self.folder)))
        if self.verb == "predict":
            trainer.callbacks.append(PredictionWriter(self.folder))
        assert isinstance(trainer, Trainer)
        return trainer

    def _make_folder(self) -> Path:
        section = self._section()
        asked = section.trainer.get("default_root_dir")
        if self.resumed:
            folder = self.resumed
        elif asked:
            folder = Path(asked).absolute()
            if (folder / CONFIG).exists() and is_first_process():
                raise ConfigurationError(
                    f"trainer.default_root_dir: {asked} holds another run; choose a new folder, or "
                    f"go on there with --resume {asked}"
                )
        else:
            folder = run_folder(Path(section.runs_dir) / self._run_name())
        if is_first_process():
            folder.mkdir(parents=True, exist_ok=True)
            self._save_config(folder / CONFIG)
        return folder

    def _resume_words(self, folder: Path) -> str:
        """The command that goes on with this run, with the consent that it will need."""
        trusted = trust_words(packages_of(self.written))
        return f"tx-lightning fit --resume {shown(folder)}{trusted}"

    def _run_name(self) -> str:
        section = self._section()
        if section.name:
            return str(section.name)
        if section.get("config"):
            return Path(str(section.config[0])).stem
        return str(section.model.class_path.rpartition(".")[2])

    def _save_config(self, path: Path) -> None:
        """Write the configuration with which this run can be repeated."""
        config = self.config.clone()
        section = config[self.verb] if self.verb else config
        section.name = self._run_name()
        for key in ONE_VERB:  # so that the file serves every verb
            section.pop(key, None)
        parser = self._parser(self.verb)
        text = dumped(parser, section)
        header = f"# tx-lightning {__version__}: {_on_a_line(sys.argv[1:])}\n"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(header + text, encoding="utf-8")
        temporary.replace(path)

    def after_instantiate_classes(self) -> None:
        if isinstance(self.model, Rebuildable):
            self.model.settings = copy.deepcopy(self.written["model"])
        if isinstance(self.model, Task):
            self.model.stop_when_diverged = self._section().on_divergence == "stop"
        path = self._section().pretrained
        if path is not None:
            self._start_from(Path(path))
        elif self.checkpoint is not None and isinstance(self.datamodule, TextData):
            # Weights from elsewhere bring a tokenizer that no data could learn.
            checkpoint = read_checkpoint(self.checkpoint, lazily=True)
            if checkpoint[RECORD]["tokenizers"]:
                tokenizers = tokenizers_of(self.checkpoint, checkpoint)
                if not tokenizers.source.trained_here:
                    self.datamodule.given_tokenizers = tokenizers

    def _start_from(self, path: Path) -> None:
        """Use the tokenizers of a pretrained checkpoint, and its weights unless training goes on.

        Where a checkpoint of this run is given, it has both, and the pretrained one is not needed.
        """
        data, task = self.datamodule, self.model
        if not (isinstance(data, TextData) and isinstance(task, Task)):
            raise ConfigurationError(
                "pretrained needs a task and data of this package, not "
                f"{type(task).__name__} and {type(data).__name__}"
            )
        if self.checkpoint is not None:
            checkpoint = read_checkpoint(self.checkpoint, lazily=True)
            data.given_tokenizers = tokenizers_of(self.checkpoint, checkpoint)
            return
        pretrained = Pretrained.read(path)
        data.given_tokenizers = pretrained.tokenizers
        task.attach(pretrained.tokenizers)  # before the weights, as it may move the row of padding
        report = initialize(task, pretrained)
        if is_first_process():
            print(f"pretrained from {shown(path.absolute())}: {report}", flush=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = str(self.checkpoint) if self.checkpoint else None
        kwargs["weights_only"] = True
        return kwargs

    def _evaluate_at_step_of(self, checkpoint: Path) -> None:
        """Log an evaluation at the step of its checkpoint, also where the task is no `Task`."""
        task: Any = self.model
        task.loaded_step = read_checkpoint(checkpoint, lazily=True)["global_step"]

    def _run_subcommand(self, subcommand: str) -> None:
        self._announce()
        if self.checkpoint is not None and self.verb != "fit":
            self._evaluate_at_step_of(self.checkpoint)
        failed = True
        try:
            self._carry_out(subcommand)
            if subcommand == "fit" and self._section().test_after:
                self._test_after()
            failed = False
        finally:
            self._report()
            for logger in self.trainer.loggers:
                if isinstance(logger, WandB):
                    logger.finish(failed=failed)

    def _carry_out(self, subcommand: str) -> None:
        """Run a verb; what Lightning cannot restore from a checkpoint is the checkpoint's fault."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if self.checkpoint is None or one_line(error) is not None or not is_restoring(error):
                raise
            raise CheckpointError(
                f"checkpoint {shown(self.checkpoint)} cannot be restored: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error

    def _test_after(self) -> None:
        """Test what training has made: the averaged weights, else the best, else the last."""
        assert self.folder is not None
        trainer: Trainer = self.trainer
        averaged = self.folder / CHECKPOINTS / "averaged.ckpt"
        saved = trainer.checkpoint_callback
        best = saved.best_model_path if isinstance(saved, ModelCheckpoint) else ""
        path = str(averaged) if averaged.is_file() else best
        if path:
            self._evaluate_at_step_of(Path(path))
        if is_first_process():
            print(f"testing {shown(Path(path)) if path else 'the last weights'}", flush=True)
        trainer.test(
            self.model, datamodule=self.datamodule, ckpt_path=path or None, weights_only=True
        )

    def _report(self) -> None:
        """Say at the end where the newest attention map and the W&B run are."""
        assert self.folder is not None
        if not is_first_process():
            return
        maps = list(self.folder.glob("attention/*.png"))
        maps = [path for path in maps if path.name.startswith("cross")] or maps
        if maps:
            newest = max(maps, key=lambda path: path.stat().st_mtime)
            print(f"attention map: {shown(newest)}", flush=True)
        for logger in self.trainer.loggers:
            if isinstance(logger, WandB) and logger.files is not None:
                print(f"W&B run: {shown(logger.files)}", flush=True)

    def _announce(self) -> None:
        """Say where the run is and how to go on; drop the metrics that will be made again."""
        assert self.folder is not None
        trainer: Any = self.trainer
        if not is_first_process():
            return
        print(f"run folder: {shown(self.folder)}", flush=True)
        if self._model_from_checkpoint:
            assert self.checkpoint is not None
            print(f"model section: from checkpoint {shown(self.checkpoint)}", flush=True)
        if self.verb != "fit" or trainer.fast_dev_run:
            return
        if not self.resumed:
            go_on = self._resume_words(self.folder)
            print(f"after an interruption, go on with: {go_on}", flush=True)
            return
        rows: int | None = 0
        lengths: dict[str, int] = {}
        if self.checkpoint is None:
            print("no checkpoint was written yet: starting from the beginning", flush=True)
        else:
            checkpoint = read_checkpoint(self.checkpoint, lazily=True)
            older = {METRICS: checkpoint.get("metrics_size", sys.maxsize)}  # or does not say
            lengths = checkpoint.get("sizes", dict.fromkeys(APPENDED, sys.maxsize) | older)
            rows = checkpoint.get("wandb_rows")
        rewind(self.folder, lengths)
        metrics = self.folder / METRICS
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                logger.go_on(rows, read_metrics(metrics) if metrics.exists() else [])


def _parser_options(verb: str | None) -> dict[str, Any]:
    """Have the parsers raise what they refuse, so that it can be explained; no abbreviations."""
    options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
    return options if verb is None else {"prog": "tx-lightning", **options, verb: options}


def _on_a_line(words: Sequence[str]) -> str:
    """The words of a command, which may hold line breaks, and bytes that are no text."""
    line = shlex.join(words)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _has_class(values: dict[str, Any], key: str) -> bool:
    """Whether the words or files name a class for a section."""
    return bool(values.get(key) or values.get(f"{key}.class_path"))


@contextlib.contextmanager
def process_restored() -> Iterator[None]:
    """Restore what a command sets for its process: a Python program may run several.

    The environment variables are Lightning's, wandb's and ours; dropout follows PL_GLOBAL_SEED.
    """
    environment, path = dict(os.environ), list(sys.path)
    precision = torch.get_float32_matmul_precision()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            set_matmul_precision("highest", "cpu")
            torch.set_float32_matmul_precision(precision)
            _LIGHTNING.removeFilter(_no_tips)
            sys.path[:] = path
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


def _silence_libraries() -> None:
    """Keep from the user what libraries say about each other, and about what we do on purpose."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls three
    _LIGHTNING.addFilter(_no_tips)
    # Lightning 2.6 with torch 2.13, at every start; nothing a user could act on.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.13
        r"Checkpoint directory .* exists and is not empty",  # a run goes on in its folder
        r"The dirpath has changed from",  # another run has another folder
    ):
        warnings.filterwarnings("ignore", message=message)


def _no_tips(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
