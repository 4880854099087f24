"""Small video files with a bar code in each frame, and byte patches that make them odd or hostile."""

import os
import re
import struct
from fractions import Fraction

import numpy as np

BITS = 8
MARK = 0b10110001  # third row of the code; no mirroring or turning of the picture leaves it in place
DARK, BRIGHT = 40, 215


def barcode(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """[H, W] uint8: three rows of 8 blocks, the number, its complement and MARK, high bit left."""
    rows = [number & 0xFF, ~number & 0xFF, MARK]
    bits = np.array([[row >> (BITS - 1 - i) & 1 for i in range(BITS)] for row in rows])
    picture = np.where(bits, BRIGHT, DARK).astype(np.uint8)
    return picture[np.arange(height) * 3 // height][:, np.arange(width) * BITS // width]


def read_barcode(picture: np.ndarray) -> int:
    """The number in [H, W, 3]; -1 where the three rows do not agree."""
    height, width = picture.shape[:2]
    rows = [int((row + 0.5) * height / 3) for row in range(3)]
    columns = [int((column + 0.5) * width / BITS) for column in range(BITS)]
    bright = picture[np.ix_(rows, columns)].mean(-1) > (DARK + BRIGHT) / 2
    number, complement, mark = (int("".join("01"[int(bit)] for bit in row), 2) for row in bright)
    return number if complement == number ^ 0xFF and mark == MARK else -1


def encode(path, pictures, *, codec="libx264", pix_fmt="yuv420p", rate=25, options=None, muxer=None, **settings):
    """Writes [H, W] gray, [H, W, 3] RGB or [H, W, 4] RGBA pictures.

    Args:
        path: file to write, as str or Path.
        pictures: the frames.
        codec, pix_fmt, rate, options, muxer: as PyAV names them; muxer None goes by the file's name.
        settings: ``pts`` (seconds of each frame), ``packet_pts`` (of the packets in milliseconds, in the place of the
            encoder's), ``container_options``, ``context`` (attributes of the codec context).
    """
    import av

    pictures = list(pictures)
    height, width = pictures[0].shape[:2]
    container_options = {"fflags": "+bitexact"} | settings.get("container_options", {})  # no random name inside
    with av.open(str(path), "w", format=muxer, container_options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if "pts" in settings:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in settings.get("context", {}).items():
            setattr(stream.codec_context, name, value)
        packet_pts = iter(settings.get("packet_pts", ()))
        for number, picture in enumerate(pictures):
            frame = as_frame(picture, pix_fmt)
            frame.pts = number
            if "pts" in settings:
                frame.pts, frame.time_base = round(settings["pts"][number] * 1000), Fraction(1, 1000)
            mux(container, stream.encode(frame), packet_pts)
        mux(container, stream.encode(), packet_pts)
    return path


def as_frame(picture, pix_fmt: str):
    """An av.VideoFrame of the picture, or the frame itself where the caller made one."""
    import av

    if isinstance(picture, av.VideoFrame):
        return picture
    layout = {2: "gray", 3: "rgb24", 4: "rgba"}[picture.ndim + (picture.ndim == 3 and picture.shape[2] == 4)]
    return av.VideoFrame.from_ndarray(picture, format=layout).reformat(format=pix_fmt)


def mux(container, packets, packet_pts) -> None:
    for packet in packets:
        pts = next(packet_pts, None)
        if pts is not None:
            packet.pts = pts
        container.mux(packet)


def barcode_video(path, frames: int = 12, size: tuple[int, int] = (64, 48), **settings):
    """``frames`` numbered pictures of ``size`` (width, height)."""
    return encode(path, (barcode(number, *size) for number in range(frames)), **settings)


def silence(container) -> list:
    """Adds a sound stream to an open container and returns its packets, an eighth of a second."""
    import av

    stream = container.add_stream("aac", rate=8000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    return [*stream.encode(frame), *stream.encode()]


def sound_only(path):
    import av

    with av.open(str(path), "w") as container:
        container.mux(silence(container))
    return path


def cover_only(path):
    """Sound with a cover picture, as music players store it."""
    import av
    from av.stream import Disposition

    with av.open(str(path), "w") as container:
        sound = silence(container)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(as_frame(barcode(0), "yuvj420p")))
        container.mux(sound)
    return path


def patch(path, where: bytes, offset: int, layout: str, *values):
    """Overwrites bytes at ``offset`` after the last occurrence of ``where`` in the file."""
    data = bytearray(path.read_bytes())
    at = data.rindex(where) + len(where) + offset
    struct.pack_into(layout, data, at, *values)
    path.write_bytes(data)
    return path


def point_elsewhere(path, target):
    """Makes a mov's only track lie in another file, by the alias of an old Macintosh in its data reference."""
    data = bytearray(path.read_bytes())
    name = os.fsencode(target)
    alias = bytes(10) + bytes(28) + bytes(12) + bytes([len(target.name)]) + os.fsencode(target.name).ljust(63, b"\0")
    alias += bytes(16) + struct.pack(">HH", 1, 1) + bytes(16) + struct.pack(">HH", 2, len(name)) + name
    alias += bytes(len(name) % 2) + b"\xff\xff\0\0"
    at = data.index(b"dref") + 12  # of the one reference
    (old,) = struct.unpack_from(">I", data, at)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        where = data.rindex(box, 0, at) - 4
        struct.pack_into(">I", data, where, struct.unpack_from(">I", data, where)[0] + len(entry) - old)
    data[at : at + old] = entry
    path.write_bytes(data)
    return path


def set_matrix(path, a: int, b: int, c: int, d: int):
    """The 2x2 part of an mp4 track's display matrix: x' = a x + c y, y' = b x + d y."""
    one = 1 << 16
    return patch(path, b"tkhd", 40, ">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)


def only_subtitles(path):
    """Turns the video track of a matroska file into a subtitle track."""
    return patch(path, b"\x83\x81\x01", -1, "B", 0x11)


def cut(path, fraction: float):
    """Keeps the first part of the file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def drop_box(path, kind: bytes, *, zero: bool = False):
    """Removes a top-level mp4 box, or fills its payload with zeros."""
    data = path.read_bytes()
    at = data.index(kind) - 4
    size = int.from_bytes(data[at : at + 4])
    path.write_bytes(data[:at] + ((data[at : at + 8] + bytes(size - 8)) if zero else b"") + data[at + size :])
    return path


# --- mutations --------------------------------------------------------------------------------------------------------

BOXES = b"""
    ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf vmhd dinf dref stbl stsd stts ctts stsc stsz stco stss sgpd
    sbgp avc1 avcC hvc1 hev1 hvcC av01 av1C apch pasp colr fiel btrt mvex trex moof mfhd traf tfhd tfdt trun mdat mfra
    tfra mfro free udta meta ilst
"""
CHUNKS = b"RIFF LIST avih strl strh strf vprp movi 00dc idx1 INFO ISFT JUNK odml dmlh indx ix00"
ELEMENTS = """
    1a45dfa3 4286 4282 18538067 114d9b74 4dbb 1549a966 2ad7b1 4489 1654ae6b ae d7 73c5 83 86 63a2 23e383 e0 b0 ba 53c0
    55b0 1f43b675 e7 a3 a0 a1 75a1 a6 ee a5 1c53bb6b bb b3 b7 f1 1254c367 63c0 67c8
"""


def _any_of(names: list[bytes]) -> bytes:
    return b"|".join(map(re.escape, names))


# by demuxer: a header with its length field as groups "head" and "size"
HEADERS = {
    "mov": rb"(?=(?P<head>(?P<size>.{4})(?:" + _any_of(BOXES.split()) + rb").{8}))",
    "avi": rb"(?=(?P<head>(?:" + _any_of(CHUNKS.split()) + rb")(?P<size>.{4})))",
    "matroska": rb"(?=(?P<head>(?:" + _any_of(list(map(bytes.fromhex, ELEMENTS.split()))) + rb")(?P<size>.)))",
    "mpegts": rb"(?=(?P<head>G[\x00\x01\x40\x41\x50].(?P<size>.{3})))",
    "mpeg": rb"(?=(?P<head>\x00\x00\x01[\xb0-\xff](?P<size>.{2})))",
}
FORMATS = {
    "mp4": "mov",
    "mov": "mov",
    "avi": "avi",
    "mkv": "matroska",
    "webm": "matroska",
    "ts": "mpegts",
    "mpg": "mpeg",
}
PIECES = [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\0\1"]
STRUCTURE = 4000  # bytes at the start, where most headers are
MAGIC = 4  # bytes that stay: what is no video at all has tests of its own


def mutated(data: bytes, name: str, other: bytes, draw: np.random.Generator) -> bytes:
    """The bytes of a video after a few random faults, seldom many.

    Args:
        data: a whole file.
        name: its name, whose ending says which headers it has.
        other: a file whose parts may be put into it.
        draw: makes every choice.
    """
    out = bytearray(data)
    headers = [
        match.span("head") + match.span("size") for match in re.finditer(HEADERS[_format(name)], data, re.DOTALL)
    ]
    for _ in range(min(30, int(draw.geometric(0.4)))):
        at = int(draw.integers(MAGIC, max(MAGIC + 1, min(len(out), STRUCTURE) if draw.random() < 0.6 else len(out))))
        fault = FAULTS[int(draw.integers(len(FAULTS)))]
        fault(out, at, draw, headers=headers, other=other)
    return bytes(out)


def _format(name: str) -> str:
    return FORMATS[name.rpartition(".")[2]]


def _length(draw, most: int = 512) -> int:
    """Of a stretch: short ones as often as long ones."""
    return int(2 ** draw.uniform(0, np.log2(most)))


def _byte(out, at, draw, **_) -> None:
    out[at : at + 1] = bytes([draw.integers(256)])


def _bit(out, at, draw, **_) -> None:
    if at < len(out):
        out[at] ^= 1 << int(draw.integers(8))


def _piece(out, at, draw, **_) -> None:
    out[at : at + 4] = PIECES[draw.integers(len(PIECES))]


def _removed(out, at, draw, **_) -> None:
    del out[at : at + _length(draw)]


def _truncated(out, at, draw, **_) -> None:
    """The end is missing; seldom more than half."""
    del out[max(at, int(len(out) * draw.uniform(0.3, 1))) :]


def _zeroed(out, at, draw, **_) -> None:
    stretch = out[at : at + _length(draw)]
    out[at : at + len(stretch)] = bytes(len(stretch))


def _noise(out, at, draw, **_) -> None:
    stretch = out[at : at + _length(draw)]
    out[at : at + len(stretch)] = draw.bytes(len(stretch))


def _doubled(out, at, draw, **_) -> None:
    stretch = out[at : at + _length(draw)]
    out[at:at] = stretch * int(draw.choice([1, 1, 1, 2, 40]))


def _swapped(out, at, draw, **_) -> None:
    length = _length(draw)
    first, second = sorted((at, int(draw.integers(MAGIC, max(MAGIC + 1, len(out))))))
    a, b = out[first : first + length], out[second : second + length]
    if first + length <= second:
        out[second : second + length], out[first : first + length] = a, b


def _spliced(out, at, draw, *, other: bytes, **_) -> None:
    """A part of another video, over what was there or in between."""
    start, length = int(draw.integers(len(other))), _length(draw, 2048)
    part = other[start : start + length]
    out[at : at + (len(part) if draw.random() < 0.5 else 0)] = part


def _header(draw, headers: list) -> tuple[int, int, int, int]:
    """Start and end of a header, and of its length field, as they were in the whole file."""
    return headers[int(draw.integers(len(headers)))]


def _repeated_header(out, at, draw, *, headers, **_) -> None:
    """A header and what follows it, once more: behind itself or elsewhere."""
    start, end, *_ = _header(draw, headers)
    part = out[start : end + _length(draw, 128)]
    where = start if draw.random() < 0.5 else at
    out[where:where] = part * int(draw.choice([1, 1, 2, 40]))


def _wrong_size(out, at, draw, *, headers, **_) -> None:
    """A length field of nothing, one, next to true, huge or anything."""
    *_, start, end = _header(draw, headers)
    true = int.from_bytes(out[start:end])
    top = (1 << 8 * (end - start)) - 1
    values = [0, 1, true - 1, true + 1, top // 2, top - 1, top, int(draw.integers(top)), 8, 16]
    out[start:end] = (values[int(draw.integers(len(values)))] & top).to_bytes(end - start)


FAULTS = [_byte, _bit, _piece, _removed, _truncated, _zeroed, _noise, _doubled, _swapped, _spliced]
FAULTS += [_repeated_header, _wrong_size, _wrong_size]
