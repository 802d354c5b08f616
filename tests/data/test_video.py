"""Video files: lossless and browser-ready writing, EchoNet's kind of AVI, and files that must be refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import nibabel
import numpy as np
import pytest

from medgen.data.video import VideoError, load_video, read_video, write_video


def ramp(count: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright disc that moves over a grey ramp."""
    y, x = np.mgrid[:height, :width]
    discs = [255 * ((x - 10 - 3 * t) ** 2 + (y - 20) ** 2 < 60) for t in range(count)]
    return np.stack([np.maximum(disc, 2 * x).astype(np.uint8) for disc in discs])


def write_mjpeg(path: Path, frames: np.ndarray, fps: float = 50) -> Path:
    """An AVI as EchoNet-Dynamic ships them: Motion JPEG in colour that shows grey."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mjpeg", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuvj420p"
        stream.options = {"q:v": "2", "qmin": "1"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, -1), format="rgb24")
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
@pytest.mark.parametrize("fps", [20, 33.333])
def test_ffv1_is_lossless(tmp_path: Path, suffix: str, fps: float) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 113, 111), dtype=np.uint8)
    path = write_video(tmp_path / f"clip{suffix}", frames, fps)
    again, rate = read_video(path)
    assert np.array_equal(again, frames)
    assert rate == pytest.approx(fps, rel=1e-3)
    assert np.allclose(load_video(path).times, np.arange(9) / fps, atol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a temporary file was left behind"


def test_colour_is_lossless_too_and_read_as_luma(tmp_path: Path) -> None:
    frames = np.repeat(ramp()[..., None], 3, -1)
    again, _ = read_video(write_video(tmp_path / "c.avi", frames, 25))
    assert np.abs(again.astype(int) - ramp()).max() <= 1


@pytest.mark.parametrize("size", [(48, 64), (113, 111)])
def test_h264_plays_in_a_browser(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = ramp(20, *size)
    path = write_video(tmp_path / "clip.mp4", frames, 20, codec="libx264", notes={"comment": "synthetic, seed 7"})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 20)
        assert container.metadata["comment"] == "synthetic, seed 7"
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "not faststart: a browser would wait for the whole file"
    again, fps = read_video(path)
    assert fps == 20 and again.shape == (20, size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert np.abs(again[:, : size[0], : size[1]].astype(int) - frames).mean() < 3
    assert (
        write_video(tmp_path / "again.mp4", frames, 20, codec="libx264", notes={"comment": "synthetic, seed 7"}).read_bytes()
        == content
    )


def test_motion_jpeg_as_echonet_ships_it(tmp_path: Path) -> None:
    frames, fps = read_video(write_mjpeg(tmp_path / "0X1A.avi", ramp(), fps=50))
    assert frames.shape == (12, 48, 64) and fps == 50
    assert np.abs(frames.astype(int) - ramp()).mean() < 3, "the full range of grey is kept"


def test_a_known_frame_rate_overrides_the_container(tmp_path: Path) -> None:
    path = write_video(tmp_path / "slow.avi", ramp(), 30)
    video = load_video(path, fps=46.5)
    assert video.fps == pytest.approx(46.5) and np.allclose(video.times, np.arange(12) / 46.5)


def test_uneven_frame_times_are_kept(tmp_path: Path) -> None:
    path, ticks = tmp_path / "uneven.mkv", [0, 40, 80, 200, 240, 280]
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gray"
        stream.codec_context.time_base = Fraction(1, 1000)
        for tick, frame in zip(ticks, ramp(6), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="gray")
            picture.pts, picture.time_base = tick, Fraction(1, 1000)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    assert np.allclose(load_video(path).times * 1000, ticks, atol=1.5)


def test_nifti_sequence_needs_a_frame_rate(tmp_path: Path) -> None:
    frames = ramp(7)
    path = tmp_path / "patient0001_4CH_half_sequence.nii.gz"
    nibabel.save(nibabel.Nifti1Image(frames.transpose(2, 1, 0), np.diag([0.3, 0.3, 1, 1])), path)
    with pytest.raises(VideoError, match="frame rate"):
        read_video(path)
    video = load_video(path, fps=50)
    assert np.array_equal(video.frames, frames) and video.times[-1] == pytest.approx(6 / 50)


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    video = load_video(write_video(tmp_path / "one.avi", ramp(1), 20))
    assert video.frames.shape == (1, 48, 64) and video.fps == 20 and list(video.times) == [0.0]


@pytest.mark.parametrize("keep", [0, 10, 200, 0.3, 0.6, 0.95])
def test_a_truncated_video_is_refused(tmp_path: Path, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64), dtype=np.uint8)
    for path in (write_video(tmp_path / "cut.avi", noise, 20), write_mjpeg(tmp_path / "cutm.avi", noise)):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
        with pytest.raises(VideoError, match=path.name):
            read_video(path)


def test_no_frame_no_rate_no_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", ramp(), 20)
    with pytest.raises(VideoError, match="0 Hz"):
        load_video(path, fps=0)
    with pytest.raises(VideoError, match="0 Hz"):
        write_video(tmp_path / "w.avi", ramp(), 0)
    with pytest.raises(VideoError, match="no video at"):
        read_video(tmp_path / "absent.avi")
    with pytest.raises(VideoError, match="expected uint8"):
        write_video(tmp_path / "w.avi", ramp()[:0], 20)
    with pytest.raises(VideoError, match="expected uint8"):
        write_video(tmp_path / "w.avi", ramp() / 255, 20)  # type: ignore[arg-type]
    with pytest.raises(VideoError, match="ffv1 goes into .avi"):
        write_video(tmp_path / "w.mp4", ramp(), 20)
    (tmp_path / "text.avi").write_text("not a video\n" * 50)
    with pytest.raises(VideoError, match="text.avi"):
        read_video(tmp_path / "text.avi")


def test_an_avi_whose_header_says_zero_frames_per_second(tmp_path: Path) -> None:
    path = write_mjpeg(tmp_path / "zero.avi", ramp(), fps=50)
    content = bytearray(path.read_bytes())
    header = content.index(b"strh") + 8
    content[header + 24 : header + 28] = (0).to_bytes(4, "little")  # dwRate
    content[content.index(b"avih") + 8 : content.index(b"avih") + 12] = (0).to_bytes(4, "little")  # dwMicroSecPerFrame
    path.write_bytes(content)
    assert load_video(path, fps=50).times[1] == pytest.approx(0.02), "what the record knows is used"
