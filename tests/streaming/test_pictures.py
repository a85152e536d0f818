"""Readers of pictures: the rows of every format, and one clear error for every file that is not one."""

import numpy as np
import pytest

from infsa_kernels.streaming import pictures
from infsa_kernels.streaming.pictures import open_picture

tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr", minversion="3")  # writes otherwise before; there is none for Python 3.10

H, W, C = 83, 61, 3


def picture(dtype="uint8", shape=(H, W, C)):
    rng = np.random.default_rng(0)
    return rng.random(shape, np.float32) if dtype == "float32" else rng.integers(0, 200, shape).astype(dtype)


def planes(x):
    return np.ascontiguousarray(x.transpose(2, 0, 1))


def ome_zarr(path, x, version):
    group = zarr.open_group(path, mode="w", zarr_format=version)
    whole = planes(x)[None, :, None]  # time, channel, depth, y, x
    for name, level in (("0", whole), ("1", whole[..., ::2, ::2])):
        made = group.create_array(name, shape=level.shape, chunks=(1, 1, 1, 32, 32), dtype=level.dtype)
        made[:] = level
    scales = {"multiscales": [{"datasets": [{"path": "0"}, {"path": "1"}]}]}
    group.attrs.update(scales if version == 2 else {"ome": scales})


def zarr_array(path, x, chunks):
    made = zarr.open_array(path, mode="w", shape=x.shape, chunks=chunks, dtype=x.dtype)
    made[:] = x


def pyramid(path, x):
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        tif.write(x, tile=(32, 32), subifds=1, photometric="rgb")
        tif.write(x[::2, ::2], tile=(32, 32), subfiletype=1, photometric="rgb")


TIFF = tifffile.imwrite
WRITE = {
    "npy": np.save,
    "npy-planes": lambda path, x: np.save(path, planes(x)),
    "npy-big-endian": lambda path, x: np.save(path, x.astype(x.dtype.newbyteorder(">"))),
    "tiff": lambda path, x: TIFF(path, x, photometric="rgb"),
    "tiff-big-endian": lambda path, x: TIFF(path, x, byteorder=">", photometric="rgb"),
    "tiff-tiles": lambda path, x: TIFF(path, x, tile=(16, 32), photometric="rgb"),
    "tiff-tiles-zlib": lambda path, x: TIFF(path, x, tile=(32, 16), compression="zlib", photometric="rgb"),
    "tiff-strips-zlib": lambda path, x: TIFF(path, x, rowsperstrip=7, compression="zlib", photometric="rgb"),
    "tiff-planes": lambda path, x: TIFF(path, planes(x), planarconfig="separate", photometric="rgb"),
    "tiff-planes-tiles": lambda path, x: TIFF(
        path, planes(x), tile=(32, 16), planarconfig="separate", photometric="rgb", compression="zlib"
    ),
    "tiff-pyramid": pyramid,
    "ome-tiff-pages": lambda path, x: TIFF(
        path, planes(x), ome=True, tile=(32, 32), metadata={"axes": "CYX"}, photometric="minisblack", compression="zlib"
    ),
    "ome-tiff-raw-pages": lambda path, x: TIFF(
        path, planes(x), ome=True, metadata={"axes": "CYX"}, photometric="minisblack"
    ),
    "zarr": lambda path, x: zarr_array(path, x, (20, 30, 3)),
    "zarr-planes": lambda path, x: zarr_array(path, planes(x), (1, 33, 61)),
    "ome-zarr-2": lambda path, x: ome_zarr(path, x, 2),
    "ome-zarr-3": lambda path, x: ome_zarr(path, x, 3),
}


@pytest.mark.parametrize("dtype", pictures.DTYPES)
@pytest.mark.parametrize("form", WRITE)
def test_rows_are_those_of_the_picture(form, dtype, tmp_path):
    x, path = picture(dtype), tmp_path / "picture.npy"  # what it is, its name does not say
    WRITE[form](path, x)
    found = open_picture(path, C)
    assert (found.height, found.width, found.channels, found.dtype) == (H, W, C, np.dtype(dtype))
    for begin in range(0, H, 12):
        strip = found.rows(begin, min(H, begin + 12))
        assert strip.dtype == found.dtype and np.array_equal(strip, x[begin : begin + 12])
    # Nothing is read twice; tiles at the right reach beyond the picture, and are compressed or not.
    assert found.bytes_read <= 1.6 * x.nbytes
    found.close()


@pytest.mark.parametrize("form", ["npy", "tiff", "tiff-strips-zlib", "zarr"])
def test_one_channel_needs_no_axis(form, tmp_path):
    x, path = picture(shape=(H, W)), tmp_path / "picture"
    with open(path, "wb") if form == "npy" else tmp_path.joinpath("unused").open("wb") as file:
        {
            "npy": lambda: np.save(file, x),
            "tiff": lambda: TIFF(path, x),
            "tiff-strips-zlib": lambda: TIFF(path, x, rowsperstrip=5, compression="zlib"),
            "zarr": lambda: zarr_array(path, x, (20, 30)),
        }[form]()
    found = open_picture(path, 1)
    assert np.array_equal(found.rows(3, 50), x[3:50, :, None])
    found.close()


def test_a_tile_that_was_left_out_is_no_data(tmp_path):
    x, path = picture(), tmp_path / "picture"
    x[32:64] = 0
    TIFF(path, x, tile=(32, 32), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as tif:
        counts = [0 if 2 <= i < 4 else n for i, n in enumerate(tif.pages[0].databytecounts)]
        tif.pages[0].tags["TileByteCounts"].overwrite(counts)
    found = open_picture(path, C)
    assert np.array_equal(found.rows(0, H), x)
    found.close()


@pytest.mark.parametrize("form", [form for form in WRITE if "zarr" not in form])
def test_a_file_that_is_cut_off_is_seen_before_anything_is_computed(form, tmp_path):
    path = tmp_path / "picture.npy"
    WRITE[form](path, picture())
    data = path.read_bytes()
    for length in (len(data) - 1 if form.startswith("npy") else len(data) // 2, len(data) // 2, 9):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"picture\.npy (has \d+ bytes, expected|is no whole TIFF|has no header)"):
            open_picture(path, C)


def test_a_tile_that_is_corrupt_is_named(tmp_path):
    path = tmp_path / "picture"
    WRITE["tiff-tiles-zlib"](path, picture())
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    found = open_picture(path, C)
    found.rows(0, 32)
    with pytest.raises(ValueError, match=r"cannot be decoded at pixel \(32, 16\), compressed by ADOBE_DEFLATE"):
        found.rows(32, 40)
    found.close()


def test_a_chunk_of_zarr_that_is_corrupt_is_named(tmp_path):
    path = tmp_path / "picture"
    WRITE["zarr"](path, picture())
    for chunk in path.glob("c/1/*/*"):
        chunk.write_bytes(b"\x07" * 20)
    found = open_picture(path, C)
    found.rows(0, 20)
    with pytest.raises(ValueError, match="cannot be decoded from row 20 to 40"):
        found.rows(19, 21)


@pytest.mark.parametrize("form", ["tiff-tiles-zlib", "zarr"])
def test_rows_that_only_come_in_masses_are_refused(form, tmp_path, monkeypatch):
    WRITE[form](tmp_path / "picture", picture())
    monkeypatch.setattr(pictures, "BAND_BYTES", 1000)
    with pytest.raises(ValueError, match=r"can be decoded only \d+ rows at a time, .* write it again in"):
        open_picture(tmp_path / "picture", C)


def test_a_compression_without_its_package_is_named(tmp_path):
    path = tmp_path / "picture"
    WRITE["tiff-tiles-zlib"](path, picture())
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags["Compression"].overwrite(tifffile.COMPRESSION.JPEG2000)
    try:
        import imagecodecs  # noqa: F401

        expected, words = ValueError, "compressed by JPEG2000"
    except ImportError:
        expected, words = ImportError, "pip install imagecodecs"
    found = open_picture(path, C)
    with pytest.raises(expected, match=words):
        found.rows(0, 5)
    found.close()


def test_what_is_no_picture_is_refused(tmp_path):
    def refused(words, error=ValueError, channels=C):
        with pytest.raises(error, match=words):
            open_picture(path, channels)

    path = tmp_path / "picture.npy"
    refused("No such file", FileNotFoundError)
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(r"begins with b'\\x89PNG.*expected \.npy, TIFF, OME-TIFF, Zarr or OME-Zarr")
    np.save(path, picture())
    refused(r"has shape \[83, 61, 3\], expected \(height, width, 4\) or \(4, height, width\)", channels=4)
    np.save(path, picture(shape=(H, W)))
    refused(r"has shape \[83, 61, 1\], expected \(height, width, 3\)")
    np.save(path, picture(shape=(2, H, W, C)))
    refused(r"has shape \[2, 83, 61, 3\]")
    np.save(path, picture(shape=(0, W, C)))
    refused("expected at least one pixel")
    for dtype in ("int16", "float64", "bool", "complex64"):
        np.save(path, picture().astype(dtype))
        refused(rf"holds {dtype}, expected uint8, uint16, float32")
    np.save(path, np.asfortranarray(picture()))
    refused("is in Fortran's order")
    np.save(path, np.array([{}]), allow_pickle=True)
    refused("holds object")
    path = tmp_path / "folder"
    path.mkdir()
    refused("is a folder, expected one of Zarr")
    zarr.open_group(path, mode="w")
    refused("is a folder, expected one of Zarr|is a group of Zarr")


def test_a_picture_that_was_changed_is_another(tmp_path):
    path = tmp_path / "picture.npy"
    np.save(path, picture())
    first = open_picture(path, C).identity()
    assert open_picture(path, C).identity() == first
    np.save(path, picture() + 1)
    assert open_picture(path, C).identity() != first
