"""Spoiling what files of a clip mean, for `fuzz_cases.py`: landmarks, images, features and jobs.

Every function takes a file's content and a seeded generator and returns the content spoiled and what was done: numbers,
fields of headers and types change, in files that are otherwise valid.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Rng = random.Random
Spoiled = tuple[bytes, str]

SIZES = (0, 1, 2, 7, 47, 48, 64, 65, 255, 4096, 16384, 30000, 65535)
NUMBERS = (
    "nan", "NAN", "-nan", "inf", "-Infinity", "1e30", "-1e30", "1e309", "1e-320", "-0", "0x10", "1_0", "１２", "٣", "½",
    "--1", "1e", "1.5e+1", "2147483648", "-2147483649", "9" * 400, "1,5", "+5", "1\0", "99999", "-99999", "",
)  # fmt: skip


# ── landmarks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def spoil_landmarks(content: bytes, rng: Rng) -> Spoiled:
    """Spoil numbers, lines, and how they are written."""
    lines = content.decode().splitlines()
    at = rng.choice([1, 31, 52, rng.randrange(len(lines))])
    way = rng.choice(["word", "word", "word", "box", "box", "line", "count", "ends", "encoding", "long"])
    how = way
    if way == "word":
        words = lines[at].split()
        words[rng.randrange(2)] = rng.choice(NUMBERS)
        lines[at] = " ".join(words)
        how = f"line {at + 1}: {lines[at][:30]!r}"
    elif way == "box":
        scale = rng.choice([1, 1, 64, 1000, 2**20, 2**29, 2**30])
        for point in (1, 31, 52):
            lines[point] = f"{rng.uniform(-scale, scale)} {rng.uniform(-scale, scale)}"
        how = f"box within ±{scale}"
    elif way == "line":
        lines[at] = rng.choice(
            ["", " ", "1", "1 2 3", "1;2", "x y", "1 2 #", "\t1\t2\t", "\0", "1\x0b2", "1\x1c2 3\x1c4"]
        )
        how = f"line {at + 1}: {lines[at]!r}"
    elif way == "count":
        count = rng.choice([0, 1, 52, 53, 5000])
        lines = (lines * (1 + count // len(lines)))[:count]
        how = f"{count} lines"
    text = "\n".join(lines) + "\n"
    if way == "ends":
        text = text.replace("\n", rng.choice(["\r\n", "\r", "\n\n\n", " ", ",", "\x0c", "\u2028"]))
    elif way == "long":
        text = rng.choice(
            [text + "1" * 2_000_000, "1 " * 500_000, text + "\n" * 1_000_000, text * 50, " " * 10**6 + text]
        )
    encoding = rng.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-32"]) if way == "encoding" else "utf-8"
    return text.encode(encoding), how if way != "encoding" else encoding


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def spoil_jpeg(content: bytes, rng: Rng) -> Spoiled:
    """Make another kind of JPEG, put another format under its name, or change fields of its segments."""
    if rng.random() < 0.4:
        return _other_image(content, rng, "JPEG")
    segments, scan = _jpeg_segments(content)
    names = [marker for marker, _ in segments]
    way = rng.choice(["size", "size", "size", "field", "field", "type", "drop", "double", "insert", "scan", "restart"])
    frame = names.index(0xC0)
    at = rng.randrange(len(segments))
    if way == "size":
        height, width = rng.choice(SIZES), rng.choice(SIZES)
        if rng.random() < 0.4:
            height, width = rng.choice([(48, width), (height, 64)])
        marker, body = segments[frame]
        segments[frame] = marker, body[:1] + struct.pack(">HH", height, width) + body[5:]
        way = f"size {width}×{height}"
    elif way == "field":
        marker, body = segments[at]
        spoiled = bytearray(body)
        if spoiled:
            spoiled[rng.randrange(min(len(spoiled), 20))] = rng.choice([0, 1, 2, 3, 4, 8, 12, 16, 17, 0x44, 0xFF])
        segments[at] = marker, bytes(spoiled)
        way = f"a field of segment {marker:02x}"
    elif way == "type":
        marker = rng.choice([0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB, 0xCF])
        segments[frame] = marker, segments[frame][1]
        way = f"frame {marker:02x}"
    elif way == "drop":
        way = f"no segment {names[at]:02x}"
        del segments[at]
    elif way == "double":
        segments.insert(at, segments[at])
    elif way == "insert":
        segments.insert(
            at, (rng.choice([0xDD, 0xDC, 0xE1, 0xEE, 0xFE, 0xF0, 0x01]), rng.randbytes(rng.choice([0, 2, 65533])))
        )
    elif way == "restart":
        segments.insert(at, (0xDD, struct.pack(">H", rng.choice([1, 7, 65535]))))
    else:
        scan = rng.choice([b"", b"\xff\xd9", scan[:-2], bytes(len(scan)), scan * 3, b"\xff\xda" + scan, b"\xff" * 5000])
    return b"\xff\xd8" + b"".join(_jpeg_segment(*one) for one in segments) + scan, way


def _jpeg_segments(content: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """(marker, body) up to the scan's header, and the scan with all that follows."""
    segments, at = [], 2
    while True:
        marker, length = struct.unpack(">xBH", content[at : at + 4])
        segments.append((marker, content[at + 4 : at + 2 + length]))
        at += 2 + length
        if marker == 0xDA:
            return segments, content[at:]


def _jpeg_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, min(len(body) + 2, 65535)) + body


def _other_image(content: bytes, rng: Rng, own: str) -> Spoiled:
    """The same picture in another colour mode, size or format."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    format = rng.choice([own, own, own, "JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA"])
    mode = rng.choice({"JPEG": ["L", "CMYK", "RGB", "YCbCr"], "PNG": ["1", "L", "LA", "P", "RGBA", "I;16"]}.get(
        format, ["RGB"]
    ))  # fmt: skip
    size = rng.choice([image.size, image.size, (1, 1), (64, 1), (2000, 1500), (65535, 1), (65, 48)])
    if size[0] > 16000 and format in ("WEBP", "ICO", "JPEG"):
        size = (1, 1)  # more is not to be had, or only with larger buffers
    options: dict[str, Any] = {}
    if format == "JPEG":
        options = {
            "progressive": rng.random() < 0.5,
            "quality": rng.choice([1, 50, 100]),
            "optimize": rng.random() < 0.5,
        }
        if rng.random() < 0.3:
            exif = Image.Exif()
            exif[0x0112] = rng.choice([0, 3, 6, 8, 9, 65535])
            options["exif"] = exif
    if format in ("GIF", "WEBP", "PNG") and rng.random() < 0.4:
        options |= {"save_all": True, "append_images": [image.resize(size).rotate(90) for _ in range(3)]}
    out = io.BytesIO()
    picture = image.resize(size)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        options = {}
    elif mode != "RGB":
        picture = picture.convert(mode)
    picture.save(out, format, **options)
    kind = "progressive " if options.get("progressive") else "animated " if "save_all" in options else ""
    return out.getvalue(), f"{kind}{format} {mode} {size[0]}×{size[1]}"


def spoil_png(content: bytes, rng: Rng) -> Spoiled:
    """Make another kind of PNG, put another format under its name, or change its chunks, with valid checksums."""
    if rng.random() < 0.4:
        return _other_image(content, rng, "PNG")
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    way = rng.choice(["header", "header", "header", "drop", "double", "insert", "data", "length", "order"])
    if way == "header":
        width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
        sizes = (*SIZES, 10**6, 2**31 - 1, 2**32 - 1)
        width, height = rng.choice([(rng.choice(sizes), height), (width, rng.choice(sizes)), (rng.choice(sizes),) * 2])
        if rng.random() < 0.6:
            width, height = 64, 48
            rest[rng.randrange(5)] = rng.choice([0, 1, 2, 3, 4, 5, 6, 8, 16, 255])
        chunks[0] = b"IHDR", struct.pack(">IIBBBBB", width, height, *rest)
        way = f"header {width}×{height} {rest}"
    elif way == "drop":
        del chunks[rng.randrange(len(chunks))]
    elif way in ("double", "order"):
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    elif way == "insert":
        name = rng.choice(
            [b"PLTE", b"tRNS", b"gAMA", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"fcTL", b"ABCD", b"IHDR", b"\0\0\0\0"]
        )
        body = rng.choice([rng.randbytes(rng.randrange(300)), b"x\0\0" + zlib.compress(bytes(20_000_000))])
        chunks.insert(rng.randrange(1, len(chunks)), (name, body))
        way = f"insert {name!r}"
    elif way == "data":
        pixels = rng.choice([b"", bytes(100), bytes(30_000_000), rng.randbytes(48 * 193), b"\x09" * 48 * 193])
        chunks = [one for one in chunks if one[0] != b"IDAT"]
        chunks.insert(-1, (b"IDAT", zlib.compress(pixels)))
        way = f"{len(pixels)} bytes of pixels"
    written = b"".join(
        struct.pack(">I", 2**31 - 1 if way == "length" and rng.random() < 0.5 else len(body))
        + (name + body)
        + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return content[:8] + written, way


# ── features ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = (
    "()", "(0, 512)", "(2,)", "(1024,)", "(2, 511)", "(2, 513)", "(-2, 512)", "(2, -2, -256)", "(2, 2, 256)",
    "(2,512,1)", "(10**30, 512)", f"({10**30}, 512)", f"(0x{'f' * 9000}, 512)", "(2.0, 512)", "(True, 512)",
    "[2, 512]", "(2, 512", "('2', 512)", "None", "(2, 0)", "(0, 0)", "(4611686018427387904, 512)", "(2, 32, 16, 16)",
    "(2j, 512)", "(" * 3000, "((2, 512),)", "(1,512)", "(512, 2)", "{2, 512}", "(2, 512) * 2", "(-0, 512)",
    "(9223372036854775808, 512)",
)  # fmt: skip
TYPES = (
    "<f8", "<f2", ">f4", "|f4", "=f4", "<i4", "|u1", "<c8", "|b1", "|S4", "<U1", "|O", "|V4", "<f16", "<f3", "", "f",
    "<M8[s]", "4f4", "(2,)f4", "x" * 5000, "\0", "<f4\n",
)  # fmt: skip
DESCRIPTIONS = (
    "[('a', '<f4')]", "()", "('<f4', (3,))", "('<f4',)", "None", "3", "[]", "[('a',)]", "{'names': ['a']}",
    "[('', '<f4')] * 3",
)  # fmt: skip
HEADERS = (
    "", "{}", "{" * 5000, "[]", "None", "{'descr': '<f4'}", "\0", "(" * 9000 + ")" * 9000, "-" * 9900 + "1",
    "[" * 90 + "]" * 90, "'\\\n", "lambda: 0", "1if 1else 1",
)  # fmt: skip
DTYPES = (
    "float64", "float16", "int32", "uint8", "complex64", "bool", "U1", "S4", "object", "datetime64[s]", ">f4",
)  # fmt: skip


def spoil_npy(content: bytes, rng: Rng) -> Spoiled:
    """Spoil the header's fields, or the array's type, shape or values."""
    rows = np.load(io.BytesIO(content))
    way = rng.choice(
        [
            "shape",
            "shape",
            "type",
            "description",
            "order",
            "version",
            "length",
            "text",
            "array",
            "values",
            "values",
            "npz",
        ]
    )
    fields = {"descr": "'<f4'", "fortran_order": "False", "shape": "(2, 512)"}
    version, length = b"\x01\x00", None
    if way == "values":
        value = rng.choice([math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, 0.0, -1.0])
        rows = rows.copy()
        rows[rng.randrange(2), rng.randrange(512)] = value
        if rng.random() < 0.3:
            rows[:] = value
        return _saved(rows), f"value {value}"
    if way == "array":
        dtype = rng.choice(DTYPES)
        array = np.zeros(rng.choice([(2, 512), (0, 512), (2, 32, 16, 16), (), (1, 512), (3, 1, 512)]), dtype)
        return _saved(rng.choice([array, np.asfortranarray(array), array.T])), f"{dtype} {array.shape}"
    if way == "npz":
        out = io.BytesIO()
        np.savez(out, rows)
        return rng.choice([out.getvalue(), pickle.dumps(rows), rows.tobytes(), b"\x93NUMPY"]), way
    if way == "shape":
        fields["shape"] = rng.choice(SHAPES)
    elif way == "type":
        fields["descr"] = repr(rng.choice(TYPES))
    elif way == "description":
        fields["descr"] = rng.choice(DESCRIPTIONS)
    elif way == "order":
        fields["fortran_order"] = rng.choice(["True", "1", "None", "'yes'", "[]"])
    elif way == "version":
        version = rng.choice([b"\x00\x00", b"\x02\x00", b"\x03\x00", b"\x04\x00", b"\x01\x01", b"\xff\xff"])
    elif way == "length":
        length = rng.choice([0, 1, 50, 117, 119, 10000, 65535])
    header = "{" + ", ".join(f"'{name}': {value}" for name, value in fields.items()) + ", }"
    if way == "text":
        changed = (header[:-1], header + " + 1", "ü" + header, header + " " * 60000, header.replace("}", "'more': 1}"))
        header = rng.choice([*HEADERS, *changed, header.replace("}", "'shape': (2, 512)}")])
    written = header.encode("utf-8")
    written += b" " * (-(10 + len(written) + 1) % 64) + b"\n"
    size = struct.pack(
        "<H" if version[:1] == b"\x01" else "<I", min(length if length is not None else len(written), 65535)
    )
    what = (
        fields["shape"][:30]
        if way == "shape"
        else fields["descr"][:30]
        if way in ("type", "description")
        else header[:30]
    )
    return b"\x93NUMPY" + version + size + written + rows.tobytes(), f"{way}: {what!r}"


def _saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 52, 1e308, -1e308, 1e-300, 10**30, math.nan, math.inf, "", " ", "nothing", "..", "/", "~",
    "\0", "a\0.mp4", "\ud800", "\ud800.mp4", "x" * 300 + ".mp4", "x/" * 3000 + "a.mp4", "../a.mp4", "a.mp4/b.mp4",
    "a\nb.mp4", "[b]a[x].mp4", "ü.mp4", ".mp4", "..mp4", "results.jsonl", "a.MP4", "con.mp4", "-.mp4", "ave", "wenet",
    "hubert", "none", "eager", "auto", "mjpeg", "libx265", "ffv1", "h264000", "p1", "ultrafast", [], {}, [1], {"a": 1},
)  # fmt: skip


def spoil_jobs(content: bytes, rng: Rng) -> Spoiled:
    """Spoil keys and values of jobs, or add lines that are not jobs."""
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    job = json.loads(lines[at])
    way = rng.choice(["value", "value", "value", "value", "drop", "key", "line", "twice", "ends", "encoding", "many"])
    how = way
    if way == "value":
        keys = [
            *job,
            "mode",
            "fps",
            "crf",
            "codec",
            "preset",
            "blend",
            "feather",
            "start_frame",
            "use_parsing",
            "encoder",
        ]
        key = rng.choice(keys)
        job[key] = rng.choice(VALUES)
        how = f"{key}: {str(job[key])[:30]!r}"
    elif way == "drop":
        key = rng.choice(list(job))
        how = f"no {key}"
        del job[key]
    elif way == "key":
        key = rng.choice(["device", "json", "x", "", "output ", "Output", "__class__", "self", "\ud800", "save_frames"])
        job[key] = rng.choice(VALUES)
        how = f"key {key!r}"
    lines[at] = json.dumps(job)
    if way == "line":
        bad = (
            "{",
            "[]",
            "null",
            "1",
            '"a"',
            "{}" * 2,
            "[" * 100_000,
            '{"a":' * 50_000,
            lines[at] + ",",
            "#",
            "\0",
            "1" * 5000,
        )
        lines[at] = rng.choice([*bad, lines[at].replace('"output"', '"output": "b.mp4", "output"', 1)])
        how = f"line {lines[at][:30]!r}"
    elif way == "twice":
        lines.append(lines[at])
    elif way == "many":
        lines = rng.choice([[], [""] * 100_000, lines * 2000, ["x"] * 5000])
    text = "\n".join(lines)
    if way == "ends":
        text = text.replace("\n", rng.choice(["\r\n", "\r", "", ",", "\x0c", "\u2028", "\n\n"]))
    encoding = rng.choice(["utf-8-sig", "utf-16", "utf-32", "latin-1"]) if way == "encoding" else "utf-8"
    return text.encode(encoding, "surrogatepass"), how
