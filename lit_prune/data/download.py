"""Archives fetched, verified and unpacked whole or not at all."""

import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from lit_prune.errors import InputError
from lit_prune.files import whole_file

CHUNK = 2**20  # bytes
PATIENCE = 60  # seconds without a byte


def download_folder(url: str, md5: str, folder: str | Path) -> None:
    """Makes `folder` from the folder of the same name in a zip archive.

    The archive is written beside `folder` under a temporary name, verified, unpacked under a temporary name and moved
    into place; whatever fails, nothing is left behind.

    Args:
        url: Address of the archive.
        md5: Its checksum, in hexadecimal digits.
        folder: Folder to make; it must not exist yet.

    Raises:
        InputError: The address cannot be read, the checksum differs, or the archive lacks the folder.
    """
    folder = Path(folder)
    with no_empty_folder(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".partial", f".{folder.name}.", folder.parent) as partial:
            archive = Path(partial) / "archive.zip"
            _fetch(url, archive, "md5", md5, f"unpack the archive by hand to {folder}")
            try:
                shutil.unpack_archive(archive, partial)
            except (shutil.ReadError, zipfile.BadZipFile) as error:
                raise InputError(f"{url} is no intact zip archive ({error}); try again") from error
            if not (Path(partial) / folder.name).is_dir():
                raise InputError(f"the archive {url} has no folder {folder.name}; unpack the data by hand to {folder}")
            os.replace(Path(partial) / folder.name, folder)


def fetch_file(url: str, sha256: str, file: Path) -> Path:
    """Fetches `file`, whole and as it was published or not at all; one that is there already is compared anew.

    Raises:
        InputError: the address cannot be read, or what is there has another checksum.
    """
    if file.is_file():
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != sha256:
            raise InputError(f"{file} is not the file that was published (sha256 {found}); delete it")
        return file
    with no_empty_folder(file.parent), whole_file(file) as partial:
        _fetch(url, partial, "sha256", sha256, f"put the file by hand at {file}")
    return file


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes afterwards what was made in the meantime of `folder` and the folders around it, where it is empty."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]  # innermost first
    try:
        yield
    finally:
        with suppress(OSError):  # not empty, or never made
            for place in made:
                place.rmdir()


def _fetch(url: str, file: Path, algorithm: str, expected: str, otherwise: str) -> None:
    """Writes what `url` serves to `file`. InputError: that is not possible, or it has another checksum."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer, file.open("wb") as out, Progress(*columns) as bar:
            task = bar.add_task(url.rpartition("/")[2], total=int(answer.headers.get("Content-Length") or 0) or None)
            while block := answer.read(CHUNK):
                digest.update(block)
                bar.advance(task, out.write(block))
    except OSError as error:  # URLError, HTTPError and timeouts among them
        raise InputError(f"download of {url} failed ({error}); check the connection or {otherwise}") from error
    if digest.hexdigest() != expected:
        raise InputError(f"{algorithm} of {url} is {digest.hexdigest()}, not {expected}; try again or {otherwise}")
