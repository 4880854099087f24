"""Small video files with a bar code in each frame, and byte patches that make them odd or hostile."""

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
    with av.open(str(path), "w", format=muxer, container_options=settings.get("container_options")) as container:
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
