"""Folders of pictures as videos: the pixels, and that every bad picture is a one-line error that names it."""

import hashlib
import io
import os
import zlib

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin, PngImagePlugin

from sdr.decoding import Limits
from sdr.errors import SDRError
from sdr.frame_lists import open_frames

SHAPE = (6, 4, 10, 3)  # [T, H, W, 3]


def coded(frame: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


@pytest.fixture
def files(tmp_path, frames):
    paths = [tmp_path / f"{number:03d}.png" for number in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        path.write_bytes(coded(frame))
    return paths


def refusal(tmp_path, files, **limits) -> SDRError:
    with pytest.raises(SDRError) as error, open_frames(tmp_path, files, limits=Limits(**limits)) as video:
        for _ in video.frames():
            pass
    assert "\n" not in str(error.value)
    return error.value


def test_frames_come_back_bit_for_bit(tmp_path, files, frames):
    with open_frames(tmp_path, files) as video:
        assert (video.path, video.decoder, video.frames_read, video.damage) == (tmp_path, "frames", 0, "")
        assert (video.info.width, video.info.height, video.info.frames_declared) == (10, 4, 6)
        for _ in range(2):  # a second pass is for cutting
            seconds, pictures = zip(*video.frames(), strict=True)
            np.testing.assert_array_equal(np.stack(pictures), frames)
            assert seconds == tuple(i / 25 for i in range(6))
        assert video.frames_read == 6
        assert all(p.dtype == np.uint8 and p.flags.writeable and p.flags.c_contiguous for p in pictures)
        assert video.sha256 == hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def test_the_given_order_counts(tmp_path, files, frames):
    with open_frames(tmp_path, files[::-1]) as video:
        np.testing.assert_array_equal(np.stack([frame for _, frame in video.frames()]), frames[::-1])


@pytest.mark.parametrize("kind", ["grey", "alpha", "palette", "palette with a transparent colour", "one bit"])
def test_kinds_of_pixels(tmp_path, kind):
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    rgba = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    palette = Image.fromarray((grey % 3).astype(np.uint8)).convert("P")
    palette.putpalette([1, 2, 3, 40, 50, 60, 255, 0, 9])
    colours = np.array([[1, 2, 3], [40, 50, 60], [255, 0, 9]], np.uint8)[grey % 3]
    pictures = {
        "grey": (Image.fromarray(grey), {}, grey[..., None].repeat(3, -1)),
        "alpha": (Image.fromarray(rgba), {}, rgba[..., :3]),
        "palette": (palette, {}, colours),
        "palette with a transparent colour": (palette, {"transparency": b"\x80\x00\xff"}, colours),
        "one bit": (Image.fromarray(grey > 99), {}, None),
    }
    image, options, expected = pictures[kind]
    image.save(tmp_path / "0.png", **options)
    if expected is None:
        assert "0.png: has pixels of kind 1, not one of RGB" in str(refusal(tmp_path, [tmp_path / "0.png"]))
        return
    with open_frames(tmp_path, [tmp_path / "0.png"]) as video:
        np.testing.assert_array_equal(next(video.frames())[1], expected)


def test_jpeg_is_told_by_its_bytes(tmp_path):
    flat = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    (tmp_path / "0.png").write_bytes(coded(flat, "JPEG", quality=95))
    with open_frames(tmp_path, [tmp_path / "0.png"]) as video:
        assert video.info.codec == "jpeg"
        assert np.abs(next(video.frames())[1].astype(int) - flat).max() <= 3


def test_every_truncation_and_flipped_byte_of_a_png_is_seen(tmp_path, frames):
    data = coded(frames[0])
    path = tmp_path / "0.png"
    end = len(data) - 12  # of the pixels: the last chunk holds none, only its name matters
    damaged = [data[:n] for n in range(end + 8)]
    damaged += [data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :] for i in (*range(end), *range(end + 4, end + 8))]
    assert len(damaged) > 300
    for content in damaged:
        path.write_bytes(content)
        error = refusal(tmp_path, [path])
        assert error.file == path


def test_every_truncation_of_a_jpeg_is_seen(tmp_path):
    frame = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = coded(frame, "JPEG", quality=90)
    path = tmp_path / "0.jpg"
    for size in range(0, len(data) - 64, 7):
        path.write_bytes(data[:size])
        assert refusal(tmp_path, [path]).file == path


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM"])
def test_other_formats_are_refused(tmp_path, frames, kind):
    (tmp_path / "0.png").write_bytes(coded(frames[0], kind))
    assert "0.png: is neither PNG nor JPEG" in str(refusal(tmp_path, [tmp_path / "0.png"]))


def test_no_other_decoder_is_loaded(tmp_path, files, monkeypatch):
    def never(*args, **options):
        raise AssertionError("the formats Pillow knows were tried")

    monkeypatch.setattr(Image, "open", never)
    with open_frames(tmp_path, files) as video:
        assert len(list(video.frames())) == 6


def test_one_bad_picture_in_the_middle_is_named(tmp_path, files, frames):
    files[3].write_bytes(coded(frames[0])[:60])
    with open_frames(tmp_path, files) as video:
        with pytest.raises(SDRError, match=r"003\.png: cannot be decoded"):
            list(video.frames())
        assert video.frames_read == 0


def test_a_changing_size_is_refused(tmp_path, files, frames):
    files[2].write_bytes(coded(frames[2].transpose(1, 0, 2)))
    message = str(refusal(tmp_path, files))
    assert message.endswith("002.png: picture changes from (10, 4) to (4, 10) pixels")


@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "empty", "dangling link", "null"])
def test_only_regular_files_are_opened(tmp_path, files, what):
    bad = files[4]
    bad.unlink()
    {
        "missing": lambda: None,
        "folder": bad.mkdir,
        "pipe": lambda: os.mkfifo(bad),
        "empty": lambda: bad.write_bytes(b""),
        "dangling link": lambda: bad.symlink_to(tmp_path / "nowhere"),
        "null": lambda: files.__setitem__(4, tmp_path / "a\0b"),
    }[what]()
    with pytest.raises(SDRError) as error:
        open_frames(tmp_path, files)
    assert error.value.file == files[4]


def test_a_link_to_a_picture_is_followed(tmp_path, files):
    (tmp_path / "link.png").symlink_to(files[0])
    with open_frames(tmp_path, [tmp_path / "link.png"]) as video:
        assert len(list(video.frames())) == 1


@pytest.mark.parametrize("when", ["hashed", "decoded"])
def test_a_file_that_changes_is_refused(tmp_path, files, frames, when):
    with open_frames(tmp_path, files) as video:
        files[5].write_bytes(coded(frames[5]) + b"more")
        with pytest.raises(SDRError, match=r"005\.png: changed while it was being read"):
            _ = video.sha256 if when == "hashed" else list(video.frames())


def test_limits(tmp_path, files, monkeypatch):
    size = sum(f.stat().st_size for f in files)
    assert refusal(tmp_path, files, max_bytes=size - 1).what == f"{size} bytes are over the limit of {size - 1}"
    assert refusal(tmp_path, files, max_frames=5).what == "6 frames are over the limit of 5"
    assert refusal(tmp_path, files, max_pixels=39).what == "10 x 4 pixels are over the limit of 39"
    with open_frames(tmp_path, files, limits=Limits(max_bytes=size, max_frames=6, max_pixels=40)) as video:
        assert len(list(video.frames())) == 6
    assert refusal(tmp_path, files, seconds=1e-9).what == "not decoded within 1e-09 s"


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_pixels_are_counted_before_they_are_decoded(tmp_path, frames, monkeypatch, kind):
    def never(*args):
        raise AssertionError("decoded")

    data = bytearray(coded(frames[0], kind.upper()))
    if kind == "png":
        data[16:24] = (60_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    else:
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = (60_000).to_bytes(2, "big") * 2
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", never)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", never)
    (tmp_path / "0.png").write_bytes(data)
    assert "0.png: 60000 x 60000 pixels are over the limit" in str(refusal(tmp_path, [tmp_path / "0.png"]))


def test_a_compressed_text_cannot_grow_without_limit(tmp_path, frames):
    text = PngImagePlugin.PngInfo()
    text.add_text("k", "x" * 5_000_000, zip=True)
    (tmp_path / "0.png").write_bytes(coded(frames[0], pnginfo=text))
    assert "0.png: cannot be decoded: Decompressed data too large" in str(refusal(tmp_path, [tmp_path / "0.png"]))


def test_no_frame_is_an_error(tmp_path):
    with pytest.raises(SDRError, match="has no frames"):
        open_frames(tmp_path, [])


def test_faces_are_detected_as_in_a_video(tmp_path, files):
    from sdr.detectors import Faces
    from sdr.faces import detect_faces

    class Nobody:
        name = "nobody"

        def __call__(self, frame):
            assert frame.shape == SHAPE[1:]
            return Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))

    for _ in range(2):  # the second time from the cache
        with open_frames(tmp_path, files) as video:
            found = detect_faces(video, Nobody(), cache=tmp_path / "cache", progress=lambda n: None)
        assert (len(found.faces), found.frames_read, found.damage) == (6, 6, "")
    assert len(list((tmp_path / "cache").iterdir())) == 1
