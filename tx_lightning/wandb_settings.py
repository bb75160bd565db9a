"""What W&B's environment variables and settings files say, found and read as wandb does it."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tx_lightning.errors import ConfigurationError, did_you_mean
from tx_lightning.runs import shown

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_TRUE = ("1", "true", "yes", "on", "y", "t")


def wandb_mode() -> Mode:
    """What `auto` means here and now."""
    return mode_and_reason()[0]


def mode_and_reason() -> tuple[Mode, str]:
    """Return the mode of a run whose configuration says `auto`, and what decided it.

    The reason is empty where it needs no mention: WANDB_MODE, or a key.

    WANDB_MODE decides, then WANDB_DISABLED, then the mode in a settings file, which the commands
    `wandb offline`, `wandb online`, `wandb disabled` and `wandb enabled` write. Without them, or
    with the mode online in a file, a run is online if an API key is configured, and offline if not.

    Raises:
        ConfigurationError: When WANDB_MODE or a settings file has an unknown mode.
    """
    if "WANDB_MODE" in os.environ:
        return _known(os.environ["WANDB_MODE"], "WANDB_MODE"), ""
    if os.environ.get("WANDB_DISABLED", "").lower() in _TRUE:
        return "disabled", " (WANDB_DISABLED)"
    for path in _files():
        asked = _read(path).get("mode")
        if asked is not None:
            mode = _known(asked, f"mode in {path}")
            if mode != "online":
                return mode, f" (mode = {asked} in {shown(path)})"
            break
    return ("online", "") if _has_key() else ("offline", " (no API key is configured)")


def _known(mode: str, name: str) -> Mode:
    if mode not in MODES:
        raise ConfigurationError(f"{name}={mode!r} is not a mode; there are {', '.join(MODES)}")
    return MODES[mode]


def _files() -> list[Path]:
    """The settings files, the most specific first; not all of them exist.

    With WANDB_DIR, `wandb offline` writes below that folder, and `wandb.init` reads the file below
    the working directory: both count.
    """
    import wandb

    folders = [str(Path.cwd())]
    if os.environ.get("WANDB_DIR"):
        folders.append(os.environ["WANDB_DIR"])
    below = [Path(wandb.Settings(root_dir=folder).settings_workspace) for folder in folders]
    return [*below, _global_file()]


def _global_file() -> Path:
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    return Path(folder).expanduser() / "settings"


def _read(path: Path) -> dict[str, str]:
    from wandb.sdk.lib.settings_file import SettingsFiles

    return SettingsFiles(global_settings=None, local_settings=path).all()


def resolved() -> "wandb.Settings":
    """Return what the settings files and the environment say now, without starting a service.

    `wandb.init` reads them once in a process. `model_fields_set` has the names that were set.

    Raises:
        ConfigurationError: When a variable has a value that wandb refuses.
    """
    import wandb

    settings = wandb.Settings(silent=True)  # or it reports each file that it reads
    settings.settings_system = str(_global_file())
    with one_line_errors("W&B's settings"):
        settings.update_from_system_settings()
        settings.update_from_env_vars(dict(os.environ))
    return settings


def _has_key() -> bool:
    """Whether wandb has something to log in with."""
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    settings = resolved()
    if settings.api_key or settings.identity_token_file:
        return True
    if wbauth.session_credentials(host=settings.base_url) is not None:
        return True
    try:
        return bool(wbauth.read_netrc_auth(host=settings.base_url))
    except AuthenticationError:
        return True  # there is one, in a wrong format: wandb.init says so


@contextlib.contextmanager
def one_line_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turn what wandb raises into a `ConfigurationError` of one line."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, ValueError) as error:  # of its own, and of pydantic
        said = " ".join(str(error).split()).partition(" For further information")[0]
        raise ConfigurationError(f"{what}: {said}{remedy}") from error


@contextlib.contextmanager
def no_reports(mode: Mode) -> Iterator[None]:
    """Keep wandb from reporting to its server, within the block, unless a run is online.

    Since 0.31 it sends times and errors of its own code even from an offline run, unless
    WANDB_ERROR_REPORTING is off when the first run of a process starts.
    """
    from wandb.sdk import wandb_setup

    _ = wandb_setup.singleton().settings  # wandb must not see the variable as a change of the user
    if mode == "online" or "WANDB_ERROR_REPORTING" in os.environ:
        yield
        return
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        yield
    finally:
        del os.environ["WANDB_ERROR_REPORTING"]


# Arguments of wandb.init and the settings that they override.
_FIELDS = {
    "project": "project",
    "entity": "entity",
    "name": "run_name",
    "group": "run_group",
    "tags": "run_tags",
    "notes": "run_notes",
    "job_type": "run_job_type",
    "id": "run_id",
    "dir": "root_dir",
    "resume": "resume",
}


def init_arguments(given: Mapping[str, Any], defaults: Mapping[str, str]) -> dict[str, Any]:
    """Return what to pass to `wandb.init`; None where wandb is to decide.

    A value of the configuration counts before the environment, this before the settings files, and
    these before the defaults.

    Args:
        given: Arguments that the configuration gives; None: it says nothing.
        defaults: Ours in place of wandb's.
    """
    from wandb.sdk import wandb_setup

    now, session = resolved(), wandb_setup.singleton().settings
    found = {**dict.fromkeys(_FIELDS), **given}
    for name, field in _FIELDS.items():
        if found[name] is None and field in now.model_fields_set:
            found[name] = getattr(now, field)
        if found[name] is None and field not in session.model_fields_set:  # of wandb.setup
            found[name] = defaults.get(name)
    branches = {"fork_from", "resume_from"}
    if any(found.get(name) is not None for name in branches) or branches & now.model_fields_set:
        found["resume"] = given.get("resume")
    return found


def quiet_settings(flush_seconds: float, given: "wandb.Settings | dict[str, Any] | None") -> Any:
    """Return settings of a run that prints nothing and is on disk soon, unless the user asks else.

    Args:
        flush_seconds: How long history may wait in memory.
        given: Settings of the user, which come first.
    """
    import wandb

    now = resolved()
    console = now.console if "console" in now.model_fields_set else "off"
    settings = wandb.Settings(
        silent=now.silent, console=console, x_transaction_log_flush_interval=flush_seconds
    )
    if given is not None:
        theirs = given if isinstance(given, wandb.Settings) else wandb.Settings(**given)
        settings.update_from_settings(theirs)
    return settings


def check_arguments(init: Mapping[str, Any]) -> None:
    """Refuse arguments that `wandb.init` does not have, or that have no effect with a logger."""
    if not init:
        return
    import wandb

    known = inspect.signature(wandb.init).parameters
    for name in init:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigurationError(f"WandB, like wandb.init, has no argument {name!r}{hint}")
    if init.get("anonymous") is not None:
        raise ConfigurationError("anonymous of WandB has no effect in wandb any more: leave it out")
    if init.get("reinit") is not None:
        raise ConfigurationError(
            "reinit of WandB is not supported, it uses the run in progress: call wandb.finish() "
            "before the trainer starts to have a new one"
        )


def same(name: str, value: Any, alias: str, other: Any) -> Any:
    """Return the value of an argument that has two names, None where neither is given."""
    if value is not None and other is not None and value != other:
        raise ConfigurationError(
            f"{alias}={other!r} of WandB contradicts {name}={value!r}, they are the same: give one"
        )
    return other if value is None else value
