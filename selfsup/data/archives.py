"""Images inside a zip file, read at random without unpacking: what the bundled demo images are stored in."""

import os
import zipfile
import zlib

import numpy as np

from selfsup.config import DataConfig
from selfsup.data.base import Source, retried, text
from selfsup.data.decode import SUFFIXES, BadImage, Pixels, check_bytes
from selfsup.data.files import is_image, labelled
from selfsup.errors import UserError
from selfsup.wording import one_line

_LOCAL = 30  # bytes of a local file header before the name (APPNOTE 6.3, section 4.3.7)
_HUGE = 2**62
_MARGIN = 64  # its extra field; a longer one costs a second read


class ZipSource(Source):
    """All images in a zip (stored or deflated), sorted by name; folders are classes as in FolderSource."""

    def __init__(self, path: str, channels: int, config: DataConfig, title: str | None = None) -> None:
        super().__init__(channels, config)
        self.path, self._title = os.path.abspath(path), title or path
        self._file: int | None = None
        try:
            self._size = os.stat(path).st_size
            with zipfile.ZipFile(path) as archive:
                entries = [e for e in archive.infolist() if not e.is_dir() and is_image(os.fsencode(e.filename))]
        except (
            Exception
        ) as error:  # OSError, BadZipFile; of damaged ones NotImplementedError, UnicodeError, struct.error, ...
            raise UserError(f"data: the archive {one_line(path)} cannot be read: {one_line(error)}") from None
        entries = [e for e in entries if not e.filename.startswith("__MACOSX/")]
        if not entries:
            raise UserError(f"data: no images in {one_line(path)}; looked for {' '.join(SUFFIXES)}, in any case")
        if any(e.flag_bits & 1 or e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for e in entries):
            raise UserError(
                f"data: {one_line(path)} holds encrypted or unusually compressed files; store or deflate them"
            )
        entries.sort(key=lambda e: e.filename)
        self._names, self._labels, self.classes = labelled(os.fsencode(e.filename) for e in entries)
        # [N,5]: where, bytes stored, bytes unpacked, checksum, deflated?
        self._table = np.array(
            [
                (*(min(n, _HUGE) for n in (e.header_offset, e.compress_size, e.file_size)), e.CRC, e.compress_type != 0)
                for e in entries
            ],
            dtype=np.int64,
        )

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> Pixels:
        return self.decoded(self._unpack(i))

    def raw(self, i: int) -> bytes:
        return self._unpack(i)

    def stored_bytes(self, i: int) -> int:
        return int(self._table[i, 2])

    def _unpack(self, i: int) -> bytes:
        offset, stored, unpacked, checksum, deflated = self._table[i].tolist()
        if offset < 0 or offset + stored > self._size:
            raise BadImage("the archive is truncated or was changed")
        check_bytes(unpacked, self.channels, self.config.max_pixels)
        head = retried(lambda: self._pread(_LOCAL + len(self._names[i]) + _MARGIN + stored, offset))
        start = _LOCAL + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        data = head[start : start + stored]
        if len(data) < stored:
            data = retried(lambda: self._pread(stored, offset + start))
        if not head.startswith(b"PK\x03\x04") or len(data) < stored:
            raise BadImage("the archive is truncated or was changed")
        try:
            if deflated:
                data = zlib.decompressobj(-15).decompress(data, unpacked + 1)
        except zlib.error as error:
            raise BadImage(f"broken in the archive: {error}") from None
        if zlib.crc32(data) != checksum:
            raise BadImage("checksum differs from the archive's")
        return data

    def _pread(self, size: int, offset: int) -> bytes:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        return os.pread(self._file, size, offset)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}  # another process opens its own

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def name(self, i: int) -> str:
        return f"{self._title}:{text(self._names[i])}"

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    def fingerprint(self) -> str:
        return self._names.fingerprint
