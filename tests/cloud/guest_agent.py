"""What Google's guest agent does on a machine: makes users who may log in of the metadata's `ssh-keys`."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

_FIRST_ID = 1001
_GROUP = "google-sudoers"  # in the comment of each user that was made here


def keys_by_user(text: str) -> dict[str, list[str]]:
    """Returns the public keys of lines as `user:ssh-ed25519 AAAA... comment`; lines of another form are left out."""
    keys: dict[str, list[str]] = {}
    for line in text.splitlines():
        user, colon, key = line.strip().partition(":")
        if colon and user and len(key.split()) >= 2:
            keys.setdefault(user, []).append(key)
    return keys


def set_users(root: Path, keys: Mapping[str, Sequence[str]]) -> None:
    """Makes the users who are not there yet, and lets each in with these keys alone, as seen from outside of `root`."""
    users = _users(root)
    for user in [*keys, *(each for each in users if each not in keys)]:
        home = root / "home" / user
        if user not in users:
            users[user] = max([_FIRST_ID - 1, *users.values()]) + 1
            _add_user(root, user, users[user], home)
        file = home / ".ssh" / "authorized_keys"
        file.parent.mkdir(mode=0o700, exist_ok=True)
        new = file.with_name("authorized_keys.new")
        new.write_text("".join(f"# Added by Google\n{key}\n" for key in keys.get(user, ())))
        new.chmod(0o600)
        new.rename(file)
        for path in (file.parent, file):
            os.chown(path, users[user], users[user])


def _users(root: Path) -> dict[str, int]:
    lines = (line.split(":") for line in (root / "etc/passwd").read_text().splitlines())
    return {fields[0]: int(fields[2]) for fields in lines if fields[4] == _GROUP}


def _add_user(root: Path, user: str, number: int, home: Path) -> None:
    shutil.copytree(root / "etc/skel", home)
    for path in (home, *home.iterdir()):
        os.chown(path, number, number)
    for file, line in (
        ("group", f"{user}:x:{number}:"),
        ("shadow", f"{user}:*:20000:0:99999:7:::"),  # no password, but not locked
        ("passwd", f"{user}:x:{number}:{number}:{_GROUP}:/home/{user}:/bin/bash"),
    ):
        with open(root / "etc" / file, "a") as lines:
            lines.write(f"{line}\n")
