"""API keys: named, hashed, with tenant, expiry and share; and which route needs one."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from coppice.errors import AuthenticationError, CapacityError, ConfigError
from coppice.server.config import ServerConfig

MAX_KEY_CHARS = 512
_FILE_FIELDS = {"name", "sha256", "tenant", "expires", "share", "rate_per_minute"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key. ``sha256`` is the hex digest of the secret; the secret is stored nowhere.

    Attributes:
        tenant: whose share the work counts against and whose prefixes are shared.
        expires_s: seconds since the epoch, or ``None``.
        share: largest fraction of all places its tenant may hold.
        rate_per_minute: calls per minute, or ``None`` for no limit.
    """

    name: str
    sha256: str
    tenant: str = "default"
    expires_s: float | None = None
    share: float = 1.0
    rate_per_minute: float | None = None


ANONYMOUS = Key(name="anonymous", sha256="")


def hash_key(secret: str) -> str:
    """What the keys file holds instead of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class KeyRing:
    """All keys. Compares with every one of them in constant time."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys = tuple(keys)
        self._tokens: dict[str, tuple[float, float]] = {}
        self.busy: Counter[str] = Counter()

    @property
    def required(self) -> bool:
        """Whether any key is set."""
        return bool(self._keys)

    @classmethod
    def from_config(cls, config: ServerConfig) -> KeyRing:
        """Read ``api_key`` and ``api_keys_file``.

        Raises:
            ConfigError: the file is missing or says something not understood.
        """
        keys = [Key(name="api_key", sha256=hash_key(config.api_key))] if config.api_key else []
        if config.api_keys_file:
            keys += _read_file(Path(config.api_keys_file))
        return cls(keys)

    def identify(self, authorization: str | None) -> Key:
        """The key a request carries in ``Authorization: Bearer``.

        Raises:
            AuthenticationError: it is missing, wrong or expired.
        """
        if not self._keys:
            return ANONYMOUS
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret or len(secret) > MAX_KEY_CHARS:
            raise AuthenticationError("Send your API key as 'Authorization: Bearer KEY'.")
        digest = hash_key(secret.strip())
        found: Key | None = None
        for key in self._keys:  # all of them, so that time does not tell which matched
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None:
            raise AuthenticationError("The API key is not known here.", code="invalid_api_key")
        if found.expires_s is not None and time.time() >= found.expires_s:
            raise AuthenticationError("The API key has expired.", code="expired_api_key")
        return found

    def named(self, name: str) -> Key | None:
        """The key of this name, unless it is gone or has expired."""
        for key in self._keys or (ANONYMOUS,):
            if key.name == name and (key.expires_s is None or time.time() < key.expires_s):
                return key
        return None

    def spend(self, key: Key) -> None:
        """Count one call against the key's rate.

        Raises:
            CapacityError: 429, over the rate.
        """
        if key.rate_per_minute is None:
            return
        now, per_s = time.monotonic(), key.rate_per_minute / 60
        level, then = self._tokens.get(key.name, (max(1.0, key.rate_per_minute), now))
        level = min(max(1.0, key.rate_per_minute), level + (now - then) * per_s)
        if level < 1.0:
            raise CapacityError(
                f"The key may make {key.rate_per_minute:g} calls a minute; wait a little.",
                retry_after_s=(1.0 - level) / per_s, status=429, code="rate_exceeded",
            )  # fmt: skip
        self._tokens[key.name] = (level - 1.0, now)


def _read_file(path: Path) -> list[Key]:
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Cannot read the keys file {path}: {error}.", param="api_keys_file"
        ) from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path} must hold a JSON list of keys.", param="api_keys_file")
    keys = [_read_key(entry, path) for entry in entries]
    if len({key.name for key in keys}) != len(keys):
        raise ConfigError(f"{path}: two keys have the same name.", param="api_keys_file")
    if not keys:  # no key at all would let everybody in
        raise ConfigError(f"{path} holds no key; add one, or drop the setting to need none.",
                          param="api_keys_file")  # fmt: skip
    return keys


def _read_key(entry: dict[str, object], path: Path) -> Key:
    def bad(what: str) -> ConfigError:
        return ConfigError(f"{path}: key {entry.get('name')!r}: {what}.", param="api_keys_file")

    if unknown := set(entry) - _FILE_FIELDS:
        raise bad(f"unknown field {sorted(unknown)[0]!r}")
    name, digest, tenant = entry.get("name"), entry.get("sha256"), entry.get("tenant", "default")
    if not isinstance(name, str) or not isinstance(tenant, str) or not name:
        raise bad("name and tenant must be text")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):  # noqa: PLR2004
        raise bad("sha256 must be 64 hex digits")
    expires, share, rate = (
        entry.get("expires"),
        entry.get("share", 1.0),
        entry.get("rate_per_minute"),
    )
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise bad("share must lie in (0, 1]")
    if rate is not None and (not isinstance(rate, int | float) or rate <= 0):
        raise bad("rate_per_minute must be positive")
    try:
        expires_s = datetime.fromisoformat(str(expires)).timestamp() if expires else None
    except ValueError:
        raise bad("expires must be an ISO date") from None
    return Key(
        name=name, sha256=digest, tenant=tenant, expires_s=expires_s,
        share=float(share), rate_per_minute=float(rate) if rate is not None else None,
    )  # fmt: skip
