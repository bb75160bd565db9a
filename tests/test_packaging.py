"""What holds the project together: versions, dependencies, directions of imports, the Makefile."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tx_lightning"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CONSTRAINTS = [
    line
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
]
DISTRIBUTIONS = packages_distributions()
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

# Imports go one way. A unit is a folder or a file directly under tx_lightning; it may import
# itself and the units named here. Units that are not named belong to the command line: they may
# import everything but cli, and none of the named ones imports them.
PARTS = {"decoding", "data", "losses", "metrics", "models", "nn", "schedules"}
# Run folders, checkpoint files, configurations and messages: they know no model and no data.
FILES = {
    "averaging",
    "building",
    "checkpoints",
    "configuration",
    "diagnosis",
    "entries",
    "errors",
    "loggers",
    "metrics_file",
    "runs",
    "provenance",
    "strict_json",
    "wandb_artifacts",
    "places",
    "rebuilding",
    "settings",
    "trust",
    "walking",
    "wandb_files",
    "wandb_settings",
}
MAY_IMPORT: dict[str, set[str]] = {
    "described": set(),  # what objects were built with
    "nn": {"described"},
    "models": {"nn", "described"},
    "decoding": {"described"},
    "data": {"strict_json"},
    "losses": {"nn"},
    "metrics": set(),
    "schedules": set(),
    **dict.fromkeys(FILES, FILES | {"described"}),
    "sharding": set(),
    "tasks": PARTS | FILES | {"described", "sharding"},
    "callbacks": PARTS | FILES | {"tasks"},
    "weights": {"nn", "models", "data", "decoding"} | FILES,  # tasks are named by their class path
}
TOP = {("__main__", "commands"), ("commands", "cli")}
NOT_IMPORTED = {"urllib3"}  # declared for its version
NUMERIC = {
    "nn",
    "models",
    "decoding",
    "losses",
    "schedules",
}  # no Lightning, no tokenizers, no YAML


def pins(python: str) -> dict[str, Requirement]:
    """The pin of each distribution on a version of Python."""
    found: dict[str, Requirement] = {}
    for line in CONSTRAINTS:
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            name = canonicalize_name(pin.name)
            assert name not in found, f"constraints.txt pins {name} twice for Python {python}"
            found[name] = pin
    return found


def imports_of(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """The dotted name of everything a module of `package` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    return imports_of(path.read_text("utf-8"), package)


def modules() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 20, "the package was not found"
    return found


def unit(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def third_party(path: Path) -> set[str]:
    top_level = {name.partition(".")[0] for name in imports(path)}
    return top_level - set(sys.stdlib_module_names) - {"tx_lightning"}


def declared(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def distribution(module: str) -> str:
    """The distribution a module comes from; its own name where that is not installed."""
    return canonicalize_name(DISTRIBUTIONS.get(module, [module])[0])


def test_pre_commit_runs_the_pinned_versions() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    pinned = pins("3.12")
    revisions = {repo["repo"].rpartition("/")[2]: repo.get("rev") for repo in config["repos"]}
    for repository, tool in {"ruff-pre-commit": "ruff", "codespell": "codespell"}.items():
        version = str(pinned[tool].specifier).removeprefix("==")
        assert revisions[repository] == f"v{version}"
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert hooks["mypy"]["entry"].startswith(".venv/bin/")  # pinned where `make` installs it
    assert {"ruff-check", "ruff-format", "codespell", "check-added-large-files"} <= hooks.keys()


def test_constraints_are_plain_pins() -> None:
    pattern = re.compile(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; python_version (<|>=) "[0-9.]+")?')
    assert len(CONSTRAINTS) > 50
    assert [line for line in CONSTRAINTS if not pattern.fullmatch(line)] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_inside_its_range(python: str) -> None:
    pinned = pins(python)
    extras = [line for name, lines in EXTRAS.items() if name != "datasets" for line in lines]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        applies = requirement.marker is None or requirement.marker.evaluate(
            {"python_version": python}
        )
        if requirement.name == PROJECT["name"] or not applies:
            continue
        version = str(pinned[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} and {version}"


def test_the_extras_exist_and_dev_holds_what_the_tests_import() -> None:
    assert {"dev", "benchmarks", "datasets", "huggingface", "tensorboard"} == EXTRAS.keys()
    own = {extra for line in EXTRAS["dev"] for extra in Requirement(line).extras}
    everything = PROJECT["dependencies"] + EXTRAS["dev"] + [x for name in own for x in EXTRAS[name]]
    # packaging comes with pytest.
    available = declared(everything) | {"packaging"}
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        neighbours = {file.stem for file in path.parent.glob("*.py")} | {"tests", "benchmarks"}
        for module in third_party(path) - neighbours:
            assert distribution(module) in available, f"{path.relative_to(ROOT)} imports {module}"


def test_every_import_is_a_declared_dependency() -> None:
    required = declared(PROJECT["dependencies"])
    optional = declared(EXTRAS["tensorboard"] + EXTRAS["datasets"] + EXTRAS["huggingface"])
    used = set()
    for path in modules():
        for module in third_party(path):
            used.add(distribution(module))
            assert distribution(module) in required | optional, (
                f"{path.relative_to(ROOT)} imports {module}"
            )
    assert required - used == NOT_IMPORTED, "declared, and imported nowhere"


def test_imports_go_one_way() -> None:
    for path in modules():
        here = unit(path.relative_to(PACKAGE).parts)
        if here == "__init__":
            continue
        for name in imports(path):
            root, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if root != "tx_lightning" or target in {here, ""} or target.startswith("__"):
                continue
            last = target in ("cli", "commands")
            allowed = target in MAY_IMPORT[here] if here in MAY_IMPORT else not last
            assert allowed or (here, target) in TOP, (
                f"{path.relative_to(ROOT)} imports {name}: {here} may not import {target}"
            )
    assert MAY_IMPORT.keys() <= {unit(path.relative_to(PACKAGE).parts) for path in modules()}


def test_the_numeric_core_uses_torch_and_numpy_alone() -> None:
    for path in modules():
        if unit(path.relative_to(PACKAGE).parts) in NUMERIC:
            assert third_party(path) <= {"torch", "numpy"}, path.relative_to(ROOT)


def test_the_import_reader_sees_functions_and_relative_imports() -> None:
    source = "from . import a\nfrom ..nn.layers import B\ndef f():\n    import torch.nn\n"
    assert list(imports_of(source, ("tx_lightning", "data"))) == [
        "tx_lightning.data.a",
        "tx_lightning.nn.layers.B",
        "torch.nn",
    ]


def test_the_console_script_exists() -> None:
    module, _, function = PROJECT["scripts"]["tx-lightning"].partition(":")
    assert callable(vars(importlib.import_module(module))[function])


@pytest.fixture(autouse=True)
def _outside_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget that `make test` may be running: another make would print where it is."""
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)


def test_make_installs_once_and_again_after_a_change(tmp_path: Path) -> None:
    for name in ["Makefile", "pyproject.toml", "constraints.txt"]:
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
        os.utime(tmp_path / name, (1, 1))

    def would_install() -> bool:
        command = ["make", "--dry-run", "install"]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return "pip install" in made.stdout

    assert would_install()
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (2, 2))
    assert not would_install()
    for name in ["pyproject.toml", "constraints.txt"]:
        os.utime(tmp_path / name, (3, 3))
        assert would_install(), name
        os.utime(tmp_path / name, (1, 1))


def test_ci_run_stops_with_the_status_of_what_failed(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_text((ROOT / ".ci" / "run").read_text("utf-8"), "utf-8")
    (tmp_path / "Makefile").write_text("lint:\n\t@echo linted\ntest:\n\t@echo tested; exit 1\n")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    made = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert made.stdout.split()[:2] == ["linted", "tested"]
    assert made.returncode != 0
