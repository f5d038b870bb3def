"""Files that are there whole or not at all, and JSON that any reader takes."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def as_json(value: Any, **options: Any) -> str:
    """value as JSON, with null for nan and infinity, for which JSON has no word. options: of json.dumps."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), **options)


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open path for writing so that it appears, or replaces what was there, only once everything is on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides a full disk behind its own error
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the renaming, too
        finally:
            os.close(folder)
    except OSError as error:  # some file systems refuse it for a folder; the file itself is on the disk
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP):
            raise
