"""Decoding: any file becomes RGB pixels or a named cause, before it can fill the memory."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from nfjax.data.decoding import crops, decode, jpeg

PHOTO = load_sample_image("china.jpg")  # [427, 640, 3]


def encoded(pixels=PHOTO, kind="JPEG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def in_three_scans():
    """A baseline JPEG whose three components each have a scan, made of three grey JPEGs."""
    planes = [encoded(plane, quality=85) for plane in Image.fromarray(PHOTO).convert("YCbCr").split()]
    begins = [plane.index(b"\xff\xda") for plane in planes]
    sizes = [plane.index(b"\xff\xc0") for plane in planes]
    frame = bytearray(planes[0][sizes[0] : sizes[0] + 10])
    frame[2:4], frame[9] = (17).to_bytes(2), 3
    head = planes[0][: sizes[0]] + bytes(frame) + b"".join(bytes([i, 0x11, 0]) for i in (1, 2, 3))
    tables = planes[0][sizes[0] + 13 : begins[0]]
    scans = [
        plane[at : at + 5] + bytes([i]) + plane[at + 6 : -2]
        for i, (plane, at) in enumerate(zip(planes, begins, strict=True), 1)
    ]
    return head + tables + b"".join(scans) + planes[0][-2:]


@pytest.fixture(params=["libjpeg-turbo 3", "simplejpeg"])
def decoder(request, monkeypatch):
    """Both ways of decoding a JPEG."""
    if request.param == "simplejpeg":
        monkeypatch.setattr(decode, "_region_decoder", lambda: None)
    else:
        assert jpeg.library() is not None, "a development installation has the turbojpeg package"


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_what_pillow_makes_of_it(decoder, subsampling, progressive):
    data = encoded(quality=85, subsampling=subsampling, progressive=progressive)
    assert decode.size(data) == (427, 640)
    np.testing.assert_array_equal(decode.decode(data), pillow(data))


@pytest.mark.parametrize("factor", [1, 2])
def test_damage_in_the_middle_of_a_jpeg_is_found_whatever_the_region(decoder, factor):
    """Overwritten bytes garble the rows behind them, and are noticed only where the data ends."""
    data, rng = encoded(quality=85), np.random.default_rng(0)
    for place in (0.2, 0.5, 0.8):
        damaged = bytearray(data)
        at = int(place * len(data))
        damaged[at : at + 16] = rng.integers(0, 255, 16, dtype=np.uint8).tobytes()
        for top in (0, 200, 320):
            with pytest.raises(decode.BadImageError, match="damaged JPEG"):
                decode.region(bytes(damaged), (top, 80, 104, 160), factor)


def test_a_file_that_was_checked_before_gives_the_same_pixels(decoder):
    data = encoded(quality=85, subsampling="4:2:0")
    for box, factor in (((0, 0, 64, 640), 1), ((96, 32, 160, 320), 2), ((200, 0, 227, 64), 1)):
        whole = decode.region(data, box, factor).copy()
        np.testing.assert_array_equal(decode.region(data, box, factor, checked=True), whole)


def test_scans_of_one_component_each(decoder):
    """Baseline, not progressive, and yet every row of the third component comes behind all rows of the first."""
    data = in_three_scans()
    whole = pillow(data)
    np.testing.assert_array_equal(decode.decode(data), whole)
    for checked in (False, True):
        np.testing.assert_array_equal(decode.region(data, (16, 8, 20, 30), 1, checked), whole[16:36, 8:38])


def test_regions_are_cut_out_of_the_whole(decoder):
    rng = np.random.default_rng(0)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        data = encoded(quality=90, subsampling=subsampling)
        whole = pillow(data)
        for _ in range(40):
            top, left = rng.integers(0, 426), rng.integers(0, 639)
            height, width = rng.integers(1, 428 - top), rng.integers(1, 641 - left)
            region = decode.region(data, (int(top), int(left), int(height), int(width)), 1)
            np.testing.assert_array_equal(region, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_regions(decoder, factor):
    data = encoded(quality=90, subsampling="4:2:0")
    whole = decode.region(data, (0, 0, 427, 640), factor).copy()
    assert whole.shape == (-(-427 // factor), 640 // factor, 3)
    middle = decode.region(data, (160, 80, 80, 160), factor)
    places = whole[160 // factor : 240 // factor, 80 // factor : 240 // factor]
    np.testing.assert_array_equal(middle, places)
    exact = pillow(data)[160:240, 80:240].reshape(80 // factor, factor, 160 // factor, factor, 3).mean((1, 3))
    assert np.abs(middle - exact).mean() < 4


def test_both_decoders_agree():
    data = encoded(quality=70)
    ours = jpeg.RegionDecoder()(data, 20, 30, 100, 90, 2, checked=False)
    np.testing.assert_array_equal(ours, jpeg.WholeDecoder()(data, 20, 30, 100, 90, 2, checked=False))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP")],
)
def test_other_modes_and_formats_become_rgb(decoder, mode, kind):
    data = encoded(Image.fromarray(PHOTO).convert(mode), kind)
    np.testing.assert_array_equal(decode.decode(data), pillow(data))


def test_cmyk_at_a_reduced_scale():
    data = encoded(Image.fromarray(PHOTO).convert("CMYK"), quality=95)
    reduced = decode.region(data, (0, 0, 427, 640), 2)
    assert reduced.shape == (214, 320, 3)
    assert np.abs(reduced[:213] - pillow(data)[:426].reshape(213, 2, 320, 2, 3).mean((1, 3))).max() <= 0.75


def test_sixteen_bits_keep_their_high_byte():
    deep = np.array([[0, 255, 256], [40_000, 65_535, 511]], np.uint16)
    pixels = decode.decode(encoded(Image.fromarray(deep), "PNG"))
    np.testing.assert_array_equal(pixels[..., 0], [[0, 0, 1], [156, 255, 1]])
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode.decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20), (20, 20_000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extreme_shapes(decoder, size, kind):
    assert decode.decode(encoded(Image.new("RGB", size, (9, 9, 9)), kind)).shape == (size[1], size[0], 3)


def test_a_region_of_a_png_is_cut_out_and_not_reduced():
    data = encoded(kind="PNG")
    np.testing.assert_array_equal(decode.region(data, (5, 6, 7, 8), 1), PHOTO[5:12, 6:14])
    with pytest.raises(ValueError, match="factor=2: only a JPEG"):
        decode.region(data, (0, 0, 8, 8), 2)


GOOD = encoded(quality=80)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty file"),
        (b"no image at all", "no image"),
        (GOOD[:2000], "truncated JPEG"),
        (GOOD[: len(GOOD) // 2], "truncated JPEG"),
        (GOOD[:-2], "truncated JPEG"),
        (GOOD[:20] + GOOD[-2:], "damaged JPEG"),
        (GOOD[: len(GOOD) // 3] + GOOD[-2:], "damaged JPEG"),
        (encoded(kind="PNG")[:5000], "damaged image"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "unknown range of values"),
    ],
)
def test_causes(decoder, data, cause):
    with pytest.raises(decode.BadImageError) as caught:
        decode.decode(data)
    assert caught.value.cause == cause


def test_what_follows_the_end_of_a_jpeg_does_no_harm(decoder):
    np.testing.assert_array_equal(decode.decode(GOOD + bytes(5000)), pillow(GOOD))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_they_are_decoded(kind):
    data = bytearray(encoded(Image.new("RGB", (8, 8)), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = (60_000).to_bytes(2) * 2
    else:
        import zlib

        data[16:24] = (60_000).to_bytes(4) * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    for function in (decode.size, decode.decode):
        with pytest.raises(decode.BadImageError, match="too many pixels"):
            function(bytes(data))


def test_files_too_large_are_not_decoded(monkeypatch):
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    with pytest.raises(decode.BadImageError, match=r"too large: .* bytes, at most 100 are read"):
        decode.size(GOOD)


def test_threads_do_not_share_a_buffer():
    import concurrent.futures

    shades = [encoded(Image.new("RGB", (300, 200), (i, i, i))) for i in range(0, 256, 4)]
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        for expected, pixels in enumerate(executor.map(lambda data: decode.decode(data).copy(), shades * 4)):
            assert np.abs(pixels.astype(int) - expected % 64 * 4).max() <= 1


@pytest.mark.parametrize("maxval", [1, 15, 255, 1000, 1023, 4095, 65_535])
@pytest.mark.parametrize("kind", [b"P2", b"P5", b"P3", b"P6"])
def test_pgm_and_ppm_of_any_depth(kind, maxval):
    """Levels are shares of the largest, and of 16 bits the high byte is kept, as of a PNG."""
    levels = np.linspace(0, maxval, 12).round().astype(int)
    values = np.repeat(levels, 3) if kind in (b"P3", b"P6") else levels
    if kind in (b"P2", b"P3"):
        raster = " ".join(map(str, values)).encode()
    else:
        raster = values.astype(">u2" if maxval > 255 else np.uint8).tobytes()
    pixels = decode.decode(kind + b"\n# a comment\n4 3\n%d\n" % maxval + raster)
    assert pixels.shape == (3, 4, 3)
    if kind in (b"P2", b"P5") and maxval > 255:
        expected = np.round(levels / maxval * 65_535).astype(int) >> 8
    else:
        expected = np.round(levels / maxval * 255)
    np.testing.assert_array_equal(pixels.reshape(-1, 3), np.stack([expected] * 3, axis=-1))
    assert pixels[0, 0, 0] == 0
    assert pixels[2, 3, 0] == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_the_same_in_every_format(kind):
    deep = np.random.default_rng(0).integers(0, 65_536, (5, 7), dtype=np.uint16)
    pixels = decode.decode(encoded(Image.fromarray(deep), kind))
    np.testing.assert_array_equal(pixels, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=-1))


@pytest.fixture
def no_programs(monkeypatch):
    """Fails where Pillow starts a program."""
    import subprocess

    def started(*args, **kwargs):
        raise AssertionError(f"{args} was started")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, started)
    monkeypatch.setattr("os.system", started)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\n0 0 20 10 rectfill showpage\n%%EOF\n"


def test_postscript_starts_no_program(no_programs, tmp_path, monkeypatch):
    """Pillow gives Encapsulated PostScript to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(tmp_path / "gs"))
    with pytest.raises(AssertionError, match="was started"), Image.open(io.BytesIO(EPS)) as image:
        image.load()  # the trap works
    with pytest.raises(decode.BadImageError, match=r"no image: of a format that is read: JPEG, PNG, GIF"):
        decode.size(EPS)
    with pytest.raises(decode.BadImageError, match="no image"):
        decode.region(EPS, (0, 0, 10, 20), 1)
    with pytest.raises(decode.BadImageError, match="no image"):
        crops.CentreCrop(8, 8, upright=True)(EPS)


def test_only_listed_formats_are_opened():
    """XBM and MSP are no formats of photographs; IPTC, for one, opens what it holds with any plugin."""
    grey = Image.new("L", (8, 8), 9)
    for kind in ("XBM", "MSP", "SPIDER", "PCX"):
        buffer = io.BytesIO()
        (grey.convert("1") if kind in ("XBM", "MSP") else grey).save(buffer, kind)
        if kind == "PCX":
            assert decode.decode(buffer.getvalue())[0, 0].tolist() == [9, 9, 9]
        else:
            with pytest.raises(decode.BadImageError, match="no image"):
                decode.decode(buffer.getvalue())


@pytest.mark.parametrize(
    "kind", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "DIB", "ICO", "QOI", "SGI", "TGA"]
)
def test_every_format_that_is_listed(kind):
    from nfjax.data.decoding import formats

    image = Image.fromarray(PHOTO[:48, :64])
    options = {"lossless": True} if kind == "WEBP" else {"sizes": [(64, 48)]} if kind == "ICO" else {}
    data = encoded(image, kind, **options)
    np.testing.assert_array_equal(decode.decode(data), pillow(data))
    assert kind in formats.FORMATS
    # DIB, SGI and TGA have no first bytes that tell; they go by their ending, and so do icons.
    assert formats.begins_like_one(data[: formats.SNIFFED]) == (kind not in ("DIB", "SGI", "TGA", "ICO"))
