"""A file of a stranger runs no code: every place of all settings, every verb, both defences."""

import contextlib
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from tests import forging
from tests.forging import COMMAND, EVIL, PAYLOADS, PWNED, Grower, Path_, Spot, forged, put, spec
from tx_lightning import building
from tx_lightning.__main__ import VERBS as COMMANDS
from tx_lightning.__main__ import main
from tx_lightning.building import all_but, build, only, try_parsing
from tx_lightning.checkpoints import CheckpointError, load_task, read_checkpoint
from tx_lightning.errors import ConfigurationError
from tx_lightning.places import parameters_of
from tx_lightning.settings import approve_run, approve_task, packages_of
from tx_lightning.tasks import Classification, Task, Translation
from tx_lightning.trust import FUNCTIONS, NO_TRUST, take_trust
from tx_lightning.walking import Approved, SettingsError, Walk
from tx_lightning.weights.errors import WeightsError
from tx_lightning.weights.importing import build_task

FORMAT_1 = Path(__file__).parent / "formats" / "format-1.ckpt"
TURNS = 20  # as many as there are schedules


@pytest.fixture(autouse=True)
def _stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with the module and the file of a stranger; what they would do must not be done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Path(f"{EVIL}.py").write_text(f"open({PWNED!r}, 'w').close()\n\nclass Anything:\n    pass\n")
    for name in ("evil.yaml", "evil"):
        Path(name).write_text(yaml.safe_dump(spec(f"{EVIL}.Anything")))
    path = list(sys.path)
    yield
    sys.path[:] = path
    assert EVIL not in sys.modules
    assert not Path(PWNED).exists()


def refusal(check: Any, tree: Any) -> str | None:
    """What is said about a tree; None where it passes."""
    try:
        check(tree, NO_TRUST, "file")
    except SettingsError as error:
        return str(error)
    return None


def attack(check: Any, tree: Any, spots: list[Spot], payloads: Any) -> tuple[int, list[Any]]:
    """Put every payload into every place; return how many were tried, and those that passed."""
    tried, passed = 0, list[Any]()
    for spot in spots:
        for payload in payloads:
            tried += 1
            said = refusal(check, forged(tree, spot.path, payload.value))
            if said is None and not forging.is_mere_text(payload, spot.hint):
                passed.append((spot, payload))
            elif said is not None and (payload.named not in said or "\n" in said):
                passed.append((spot, payload, said))
    return tried, passed


@pytest.mark.parametrize("task", forging.tasks(), ids=lambda task: task.__name__)
def test_every_place_of_a_task_refuses_what_a_stranger_puts_there(task: type[Task[Any]]) -> None:
    tree = Grower().grow(task)
    assert refusal(approve_task, tree) is None
    spots = list(forging.spots(tree, LightningModule))
    tried, passed = attack(approve_task, tree, spots, PAYLOADS)
    assert passed == []
    assert tried == len(spots) * len(PAYLOADS)
    assert len(spots) > 50


def test_every_place_of_every_class_that_a_task_can_be_made_of_does() -> None:
    """All optimizers and schedules of torch, position schemes, searches, filters and so on."""
    seen: set[tuple[str, str, bool]] = set()
    for turn in range(TURNS):
        for task in (Translation, Classification):
            tree = Grower(turn).grow(task)
            assert refusal(approve_task, tree) is None
            new = {forging.kind_of(spot): spot for spot in forging.spots(tree, LightningModule)}
            spots = [spot for kind, spot in new.items() if kind not in seen]
            seen |= new.keys()
            _, passed = attack(approve_task, tree, spots, PAYLOADS)
            assert passed == []
    owners = {name for name, _, _ in seen}
    assert owners >= {"LambdaLR", "SequentialLR", "AdamW", "Sampling", "MinLength", "TextEncoder"}
    assert len(owners) > 60
    assert len(seen) > 450


def test_a_payload_in_a_whole_tree_is_refused_as_well() -> None:
    tree = Grower().grow(Translation)
    for spot in forging.spots(tree, LightningModule):
        said = refusal(approve_task, put(tree, spot.path, PAYLOADS[0].value))
        assert said is not None
        assert "os.system" in said


RUN = {
    "seed_everything": 1,
    "name": "x",
    "pretrained": None,
    "matmul_precision": "highest",
    "test_after": False,
}


def run_trees() -> Iterator[tuple[dict[str, Any], list[Spot]]]:
    """The configurations of runs: each data module, and the trainer with all that it may have."""
    for data, turn in itertools.product(forging.data_modules(), range(8)):
        tree = {**RUN, "data": Grower(turn).grow(data)}
        yield (
            tree,
            [
                Spot(("data", *spot.path), spot.hint, spot.owner)
                for spot in forging.spots(tree["data"], LightningDataModule)
            ],
        )
    for turn in range(40):
        trainer = {p.name: Grower(turn).fill(p.annotation, 0) for p in parameters_of(Trainer)}
        found = []
        for parameter in parameters_of(Trainer):
            path, owner = ("trainer", parameter.name), ("Trainer", parameter.name)
            value = trainer[parameter.name]
            found += list(forging.spots(value, parameter.annotation, path, owner))
        yield {**RUN, "trainer": trainer}, found


def test_every_place_of_the_configuration_of_a_run_does() -> None:
    seen: set[tuple[str, str, bool]] = set()
    for tree, found in run_trees():
        assert refusal(approve_run, tree) is None
        new = {forging.kind_of(spot): spot for spot in found}
        spots = [spot for kind, spot in new.items() if kind not in seen]
        seen |= new.keys()
        _, passed = attack(approve_run, tree, spots, PAYLOADS[::2])
        assert passed == []
    owners = {name for name, _, _ in seen}
    assert {argument for name, argument, _ in seen if name == "Trainer"} >= {
        "callbacks", "logger", "strategy", "plugins", "profiler", "accelerator",
    }  # fmt: skip
    assert owners >= {"Grammar", "LambdaCallback", "ModelCheckpoint", "WandB", "DDPStrategy"}
    assert len(owners) > 60
    assert len(seen) > 500


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"config": "evil.yaml"}, "evil.yaml"),
        ({"model.class_path": "os.system"}, "model.class_path"),
        ({"trainer": {"callbacks+": spec("os.system")}}, "os.system"),
        ({"trainer.callbacks": [spec("os.system")]}, "trainer.callbacks"),
        ({"anything": spec("os.system")}, "os.system"),
        ({"trainer": spec("os.system")}, "os.system"),
        ({"model": "os.system"}, "os.system"),
        ({"trainer": "evil.yaml"}, "evil.yaml"),
        ({"trainer": {"strategy": "evil"}}, "'evil' is a file, which would be read"),
        ({"trainer": {"callbacks": "evil"}}, "'evil' is a file, which would be read"),
        ([spec("os.system")], "sections"),
    ],
)
def test_a_configuration_reaches_nowhere_else(sections: Any, named: str) -> None:
    said = refusal(approve_run, sections)
    assert said is not None
    assert named in said


# Each verb that reads a class path out of a file, by its words; CHECKPOINT is the forged one.
VERBS = {
    "translate": ["translate", "CHECKPOINT"],
    "generate": ["generate", "CHECKPOINT"],
    "classify": ["classify", "CHECKPOINT"],
    "export": ["export", "CHECKPOINT", "folder"],
    "average": ["average", "CHECKPOINT", "--output", "averaged.ckpt"],
    "fit": ["fit", "--config", "data.yaml", "--ckpt_path", "CHECKPOINT"],
    "validate": ["validate", "--config", "data.yaml", "--ckpt_path", "CHECKPOINT"],
    "test": ["test", "--config", "own.yaml", "--ckpt_path", "CHECKPOINT"],
    "predict": ["predict", "--config", "data.yaml", "--ckpt_path=CHECKPOINT"],
    "pretrained": ["fit", "--config", "own.yaml", "--pretrained", "CHECKPOINT"],
}
DATA = {
    "class_path": "tx_lightning.data.TranslationData",
    "init_args": {"source": {"class_path": "tx_lightning.data.Grammar"}, "vocab_size": 120},
}


def forge(path: Path, place: Path_, value: Any) -> None:
    """Write a checkpoint of ours with something else in its settings."""
    checkpoint = read_checkpoint(FORMAT_1)
    record = checkpoint["tx_lightning"]
    record["task"] = put(record["task"], place, value)
    torch.save({**checkpoint, "optimizer_states": []}, path)


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_what_a_checkpoint_names(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.yaml").write_text(yaml.safe_dump({"data": DATA}))
    model = {"class_path": "tx_lightning.tasks.Translation"}
    Path("own.yaml").write_text(yaml.safe_dump({"data": DATA, "model": model}))
    forge(Path("forged.ckpt"), ("init_args", "network"), spec("os.system", **COMMAND))
    words = [word.replace("CHECKPOINT", "forged.ckpt") for word in VERBS[verb]]
    assert main(words) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: checkpoint forged.ckpt: task.network: os.system may not be")
    assert not {path.name for path in Path().iterdir()} & {"folder", "averaged.ckpt", "runs"}


@pytest.mark.parametrize("verb", ["reproduce", "resume"])
def test_no_verb_runs_what_the_configuration_of_a_run_names(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("run")
    (run / "checkpoints").mkdir(parents=True)
    callbacks = [spec("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.getcwd")]
    sections = {"data": DATA, "trainer": {"callbacks": callbacks}}
    (run / "config.yaml").write_text(yaml.safe_dump(sections))
    assert main(["reproduce", "run"] if verb == "reproduce" else ["fit", "--resume", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: run/config.yaml: trainer.callbacks.0.on_fit_start: os.getcwd may not be named"
    )


def run_with_a_file(folder: Path) -> Path:
    """The folder of a run whose strategy is the name of a file in it."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    Path("evil").rename(run / "evil")
    sections = {
        "data": DATA,
        "model": {"class_path": "tx_lightning.tasks.Translation"},
        "trainer": {"strategy": "evil"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(sections))
    return run


@pytest.mark.parametrize("walk", ["walk", "no walk"])
def test_a_file_beside_the_configuration_of_a_run_is_not_read(
    walk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is looked for there; nor could it do anything if the walk did not know that."""
    run = run_with_a_file(tmp_path)
    says = "trainer.strategy: 'evil' is a file, which would be read"
    if walk == "no walk":
        monkeypatch.setattr(Walk, "_is_file", lambda walk, text: False)
        says = f"{EVIL}.Anything is nothing that it may import"
    assert main(["fit", "--resume", str(run)]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


# Consent

OWN = """
from tx_lightning.models import EncoderDecoder
from tx_lightning.nn import NoPositions

Path = __import__("pathlib").Path
Path("imported").touch()


class Net(EncoderDecoder):
    pass


class Positions(NoPositions):
    pass


def optimizer(parameters):
    raise AssertionError("not called")
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[str]:
    """The name of a package of the user's own, which leaves a trace when it is imported."""
    name = "package_of_a_researcher"
    Path(name).mkdir()
    Path(name, "__init__.py").touch()
    Path(name, "nets.py").write_text(OWN)
    yield name
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[module]
    gc.collect()  # the parser looks among all subclasses for a class of a short name


def test_own_classes_are_built_with_consent_and_not_imported_without(own: str) -> None:
    forge(Path("own.ckpt"), ("init_args", "network", "class_path"), f"{own}.nets.Net")
    with pytest.raises(CheckpointError) as caught:
        load_task("own.ckpt")
    said = str(caught.value)
    assert f"{own}.nets.Net (task.network)" in said
    assert f'add --trust {own} (in Python trust="{own}")' in said
    assert "\n" not in said
    assert not Path("imported").exists()
    for trusted in (own, [own], f"{own}.nets", [f"{own}.nets.Net"]):
        task = load_task("own.ckpt", trust=trusted)
        assert isinstance(task, Translation)
        assert type(task.network).__name__ == "Net"
    assert Path("imported").exists()
    with pytest.raises(CheckpointError, match="is not trusted|add --trust"):
        load_task("own.ckpt", trust=f"{own}.other")


def test_an_error_names_all_that_needs_consent(own: str) -> None:
    forge(
        Path("own.ckpt"),
        ("init_args", "network"),
        spec(f"{own}.nets.Net", positions=spec("other_package.Positions")),
    )
    words = f"add --trust {own} --trust other_package"
    with pytest.raises(CheckpointError, match=words) as caught:
        load_task("own.ckpt")
    assert "other_package.Positions (task.network.positions)" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "name", "says"),
    [
        (("network",), "nets.Path", "reaches|may not be named"),  # what it imported itself
        (("network",), "nets.Positions", "Positions is not EncoderDecoder"),
        (("decoding",), "nets.optimizer", "nets.optimizer is not Decoding"),
        (("network",), "nets.Nothing", "has no Nothing"),
        (("network",), "nothing.Net", "cannot be imported|has no"),
    ],
)
def test_consent_is_not_for_everything(own: str, place: Path_, name: str, says: str) -> None:
    forge(Path("own.ckpt"), ("init_args", *place), spec(f"{own}.{name}"))
    with pytest.raises(CheckpointError, match=says):
        load_task("own.ckpt", trust=own)


def test_consent_comes_from_the_command_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    found, rest = take_trust(["a", "--trust", "one", "--trust=two.three", "--trust", "one", "b"])
    assert (found.packages, rest) == (("one", "two.three"), ["a", "b"])
    for words in (["--trust", "os"], ["--trust=subprocess"], ["--trust", "a b"], ["--trust"]):
        with pytest.raises(ConfigurationError, match="--trust"):
            take_trust(words)
    Path("data.yaml").write_text(yaml.safe_dump({"data": DATA, "trust": ["tests"]}))
    words = ["test", "--config", "data.yaml", "--ckpt_path", str(FORMAT_1)]
    assert main(words) == 2
    assert "trust: no file can give consent; say --trust PACKAGE" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [v for v in COMMANDS if v not in ("validate", "predict")])
def test_every_verb_takes_consent(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "--trust" in capsys.readouterr().out


def test_what_is_imported_is_built_by_the_same_rule(own: str) -> None:
    tree = read_checkpoint(FORMAT_1)["tx_lightning"]["task"]
    with pytest.raises(WeightsError, match="os.system may not be named in a file"):
        build_task(put(tree, ("init_args", "network"), spec("os.system", **COMMAND)))
    named = put(tree, ("init_args", "network", "class_path"), f"{own}.nets.Net")
    with pytest.raises(WeightsError, match=f"add --trust {own}"):
        build_task(named)
    assert isinstance(build_task(named, trust=own), Translation)


def test_a_run_says_what_consent_it_will_need() -> None:
    sections = {
        "model": {
            "class_path": "tests.stand_ins.TinyTask",
            "init_args": {"vocab_size": 6},
        },
        "data": DATA,
        "trainer": {"callbacks": [spec("tests.stand_ins.Recorder")], "max_epochs": 2},
    }
    assert packages_of(sections) == ["tests"]
    assert packages_of({"data": DATA}) == []
    optimizer = {"optimizer": "tests.forging.fill_in"}
    assert packages_of({"model": spec("tx_lightning.tasks.Translation", **optimizer)}) == []


def test_the_functions_that_may_be_named_are_the_default_optimizers() -> None:
    kinds: list[Any] = forging.tasks()
    defaults = {
        f"{parameter.default.__module__}.{parameter.default.__qualname__}"
        for kind in kinds
        for parameter in parameters_of(kind)
        if parameter.name == "optimizer"
    }
    assert defaults == FUNCTIONS


def test_what_is_harmless_needs_no_consent() -> None:
    assert refusal(approve_task, read_checkpoint(FORMAT_1)["tx_lightning"]["task"]) is None
    for name in FUNCTIONS:
        tree = spec("tx_lightning.tasks.Translation", optimizer=name, vocab_size=3)
        assert approve_task(tree, NO_TRUST, "file").settings == tree


def test_a_tree_without_end_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    wide: Any = "text"
    for _ in range(40):
        wide = [wide, wide]  # 2 ** 40 texts
    for value in (loop, wide):
        said = refusal(approve_task, spec("tx_lightning.tasks.Translation", freeze=value))
        assert said is not None


# The second line: what the parser itself can import, were the walk to let everything pass.

NOTHING = Approved({}, frozenset(), frozenset(), NO_TRUST)
OPTIMIZER = torch.optim.Optimizer
HINTS: list[Any] = [
    OPTIMIZER,
    str | OPTIMIZER,
    OPTIMIZER | str,
    int | OPTIMIZER,
    bool | OPTIMIZER | list[str],
    list[OPTIMIZER] | str,
    dict[str, OPTIMIZER],
    tuple[OPTIMIZER, int],
    Callable,
    Callable | str,
    str | Callable[[int], torch.nn.Module],
    Callable[[int], OPTIMIZER] | None,
    list[Callable] | Callable,  # type: ignore[type-arg]
    type,
    type[OPTIMIZER],
    ModuleType,
    Any,
    object,
]
VALUES = [
    f"{EVIL}.Anything",
    [f"{EVIL}.Anything"],
    {"class_path": f"{EVIL}.Anything"},
    [{"class_path": f"{EVIL}.Anything", "init_args": {}}],
    {"key": {"class_path": f"{EVIL}.Anything"}},
    f"{{class_path: {EVIL}.Anything}}",
    EVIL,
    "evil.yaml",
]


@pytest.mark.parametrize("hint", HINTS, ids=str)
def test_the_parser_alone_imports_nothing_that_was_not_approved(hint: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    for value in VALUES:
        with contextlib.suppress(SettingsError, ArgumentError, ImportError):
            with only(NOTHING, "file"):
                parser.instantiate(parser.parse_object({"value": value}))


def test_an_import_that_the_parser_forgives_is_not_forgiven() -> None:
    """Where there may be a class or anything else, it takes a class it cannot import as data."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=Any)
    asked = {"value": {"class_path": f"{EVIL}.Anything"}}
    with pytest.raises(SettingsError, match=f"file: {EVIL}.Anything is nothing that it may"):
        with only(NOTHING, "file"):
            parser.parse_object(asked)
    with pytest.raises(SettingsError, match=f"file: {EVIL}.Anything is nothing that it may"):
        with all_but(frozenset({f"{EVIL}.Anything"}), "file"):
            parser.parse_object(asked)
    with all_but(frozenset({"another.Name"}), "file"):
        assert parser.parse_object({"value": spec("torch.nn.Identity")})


def test_a_task_is_built_only_while_the_parser_is_watched() -> None:
    tree = read_checkpoint(FORMAT_1)["tx_lightning"]["task"]
    names = approve_task(tree, NO_TRUST, "file").names
    settings = put(tree, ("init_args", "scheduler"), spec(f"{EVIL}.Anything"))
    with pytest.raises(SettingsError, match=EVIL):
        build(Approved(settings, names, frozenset(), NO_TRUST), "file")
    with pytest.raises(SettingsError, match=EVIL):
        try_parsing(Approved(settings, names, frozenset(), NO_TRUST), "file")


@pytest.mark.parametrize("number", range(3))
def test_without_the_parsers_way_of_importing_nothing_is_parsed(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = [*building.LOADERS, *building.MODULE_LOADERS][number]
    before = vars(building.LOADERS[0][0])["import_object"]
    with monkeypatch.context() as patch:
        patch.delattr(module, name)
        with pytest.raises(AttributeError, match=name):
            with only(NOTHING, "file"):
                raise AssertionError("reached")
    assert vars(building.LOADERS[0][0])["import_object"] is before
