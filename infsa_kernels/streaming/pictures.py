"""Pictures that are read in bands of rows: NumPy's .npy, TIFF and OME-TIFF, Zarr and OME-Zarr.

What a file is, its first bytes say, not its name. Whatever of it can be checked without reading it all is checked when it is
opened: a copy that broke off would else be found after hours. No file is mapped: a map counts towards the address space, and a
disk that fails then ends the process instead of raising.
"""

import logging
import os
from pathlib import Path

import numpy as np

DTYPES = ("uint8", "uint16", "float32")
# The most that one band of tiles or strips may hold, decoded.
BAND_BYTES = 1 << 30
FORMATS = ".npy, TIFF, OME-TIFF, Zarr or OME-Zarr"


def open_picture(path: str | os.PathLike, channels: int) -> "Picture":
    """The reader of a file.

    Args:
        channels: how many the model takes; tells (height, width, channels) from (channels, height, width).

    Raises:
        FileNotFoundError: there is none. ValueError: not a picture that can be read, or not a whole one. ImportError: a
        package is missing.
    """
    path = Path(path)
    if path.is_dir():
        return ZarrPicture(path, channels)
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic[:6] == b"\x93NUMPY":
        return open_numpy(path, channels)
    if magic[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return open_tiff(path, channels)
    raise ValueError(f"predict_file: {path} begins with {magic!r}, expected {FORMATS}")


class Picture:
    """A picture's size and its rows.

    Attributes:
        height, width, channels: its size. dtype: of DTYPES, in the machine's byte order.
        bytes_read: how many bytes of the file have been read; of Zarr, how many came out of it, decoded.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, channels: int):
        self.path, self.bytes_read = path, 0
        if dtype.newbyteorder("=") not in map(np.dtype, DTYPES):
            raise ValueError(
                f"predict_file: {path} holds {dtype}, expected {', '.join(DTYPES)}; write it again as one of these"
            )
        self.dtype = dtype.newbyteorder("=")
        # OME's time and depth, where there is one of each.
        ones = [axis for axis, size in enumerate(shape[:-2]) if size == 1][: max(0, len(shape) - 3)]
        self.axes = [axis for axis in range(len(shape)) if axis not in ones]
        shape = tuple(shape[axis] for axis in self.axes)
        if len(shape) == 2:
            self.channels_first, shape = False, (*shape, 1)
        else:
            self.channels_first = len(shape) == 3 and shape[-1] != channels and shape[0] == channels
        if len(shape) != 3 or shape[0 if self.channels_first else 2] != channels:
            raise ValueError(
                f"predict_file: {path} has shape {list(shape)}, expected (height, width, {channels}) or "
                f"({channels}, height, width): the model takes {channels} channel{'s' * (channels != 1)}"
            )
        self.shape = shape
        self.height, self.width = shape[1:] if self.channels_first else shape[:2]
        self.channels = channels
        if not (self.height and self.width):
            raise ValueError(f"predict_file: {path} has shape {list(shape)}, expected at least one pixel")

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows of pixels, (end - begin, width, channels)."""
        raise NotImplementedError

    def identity(self) -> dict[str, str | int]:
        """What tells this picture from another, or from itself before it was changed."""
        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())
        stats = [file.stat() for file in files]
        return {
            "shape": str(self.shape), "dtype": str(self.dtype), "files": len(files),
            "bytes": sum(s.st_size for s in stats), "changed": max(s.st_mtime_ns for s in stats),
        }  # fmt: skip

    def close(self) -> None:
        """Gives the file back."""


class RawPicture(Picture):
    """A picture whose numbers lie in the file as they are, in one piece, or in one for each channel.

    Args:
        offsets: where each piece begins.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], stored: np.dtype, channels: int, offsets: list[int]):
        super().__init__(path, shape, stored, channels)
        self._stored = stored
        plane = self.height * self.width * stored.itemsize
        if self.channels_first and len(offsets) == 1:
            offsets = [offsets[0] + plane * channel for channel in range(channels)]
        self._offsets = offsets
        check_length(path, offsets[-1] + (plane if self.channels_first else plane * channels))
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115

    def rows(self, begin: int, end: int) -> np.ndarray:
        shape = end - begin, self.width, self.channels // len(self._offsets)
        pieces = [self._read(offset, begin, shape) for offset in self._offsets]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 2)

    def _read(self, offset: int, begin: int, shape: tuple[int, int, int]) -> np.ndarray:
        out = np.empty(shape, self._stored)
        self._file.seek(offset + begin * out[0].nbytes)
        if self._file.readinto(out.reshape(-1).view(np.uint8)) != out.nbytes:
            raise ValueError(f"predict_file: {self.path} has become shorter while it was read")
        self.bytes_read += out.nbytes
        return out.astype(self.dtype, copy=False)

    def close(self) -> None:
        self._file.close()


def open_numpy(path: Path, channels: int) -> Picture:
    """An array of numpy.save."""
    read = np.lib.format
    headers = {(1, 0): read.read_array_header_1_0, (2, 0): read.read_array_header_2_0}
    with open(path, "rb") as file:
        try:
            shape, fortran, dtype = headers[read.read_magic(file)](file)
        except (KeyError, ValueError) as error:
            raise ValueError(f"predict_file: {path} has no header that numpy.load would take: {error}") from None
        offset = file.tell()
    if fortran:
        raise ValueError(
            f"predict_file: {path} is in Fortran's order, expected C's; write it again with "
            "numpy.save(path, numpy.ascontiguousarray(picture))"
        )
    return RawPicture(path, shape, dtype, channels, [offset])


class BandedPicture(Picture):
    """A picture in tiles or strips: those beside each other are decoded together, and kept until the next are asked for."""

    band_rows: int
    _kept: tuple[int, np.ndarray | None] = (-1, None)

    def rows(self, begin: int, end: int) -> np.ndarray:
        out = np.empty((end - begin, self.width, self.channels), self.dtype)
        for band in range(begin // self.band_rows, (end - 1) // self.band_rows + 1):
            if self._kept[0] != band:
                self._kept = -1, None  # its memory, before the next takes its own
                self._kept = band, self._band(band)
            first = band * self.band_rows
            a, b = max(begin, first), min(end, first + self.band_rows)
            out[a - begin : b - begin] = self._kept[1][a - first : b - first]
        return out

    def check_band(self, advice: str) -> None:
        size = min(self.band_rows, self.height) * self.width * self.channels * self.dtype.itemsize
        if size > BAND_BYTES:
            raise ValueError(
                f"predict_file: {self.path} can be decoded only {self.band_rows} rows at a time, {size / 1e9:.1f} GB, expected "
                f"at most {BAND_BYTES / 1e9:.1f} GB; {advice}"
            )

    def _band(self, band: int) -> np.ndarray:
        """Decoded rows of pixels from band * band_rows on, (rows, width, channels)."""
        raise NotImplementedError


class ZarrPicture(BandedPicture):
    """A Zarr array, or the highest resolution of an OME-Zarr group. A chunk that is missing is, by its format, all fill value."""

    def __init__(self, path: Path, channels: int):
        zarr = imported("zarr", path)
        try:
            found = zarr.open(str(path), mode="r")
            if isinstance(found, zarr.Group):
                attributes = dict(found.attrs)
                scales = attributes.get("ome", attributes).get("multiscales")
                found = found[scales[0]["datasets"][0]["path"]]
        except Exception as error:
            raise ValueError(f"predict_file: {path} is a folder, expected one of Zarr: {error}") from error
        if not isinstance(found, zarr.Array):
            raise ValueError(f"predict_file: {path} is a group of Zarr, expected an array or a group of OME-Zarr")
        self._array = found
        super().__init__(path, found.shape, np.dtype(found.dtype), channels)
        self.band_rows = found.chunks[self.axes[int(self.channels_first)]]
        self.check_band("write it again in smaller chunks")

    def _band(self, band: int) -> np.ndarray:
        rows = slice(band * self.band_rows, min(self.height, (band + 1) * self.band_rows))
        index = [slice(None) if axis in self.axes else 0 for axis in range(self._array.ndim)]
        index[self.axes[int(self.channels_first)]] = rows
        try:
            found = np.asarray(self._array[tuple(index)])
        except Exception as error:
            raise ValueError(
                f"predict_file: {self.path} cannot be decoded from row {rows.start} to {rows.stop}: {error}"
            ) from error
        self.bytes_read += found.nbytes
        if found.ndim == 2:
            return found[:, :, None]
        return found.transpose(1, 2, 0) if self.channels_first else found


def open_tiff(path: Path, channels: int) -> Picture:
    """The highest resolution of a TIFF's first picture."""
    tifffile = imported("tifffile", path)
    # Of a file that is cut off, tifffile logs what is wrong and gives what is left.
    log, told = logging.getLogger("tifffile"), []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: told.append(record.getMessage())
    log.addHandler(handler)
    try:
        file = tifffile.TiffFile(path)
        try:
            series = file.series[0].levels[0]
            pages = [page if isinstance(page, tifffile.TiffPage) else page.aspage() for page in series.pages]
            for page in pages:
                check_length(path, max(offset + count for offset, count in zip(page.dataoffsets, page.databytecounts)))
            if not all(page.is_contiguous for page in pages):
                return TiffPicture(path, series.shape, np.dtype(series.dtype), channels, file, pages)
            stored, offsets = (
                np.dtype(series.dtype).newbyteorder(file.byteorder),
                [page.dataoffsets[0] for page in pages],
            )
            found = RawPicture(path, series.shape, stored, channels, offsets)
        except BaseException:
            file.close()
            raise
        file.close()
        return found
    except Exception as error:
        if told or not str(error).startswith("predict_file"):
            raise ValueError(f"predict_file: {path} is no whole TIFF: {(told or [error])[0]}") from error
        raise
    finally:
        log.removeHandler(handler)


class TiffPicture(BandedPicture):
    """A TIFF in tiles or strips: the channels are in a pixel, in planes of a page, or in pages of their own."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, channels: int, file, pages: list):
        super().__init__(path, shape, dtype, channels)
        self._file, self._pages, page = file, pages, pages[0]
        if len(pages) not in (1, channels if self.channels_first else 1):
            raise ValueError(
                f"predict_file: {path} has {len(pages)} pages of axes {page.axes}, expected one picture, YXS, SYX or CYX"
            )
        self.band_rows = page.tilelength if page.is_tiled else page.rowsperstrip
        self._wide = page.tilewidth if page.is_tiled else page.imagewidth
        self._across = -(-self.width // self._wide)
        self._down = -(-self.height // self.band_rows)
        self.check_band("write it again in tiles, as with tifffile.imwrite(path, picture, tile=(512, 512))")

    def _band(self, band: int) -> np.ndarray:
        rows = min(self.height, (band + 1) * self.band_rows) - band * self.band_rows
        out = np.empty((rows, self.width, self.channels), self.dtype)
        planes = range(self.channels) if self.channels_first else (slice(None),)
        for plane, channel in enumerate(planes):
            page = self._pages[plane if len(self._pages) > 1 else 0]
            first = ((0 if len(self._pages) > 1 else plane) * self._down + band) * self._across
            for column in range(self._across):
                tile = self._tile(page, first + column, band * self.band_rows, column * self._wide)
                x = slice(column * self._wide, min(self.width, (column + 1) * self._wide))
                if tile is None:  # left out, as its writer may where all of it is one value
                    out[:, x, channel] = page.nodata
                else:
                    tile = tile[0, :rows, : x.stop - x.start]
                    out[:, x, channel] = tile if isinstance(channel, slice) else tile[:, :, 0]
        return out

    def _tile(self, page, index: int, y: int, x: int) -> np.ndarray | None:
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            return None
        handle = self._file.filehandle
        handle.seek(offset)
        data = handle.read(count)
        self.bytes_read += len(data)
        try:
            return page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0]
        except Exception as error:
            missing = "imagecodecs" in str(error)
            raise (ImportError if missing else ValueError)(
                f"predict_file: {self.path} cannot be decoded at pixel ({y}, {x}), compressed by {page.compression.name}: {error}"
                + ("; pip install imagecodecs" if missing else "")
            ) from error

    def close(self) -> None:
        self._file.close()


def check_length(path: Path, expected: int) -> None:
    actual = path.stat().st_size
    if actual < expected:
        raise ValueError(
            f"predict_file: {path} has {actual} bytes, expected at least {expected}: it is cut off; copy it again"
        )


def imported(name: str, path: Path | None = None):
    """An optional package."""
    try:
        return __import__(name)
    except ImportError:
        what = f"{path} needs" if path is not None else "this needs"
        raise ImportError(f"predict_file: {what} {name}: pip install 'infsa-kernels[pictures]'") from None
