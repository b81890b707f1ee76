"""Frame rates, sizes and colours survive; broken sources are one line; the fallback without PyAV works."""

from fractions import Fraction

import cv2
import numpy as np
import pytest
from conftest import real_data

import video
from config import InputError
from video import VideoReader, VideoWriter, exact_rate


def frames(count, height=48, width=64):
    """Yield frames with a bright column that moves, red on the left and blue on the right."""
    for number in range(count):
        frame = np.full((height, width, 3), (200, 30, 30), np.uint8)
        frame[:, width // 2 :] = (30, 30, 200)
        frame[:, number % width] = 255
        yield frame


def write_clip(path, count=30, fps=Fraction(30000, 1001), size=(48, 64)):
    """Write a clip and return its path."""
    with VideoWriter(path, size, fps) as writer:
        for frame in frames(count, *size):
            writer.write(frame)
    return path


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (29.97, "30000/1001"),
        (29.97002997, "30000/1001"),
        (23.976, "24000/1001"),
        (59.94, "60000/1001"),
        (30.0, "30"),
        (25.0, "25"),
        (12.5, "25/2"),
        (10.0, "10"),
        (0.0, "30"),
        (float("nan"), "30"),
        (90000.0, "30"),
    ],
)
def test_frame_rates_as_fractions(text, want):
    assert exact_rate(text) == Fraction(want)


@pytest.mark.parametrize("with_av", [True, False])
@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(25, 2)])
def test_a_clip_keeps_size_rate_count_and_colours(tmp_path, monkeypatch, with_av, fps):
    if with_av and video.av is None:
        pytest.skip("PyAV is not installed")
    if not with_av:
        monkeypatch.setattr(video, "av", None)
    reader = VideoReader(write_clip(tmp_path / "a.mp4", 30, fps))
    read = list(reader)
    assert reader.size == (48, 64) and reader.fps == fps and reader.count == len(read) == 30
    assert not reader.live and not reader.ended_early(30) and reader.ended_early(20)
    for got, want in list(zip(read, frames(30), strict=True))[5:]:
        assert np.abs(got[:, 50:].astype(int).mean((0, 1)) - want[:, 50:].mean((0, 1))).max() < 25
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]


def test_h264_that_browsers_play(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(write_clip(tmp_path / "a.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
    assert (tmp_path / "a.mp4").read_bytes().find(b"moov") < 1000  # plays before it is loaded whole


@pytest.mark.parametrize("size", [(47, 63), (49, 64), (48, 65)], ids=str)
def test_odd_sizes_stay_odd(tmp_path, size):
    reader = VideoReader(write_clip(tmp_path / "odd.mp4", 5, size=size))
    assert reader.size == size and len(list(reader)) == 5


def test_an_error_midway_leaves_a_playable_file_and_none_without_frames(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "cut.mp4", (48, 64), 25) as writer:
        for frame in frames(7):
            writer.write(frame)
        raise RuntimeError
    assert len(list(VideoReader(tmp_path / "cut.mp4"))) == 7
    with VideoWriter(tmp_path / "none.mp4", (48, 64), 25):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["cut.mp4"]
    with pytest.raises(ValueError, match="frame of"), VideoWriter(tmp_path / "x.mp4", (48, 64), 25) as writer:
        writer.write(np.zeros((10, 10, 3), np.uint8))


@pytest.mark.parametrize("content", [None, b"", b"no video at all", "header"])
def test_a_source_that_does_not_open_is_one_line(tmp_path, capfd, content):
    path = tmp_path / "bad.mp4"
    if content == "header":
        content = write_clip(tmp_path / "good.mp4").read_bytes()[:500]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="--input .*bad.mp4 (is not a file|does not open)") as error:
        VideoReader(path)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_a_cut_off_clip_is_noticed(tmp_path):
    path = write_clip(tmp_path / "long.mp4", 200)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    reader = VideoReader(path)
    assert reader.ended_early(len(list(reader)))


def test_a_rotated_phone_clip_comes_out_upright(tmp_path, monkeypatch):
    """OpenCV turns frames by the file's rotation; the size is that of the turned frame."""

    class Turned:
        def __init__(self, source):
            self.capture = open_capture(source)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def read(self):
            good, frame = self.capture.read()
            return good, cv2.rotate(frame, cv2.ROTATE_90_CLOCKWISE) if good else None

    open_capture = cv2.VideoCapture
    write_clip(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(cv2, "VideoCapture", Turned)
    assert VideoReader(tmp_path / "a.mp4").size == (64, 48)


def test_real_clip():
    reader = VideoReader(real_data("video") / "car-detection.mp4")
    assert reader.size == (432, 768) and reader.fps == Fraction(25, 2) and reader.count == 377
