"""The contexts of the vfleet command: clusters with a name, in ~/.config/vfleet/config.yaml.

    current: lab
    contexts:
      lab: {coordinator: "10.0.0.1:7000,10.0.0.2:7000", tls: /home/me/lab}
      test: {etcd: "127.0.0.1:2379", insecure: true}

The file may be missing. Nothing else but `vfleet context use` writes it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vfleet.caller import parse_addresses
from vfleet.errors import invalid_field

LOCAL = "local"  # the cluster of `vfleet up`, which needs no entry

_PLACES = ("coordinator", "etcd")
_KEYS = (*_PLACES, "tls", "etcd-tls", "insecure")


@dataclass(frozen=True, slots=True)
class Context:
    """A cluster: its coordinators, or the etcd that knows them, as HOST:PORT[,…]; neither for that of `vfleet up`.

    And how its connections are secured, as --tls, --etcd-tls and --insecure say it.
    """

    coordinator: str | None = None
    etcd: str | None = None
    tls: Path | None = None
    etcd_tls: Path | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What the file says. `current` is the context that counts where a command names none."""

    path: Path
    current: str = LOCAL
    contexts: Mapping[str, Context] = field(default_factory=lambda: {LOCAL: Context()})

    def context(self, name: str, by: str) -> Context:
        """Return a context. Raise INVALID_FIELD, naming who asked for it, if there is none of the name."""
        if name not in self.contexts:
            raise invalid_field(by, name, f"one of the contexts of {self.path}: {', '.join(self.contexts)}")
        return self.contexts[name]


def settings_file() -> Path:
    """Return where the settings are."""
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "vfleet" / "config.yaml"


def load_settings() -> Settings:
    """Return the settings. Raise INVALID_FIELD, naming file and field, for what can't be."""
    path = settings_file()
    try:
        return _parse(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings(path)
    except (OSError, UnicodeDecodeError) as error:
        raise invalid_field("settings", path, f"a file that can be read ({error})") from None


def use_context(name: str) -> Settings:
    """Make a context the current one, and return the settings. The rest of the file stays as it is."""
    settings = load_settings()
    settings.context(name, "context")
    path = settings.path
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    text = "\n".join([f"current: {name}", *(line for line in lines if not line.startswith("current:"))]) + "\n"
    changed = _parse(path, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    return changed


def _parse(path: Path, text: str) -> Settings:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise invalid_field("settings", path, f"YAML ({' '.join(str(error).split())})") from None
    fields = _mapping(path, "settings", found, ("current", "contexts"))
    contexts = {LOCAL: Context()}
    for name, value in _mapping(path, "contexts", fields.get("contexts"), None).items():
        contexts[name] = _context(path, f"contexts.{name}", value)
    current = fields.get("current", LOCAL)
    settings = Settings(path, str(current), contexts)
    settings.context(settings.current, f"{path}: current")
    return settings


def _context(path: Path, where: str, value: object) -> Context:
    fields = _mapping(path, where, value, _KEYS)
    places = [key for key in _PLACES if key in fields]
    if len(places) != 1:
        raise invalid_field(f"{path}: {where}", value, f"one of {' and '.join(_PLACES)}")
    addresses = {key: str(fields[key]) for key in places}
    for key, text in addresses.items():
        parse_addresses(f"{path}: {where}.{key}", text)
    insecure = fields.get("insecure", False)
    if not isinstance(insecure, bool):
        raise invalid_field(f"{path}: {where}.insecure", insecure, "true or false")
    folders = {key: Path(str(fields[key])).expanduser() for key in ("tls", "etcd-tls") if key in fields}
    if insecure and "tls" in folders:
        raise invalid_field(f"{path}: {where}", value, "one of tls and insecure")
    return Context(**addresses, tls=folders.get("tls"), etcd_tls=folders.get("etcd-tls"), insecure=insecure)


def _mapping(path: Path, where: str, value: object, keys: tuple[str, ...] | None) -> dict[str, object]:
    """Return a mapping with text as keys, of which only `keys` may be there; nothing is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise invalid_field(f"{path}: {where}", value, "a mapping of names")
    for key in value:
        if keys is not None and key not in keys:
            raise invalid_field(f"{path}: {where}", key, f"one of {', '.join(keys)}")
    return dict(value)
