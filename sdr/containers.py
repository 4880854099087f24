"""What kind of video a file is, and how far it says that it reaches, by its bytes alone."""

import os
import re

from sdr.errors import SDRError

HEAD_BYTES = 4096  # of the file, to tell what it is
BOX_TYPES = b"ftyp moov mdat moof free skip wide pnot styp sidx emsg uuid".split()
REFUSED = (  # what else a file may be, by its first bytes
    (b"\x89PNG", "PNG image"),
    (b"GIF8", "GIF image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"\x7fELF", "ELF program"),
    (b"MZ", "Windows program"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"%PDF", "PDF document"),
    (b"FLV", "Flash video"),
    (b"OggS", "Ogg file"),
    (b"0&\xb2u\x8ef\xcf\x11", "ASF (wmv, wma) file"),
    (b"RIFF", "RIFF file other than avi"),
    (b"ID3", "MP3 file"),
    (b"fLaC", "FLAC file"),
    (b"#EXTM3U", "HLS playlist"),
    (b"ffconcat", "ffconcat playlist"),
    (b"v=0", "SDP session description"),
    (b"[playlist]", "playlist"),
)
SUPPORTED = "supported: mp4, mov, mkv, webm, avi, MPEG transport and program streams"


def demuxer_of(path, fd: int) -> str:
    """FFmpeg's name of the demuxer, by the first bytes alone; raises SDRError with what the file looks like."""
    head = os.pread(fd, HEAD_BYTES, 0)
    if head[4:8] in BOX_TYPES:
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"AVIX", b"AVI\x19"):
        return "avi"
    if head.startswith(b"\x00\x00\x01\xba"):
        return "mpeg"
    if _packet_bytes(head):
        return "mpegts"
    raise SDRError(path, f"not a video but {_looks_like(head)}", SUPPORTED)


def _packet_bytes(head: bytes) -> int:
    """Of an MPEG transport stream: 188, 192 with a time before each, 204 with a check sum after each; 0: it is none."""
    for start, step in ((0, 188), (4, 192), (0, 204)):
        if head[start::step][:3] == b"GGG":
            return step
    return 0


def _looks_like(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, kind in REFUSED:
        if start.startswith(magic):
            return f"a file that looks like: {kind}"
    if b"<MPD" in head:
        return "a file that looks like: DASH playlist"
    if not head.strip(b"\0"):
        return "zero bytes"
    text = head.decode("utf-8", "ignore")
    return "text" if text.isprintable() or not re.search(r"[^\s\x20-\U0010ffff]", text) else "unknown data"


def bytes_missing(fd: int, demuxer: str) -> int:
    """How far the container's own lengths reach beyond the end of the file; 0 where it declares none."""
    if demuxer == "mpegts":
        return -os.fstat(fd).st_size % _packet_bytes(os.pread(fd, HEAD_BYTES, 0))
    walk = {"mov": _last_box_end, "avi": _last_riff_end, "matroska": _segment_end}.get(demuxer)
    return max(0, walk(fd) - os.fstat(fd).st_size) if walk else 0


MAX_CHUNKS = 20_000  # top-level boxes that are walked; two in each fragment


def _last_box_end(fd: int) -> int:
    end, size_of_file = 0, os.fstat(fd).st_size
    for _ in range(MAX_CHUNKS):
        if end >= size_of_file:  # a length of 64 bits may lead beyond what any file can have
            break
        head = os.pread(fd, 16, end)
        size = int.from_bytes(head[:4])
        if size == 1:
            size = int.from_bytes(head[8:16])
        if len(head) < 8 or size < 8 or head[4:8] not in BOX_TYPES:
            break
        end += size
    return end


def _last_riff_end(fd: int) -> int:
    end = 0
    for _ in range(MAX_CHUNKS):
        head = os.pread(fd, 8, end)
        if len(head) < 8 or not head.startswith(b"RIFF"):
            break
        end += 8 + int.from_bytes(head[4:], "little")
    return end


def _segment_end(fd: int) -> int:
    head = os.pread(fd, HEAD_BYTES, 0)
    offset = 0
    for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if not head.startswith(identifier, offset) or offset + 12 > len(head):
            return 0
        length = 9 - head[offset + 4].bit_length()  # of the size field: its leading zero bits + 1
        value = int.from_bytes(head[offset + 4 : offset + 4 + length]) & ((1 << 7 * length) - 1)
        if length > 8 or value == (1 << 7 * length) - 1:  # all ones: unknown, as in a live recording
            return 0
        offset += 4 + length + value
    return offset
