"""Pictures as readers get them: whatever the source, the same size, grey range, encoding and file size, with nothing else in the file.

A file's size tells a smooth image from a noisy one. PNGs are therefore stored, not compressed (their size depends on width and height
alone), and every frame of a clip is filled up to the same number of bytes as that frame of the other clips of its section.
"""

from __future__ import annotations

import io
import re
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medgen.sampling.echo_pictures import Strip, film
from medgen.study.material import Ecg
from medgen.study.protocol import Media, ProtocolError

Grey = NDArray[np.float32]
Bytes8 = NDArray[np.uint8]
PictureKind = Literal["image", "stack", "video"]
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SEI_UUID = bytes(range(0x10, 0x20))  # of "user data unregistered" messages, which decoders skip (H.264, annex D)
_LEAST_FILLING = 48
_LEADS = ("II", "I", "V5", "III", "aVF", "V2")


@dataclass(frozen=True)
class Source:
    """One picture's file; a clip's ECG and true frame rate (Hz) where they are known."""

    path: Path
    kind: PictureKind
    ecg: Ecg | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Shape:
    """What is the same in all pictures of a section: side in px; frames, rate (Hz) and ECG lead of clips."""

    side: int
    frames: int = 1
    fps: float = 0.0
    lead: str | None = None


def kind_of(path: Path, modality: str) -> PictureKind:
    """A film, a volume's stack, or a clip."""
    if modality == "echo":
        return "video"
    return "stack" if path.name.lower().endswith((".nii", ".nii.gz")) else "image"


# ---------------------------------------------------------------- what a section has in common


def common_shape(where: str, sources: Mapping[str, Sequence[Source]], media: Media) -> Shape:
    """The section's shape, from all its sources by arm. Raises `ProtocolError` where the protocol wants more than they have."""
    every = [source for listed in sources.values() for source in listed]
    kinds = {arm: {source.kind for source in listed} for arm, listed in sources.items()}
    if len(set().union(*kinds.values())) > 1:
        said = "; ".join(f"{arm}: {', '.join(sorted(found))}" for arm, found in kinds.items())
        raise ProtocolError(f"{where}: images of different kinds ({said}); one section shows one kind")
    if every[0].kind == "video":
        return _clip_shape(where, sources, media)
    sides = {arm: {_side(source, media) for source in listed} for arm, listed in sources.items()}
    return Shape(_common_side(where, sides, media))


def _common_side(where: str, sides: Mapping[str, set[int]], media: Media) -> int:
    smallest = min(min(found) for found in sides.values())
    if media.size is not None and media.size > smallest and len(set().union(*sides.values())) > 1:
        said = "; ".join(f"{arm}: {min(found)}" + (f"-{max(found)}" if len(found) > 1 else "") for arm, found in sides.items())
        raise ProtocolError(
            f"{where}: media.size {media.size} would enlarge some images and not others, which tells them apart ({said} px); "
            f"use at most {smallest}, or leave it out"
        )
    return media.size or smallest


def _side(source: Source, media: Media) -> int:
    if source.kind == "stack":
        from medgen.data.volumes import read_shape

        height, width = read_shape(source.path)[:2]
    elif source.path.suffix.lower() == ".png":
        with Image.open(source.path) as image:
            height, width = image.size
    else:
        height, width = _read(source.path).shape
    return max(height, width) if media.fit == "pad" else min(height, width)


def _clip_shape(where: str, sources: Mapping[str, Sequence[Source]], media: Media) -> Shape:
    from medgen.data.video import load_video

    clips = {source: load_video(source.path, source.fps) for listed in sources.values() for source in listed}
    pick = max if media.fit == "pad" else min
    sides = {arm: {pick(clips[source].frames.shape[1:]) for source in listed} for arm, listed in sources.items()}
    slowest = min(clip.fps for clip in clips.values())
    shortest = min(len(clip.frames) / clip.fps for clip in clips.values())
    if media.fps is not None and media.fps > slowest * 1.001:
        raise ProtocolError(
            f"{where}: media.fps {media.fps:g} is more than the {slowest:g} Hz of its slowest clip; use at most that"
        )
    if media.seconds is not None and media.seconds > shortest * 1.001:
        raise ProtocolError(f"{where}: media.seconds {media.seconds:g} is more than the {shortest:.2f} s of its shortest clip")
    fps = media.fps or slowest
    frames = max(1, int((media.seconds or shortest) * fps + 1e-6))
    leads = _common_lead(list(clips)) if media.ecg else None
    return Shape(_common_side(where, sides, media), frames, fps, leads)


def _common_lead(sources: Sequence[Source]) -> str | None:
    """A lead that every clip's ECG has; None where a clip has no ECG: then none is shown, since it would tell the arms apart."""
    if any(source.ecg is None for source in sources):
        return None
    from medgen.data.ecg_files import read_ecg

    there = [set(read_ecg(source.ecg.path).leads) for source in sources if source.ecg is not None]
    return next((lead for lead in _LEADS if all(lead in leads for leads in there)), None)


# ---------------------------------------------------------------- pictures


def picture(source: Source, shape: Shape, media: Media) -> Bytes8:
    """`[side, side]` grey levels of a film."""
    return _eight(_square(_window(_read(source.path), media), shape.side, media))


def stack(source: Source, shape: Shape, media: Media) -> Bytes8:
    """`[slices, side, side]` grey levels: evenly spaced axial slices from the head's side down, the patient's right on the left.

    "stored" is the wide window that the shipped 3D pipelines use for CT; for MR take media.intensity: percentile.
    """
    from medgen.data.volumes import VolumePreprocessing, load_volume

    how = VolumePreprocessing(intensity="window" if media.intensity == "stored" else "percentile", max_anisotropy=20)
    values = load_volume(source.path, (media.slices, shape.side, shape.side), how).values[0]
    # [D,H,W] of RAS axes (D up, H front, W left): a reader looks from the feet, with the front above.
    return _eight((values.numpy()[::-1, ::-1, ::-1] + 1) / 2)


def clip(source: Source, shape: Shape, media: Media) -> Bytes8:
    """`[frames, H, W, 3]` of a clip at the section's rate, with its ECG below if the section shows one."""
    from medgen.data.video import load_video

    video = load_video(source.path, source.fps)
    times = np.arange(shape.frames) / shape.fps
    nearest = np.abs(video.times[None, :] - times[:, None]).argmin(axis=1)
    grey = np.stack([_square(video.frames[i] / np.float32(255), shape.side, media) for i in nearest])
    if shape.lead is None or source.ecg is None:
        return np.repeat(_eight(grey)[..., None], 3, axis=-1)
    return film(grey, times, _strip(source.ecg, shape))


def _strip(ecg: Ecg, shape: Shape) -> Strip:
    from medgen.data.ecg_files import read_ecg

    read = read_ecg(ecg.path)
    seconds = shape.frames / shape.fps
    signal = read.signal[read.leads.index(str(shape.lead))]
    return Strip(seconds, "ECG", shape.lead, signal, read.rate, read.start - ecg.start, mark="")


def _read(path: Path) -> Grey:
    from medgen.data.images import read_grey

    return read_grey(path)


def _window(grey: Grey, media: Media) -> Grey:
    if media.intensity == "stored":
        return grey
    low, high = np.percentile(grey, (0.5, 99.5))
    return np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1).astype(np.float32)


def _square(grey: Grey, side: int, media: Media) -> Grey:
    height, width = grey.shape
    if media.fit == "pad":
        longer = max(height, width)
        top, left = (longer - height) // 2, (longer - width) // 2
        grey = np.pad(grey, ((top, longer - height - top), (left, longer - width - left)))
    else:
        shorter = min(height, width)
        top, left = (height - shorter) // 2, (width - shorter) // 2
        grey = grey[top : top + shorter, left : left + shorter]
    if grey.shape != (side, side):
        grey = np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
    return grey


def _eight(grey: NDArray[np.floating]) -> Bytes8:
    return np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)


# ---------------------------------------------------------------- files


def png_bytes(grey: Bytes8) -> bytes:
    """An 8-bit grey PNG of `[H, W]`, stored: its length depends on H and W alone."""
    height, width = grey.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with filter 0, "none"
    rows[:, 1:] = grey
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def mp4_bytes(clips: Sequence[Bytes8], fps: float) -> list[bytes]:
    """H.264 files of clips `[T, H, W, 3]`, all of one shape: equal in every byte but those of the pictures, frame by frame.

    Every frame is a key frame, so that a viewer can step through them exactly.
    """
    encoded = [_encode(frames, fps) for frames in clips]
    targets = [max(_stored_size(packets[i]) for packets in encoded) + _LEAST_FILLING for i in range(len(clips[0]))]
    filled = [[_filled(packet, target) for packet, target in zip(packets, targets, strict=True)] for packets in encoded]
    return [_mux(packets, clips[0].shape, fps) for packets in filled]


def _stream(output: object, shape: tuple[int, ...], fps: float) -> object:
    stream = output.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))  # type: ignore[attr-defined]
    stream.height, stream.width, stream.pix_fmt = shape[1], shape[2], "yuv420p"
    stream.codec_context.thread_count = 1
    # No choice that depends on the pictures: no scene cuts, no bidirectional frames, every frame by itself.
    stream.options = {"crf": "16", "preset": "medium", "x264-params": "keyint=1:scenecut=0:bframes=0:no-mbtree=1"}
    return stream


def _encode(frames: Bytes8, fps: float) -> list[bytes]:
    import av

    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(io.BytesIO(), "w", format="mp4") as output:
        stream = _stream(output, frames.shape, fps)
        packets = [p for values in frames for p in stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24"))]  # type: ignore[attr-defined]
        packets += stream.encode(None)  # type: ignore[attr-defined]
        return [bytes(packet) for packet in packets]


def _units(packet: bytes) -> list[bytes]:
    """The NAL units of a packet in Annex B form."""
    return [unit for unit in re.split(rb"\x00\x00\x00?\x01", packet) if unit]


def _stored_size(packet: bytes) -> int:
    """Bytes that the packet takes in an MP4: every unit has its length in front instead of a start code."""
    return sum(4 + len(unit) for unit in _units(packet))


def _filled(packet: bytes, target: int) -> bytes:
    """The packet with a message of nothing before its picture, so that it takes `target` bytes in an MP4."""
    wanted = target - _stored_size(packet) - 4
    payload = wanted - 3  # header, type and closing bits; then the size's own bytes
    payload -= payload // 255 + 1
    for length in (payload, payload + 1):
        filling = bytes([6, 5, *[255] * (length // 255), length % 255]) + _SEI_UUID + b"\xff" * (length - 16) + b"\x80"
        if len(filling) == wanted:
            return b"".join(b"\x00\x00\x00\x01" + unit for unit in (filling, *_units(packet)))
    # One length in 256 cannot be said by one message: a short one first shifts the rest.
    first = bytes([6, 5, 16]) + _SEI_UUID + b"\x80"
    return _filled(b"\x00\x00\x00\x01" + first + packet, target)


def _mux(packets: Sequence[bytes], shape: tuple[int, ...], fps: float) -> bytes:
    import av

    even = (shape[0], shape[1] + shape[1] % 2, shape[2] + shape[2] % 2)
    rate = Fraction(fps).limit_denominator(100_000)
    with tempfile.TemporaryDirectory() as scratch:  # the index can come first only in a file
        path = Path(scratch) / "clip.mp4"
        with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}) as output:
            stream = _stream(output, even, fps)
            output.start_encoding()
            for i, content in enumerate(packets):
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.pts, packet.dts, packet.duration = stream, 1 / rate, i, i, 1
                packet.is_keyframe = True
                output.mux(packet)
        return path.read_bytes()
