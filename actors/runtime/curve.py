"""CURVE keys: who a peer is on TCP, and who may connect.

A key file holds a key pair and is readable by its owner alone. An allow-list has a line for each peer: its public key
and, if the key may speak for one name only, that name; `#` begins a comment. A key with several lines may speak for the
names of all of them.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import msgspec
import zmq

from ...messages.errors import InvalidConfigError

_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


class CurveKeys(msgspec.Struct, frozen=True):
    """This process's key pair, and the file of peers that may connect.

    Attributes:
        public, secret: Z85, 40 characters.
        allow_list: path of the allow-list; None: nobody may connect to what is bound here.
    """

    public: str
    secret: str
    allow_list: Path | None = None

    def __repr__(self) -> str:
        return f"CurveKeys(public={self.public!r}, secret=..., allow_list={self.allow_list!r})"


def make_keys() -> CurveKeys:
    """A new pair."""
    public, secret = zmq.curve_keypair()
    return CurveKeys(public.decode(), secret.decode())


def write_keys(keys: CurveKeys, path: Path, *, replace: bool = False) -> None:
    """Write a key file of mode 0600.

    Raises:
        InvalidConfigError: there is one already, and `replace` is not given.
    """
    if replace:
        path.unlink(missing_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise InvalidConfigError(f"{path} exists: choose another name, or replace it with --force") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask says
        file.write(f"public {keys.public}\nsecret {keys.secret}\n")


def read_keys(path: Path, *, allow_list: Path | None = None) -> CurveKeys:
    """Read a key file.

    Raises:
        InvalidConfigError: there is none, others may read it, or it holds no pair.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InvalidConfigError(f"no key file at {path} ({error.strerror}): `octavo keys` makes one") from error
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise InvalidConfigError(f"{path} must be a file of yours that only you can read: chmod 0600 it")
        lines = dict(line.split(maxsplit=1) for line in file.read(4096).splitlines() if len(line.split()) == 2)
    public, secret = lines.get("public", "").strip(), lines.get("secret", "").strip()
    if not (_KEY.fullmatch(public) and _KEY.fullmatch(secret)) or zmq.curve_public(secret.encode()).decode() != public:
        raise InvalidConfigError(f"{path} holds no key pair: `octavo keys` makes one")
    return CurveKeys(public, secret, allow_list)


def check_public_key(key: str) -> str:
    """The key as given, if it is one; raises `InvalidConfigError` otherwise."""
    if not _KEY.fullmatch(key):
        raise InvalidConfigError(f"{key!r} is no CURVE public key (40 characters of Z85)")
    return key


class AllowList:
    """The peers that may connect, as their file says now.

    The file is looked at again whenever it changed; while it cannot be read, nobody may connect.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._names: dict[str, tuple[str, ...]] = {}
        self.reload()

    def reload(self) -> bool:
        """Read the file again if it changed; returns whether it did."""
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return False
            names = parse_allow_list(self._path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, InvalidConfigError):
            changed = bool(self._names)
            self._stamp, self._names = None, {}
            return changed
        self._stamp, self._names = stamp, names
        return True

    def allows(self, key: str) -> bool:
        """Whether this public key may connect."""
        return key in self._names

    def allows_name(self, key: str, name: str) -> bool:
        """Whether this public key may speak for `name`."""
        names = self._names.get(key, ())
        return "" in names or name in names


def parse_allow_list(text: str) -> dict[str, tuple[str, ...]]:
    """Public key -> the names that it may speak for, an empty one for any.

    Raises:
        InvalidConfigError: a line is none of these.
    """
    names: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        # A key may hold "#", so a comment begins at the line's start or after a blank.
        words = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].split(maxsplit=1)
        if not words:
            continue
        if not _KEY.fullmatch(words[0]):
            raise InvalidConfigError(f"line {number} of the allow-list does not begin with a public key")
        name = words[1].strip() if len(words) > 1 else ""
        names[words[0]] = (*names.get(words[0], ()), name)
    return names
