"""Frame rates, sizes and colors survive; broken sources are one line; the fallback without PyAV works."""

import functools
import http.server
import itertools
import os
import re
import shutil
import subprocess
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import real_data, tiny

import infer_video
import visualize
from inference import video
from inference.gpu import FramesOnGpu, Paint
from inference.predictor import Predictor
from utils import Precision
from config import InputError
from checkpoint import pack_checkpoint
from inference.video import Pipeline, ReadAhead, VideoReader, VideoWriter, WriteBehind, exact_rate


CLASSES = [("a", (250, 0, 9)), ("b", (0, 180, 0)), ("c", (0, 9, 200))]


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
def test_a_clip_keeps_size_rate_count_and_colors(tmp_path, monkeypatch, with_av, fps):
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


# --- threads ----------------------------------------------------------------------------------------------
def test_read_ahead_keeps_the_order_and_stays_a_few_items_ahead():
    taken, made = [], []

    def source():
        for number in range(200):
            made.append(number)
            yield number

    with ReadAhead(source(), depth=3) as items:
        for item in items:
            taken.append(item)
            assert len(made) - len(taken) <= 3 + 2  # in the queue, on its way, and being made
    assert taken == list(range(200))


def test_read_ahead_passes_errors_on_and_stops_when_it_is_left():
    def fails():
        yield 1
        raise InputError("broken")

    with ReadAhead(fails()) as items, pytest.raises(InputError, match="broken"):
        assert list(zip(items, range(9), strict=False)) == []
    with ReadAhead(itertools.count()) as items:  # endless
        assert next(iter(items)) == 0
    assert not items.thread.is_alive()


def test_a_slow_taker_gets_the_newest_frames_of_a_live_source():
    go = threading.Event()

    def camera():
        yield from range(100)
        go.set()

    with ReadAhead(camera(), depth=2, newest=True) as items:
        assert go.wait(5)  # the camera never waits
        got = list(items)
    assert got == [98, 99] and items.dropped == 98


def test_write_behind_keeps_the_order_and_reports_what_fails():
    done = []
    with WriteBehind(done.append) as writer:
        for number in range(100):
            writer.put(number)
    assert done == list(range(100)) and writer.seconds > 0

    def fails(number):
        done.append(number)
        raise OSError(28, "No space left on device")

    done.clear()
    with pytest.raises(OSError, match="No space left"), WriteBehind(fails, depth=2) as writer:
        for number in range(100):  # never waits for ever, though nothing more is taken
            writer.put(number)
    assert done == [0]
    with pytest.raises(OSError, match="No space left"), WriteBehind(fails) as writer:
        writer.put(1)  # the last one, so that only the end can tell


# --- sound, pipes, streams, full disks --------------------------------------------------------------------
needs_av = pytest.mark.skipif(video.av is None, reason="PyAV is not installed")


def write_sound(path, seconds=2, codec="aac"):
    """Write a clip of 25 frames/s with a tone."""
    with video.av.open(str(path), "w") as container:
        picture, sound = container.add_stream("libx264", rate=25), container.add_stream(codec, rate=48000)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        for number, frame in enumerate(frames(25 * seconds)):
            image = video.av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(picture.encode(image))
            tone = np.sin(np.arange(1920) * 0.05).astype(np.float32) * 0.3
            samples = video.av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
            samples.rate, samples.pts = 48000, 1920 * number
            container.mux(sound.encode(samples))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))
    return path


@needs_av
def test_sound_is_copied_as_it_is(tmp_path):
    source = write_sound(tmp_path / "a.mp4")
    with VideoWriter(tmp_path / "b.mp4", (48, 64), 25, sound_of=source) as writer:
        for frame in VideoReader(source):
            writer.write(frame)
    assert writer.sound is not None
    packets = []
    for path in (source, tmp_path / "b.mp4"):
        with video.av.open(str(path)) as container:
            stream = container.streams.audio[0]
            packets.append(
                [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.size]
            )
    packets[0] = [packet for packet in packets[0] if packet[0] >= 0]  # without the encoder's lead-in
    assert packets[1] == packets[0][: len(packets[1])] and len(packets[1]) >= len(packets[0]) - 2
    with VideoWriter(
        tmp_path / "c.mp4", (48, 64), 25, sound_of=write_clip(tmp_path / "silent.mp4")
    ) as writer:
        writer.write(next(frames(1)))
    assert writer.sound is None


@needs_av
@pytest.mark.parametrize("ending", [".ts", ".mkv"])
def test_sound_and_picture_that_start_late_are_copied_in_step(tmp_path, ending):
    source = write_sound(tmp_path / f"a{ending}", codec="aac")  # .ts starts at 1.4 s
    reader = VideoReader(source)
    with VideoWriter(tmp_path / "b.mp4", (48, 64), 25, sound_of=source) as writer:
        for frame, seconds in reader.timed():
            writer.write(frame, seconds)
    assert writer.sound.seconds > 1.8 and not reader.ended_early(20)
    with video.av.open(str(tmp_path / "b.mp4")) as container:
        starts = [float(stream.start_time * stream.time_base) for stream in container.streams]
    assert len(starts) == 2 and abs(starts[0] - starts[1]) < 0.1


@needs_av
def test_joined_recordings_and_damaged_sound_do_not_end_the_run(tmp_path):
    whole = write_sound(tmp_path / "a.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(whole + whole)
    broken = bytearray(whole)
    for place in range(len(broken) // 3, len(broken), 1000):
        broken[place] ^= 0x55
    (tmp_path / "broken.ts").write_bytes(broken)
    for name, least in (("joined.ts", 90), ("broken.ts", 10)):
        reader = VideoReader(tmp_path / name)
        with VideoWriter(tmp_path / "b.mp4", (48, 64), 25, sound_of=tmp_path / name) as writer:
            for frame, seconds in reader.timed():
                writer.write(frame, seconds)
        assert len(list(VideoReader(tmp_path / "b.mp4"))) == writer.frames >= least
        assert writer.position < 25 * 6  # no gap of the hours that a damaged time stamp may claim


@needs_av
def test_frames_are_shown_when_the_source_shows_them(tmp_path):
    with video.av.open(str(tmp_path / "a.mkv"), "w") as container:  # 12 frames in 4 seconds, unevenly
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        times = [0, 1, 2, 3, 30, 31, 60, 61, 90, 91, 92, 120]
        for place, frame in zip(times, frames(12), strict=True):
            image = video.av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.pts, image.time_base = place, Fraction(1, 30)
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    with VideoWriter(tmp_path / "b.mp4", (48, 64), 30) as writer:
        for frame, seconds in VideoReader(tmp_path / "a.mkv").timed():
            writer.write(frame, seconds)
    assert writer.frames == 12
    with video.av.open(str(tmp_path / "b.mp4")) as container:
        got = [round(float(frame.time) * 30) for frame in container.decode(video=0)]
    assert got == times


def test_a_stopped_run_does_not_wait_for_a_source_that_sends_nothing():
    class Stop:
        asked = False

    def silent():
        yield 1
        threading.Event().wait(20)

    stop, started = Stop(), time.perf_counter()
    with ReadAhead(silent(), stop=stop) as items:
        for _ in items:
            stop.asked = True
    assert time.perf_counter() - started < 10


def test_a_colon_in_a_name_is_no_protocol(tmp_path):
    assert len(list(VideoReader(write_clip(tmp_path / "12:30:05.mp4", 4)))) == 4


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A web server on tmp_path; its address."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def transport_stream(path, count=30):
    """Write a clip as the MPEG transport stream that cameras and broadcasts send."""
    with video.av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in frames(count):
            container.mux(stream.encode(video.av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@needs_av
def test_a_stream_over_http_is_segmented_to_its_end(tmp_path, served, run):
    transport_stream(tmp_path / "camera.ts")
    model = tmp_path / "m.pth"
    torch.save(
        pack_checkpoint(tiny(), [("a", (0, 0, 0)), ("b", (9, 9, 9)), ("c", (1, 2, 3))], (28, 42)), model
    )
    flags = ["--model", model, "--out-dir", tmp_path, "--backend", "torch"]
    code, text, err = run(infer_video, "--input", f"{served}/camera.ts", *flags)
    assert code == 0 and "the stream ended after" in text, err
    (made,) = (tmp_path / "inference_results_video").glob("stream_*.mp4")
    kept, lost = len(list(VideoReader(made))), re.search(r"(\d+) frames? came faster", text)
    assert kept >= 1 and kept + (int(lost[1]) if lost else 0) >= 28
    code, _, err = run(infer_video, "--input", f"{served}/gone.ts", *flags)
    assert code == 2 and "does not open" in err and err.count("\n") == 1


@needs_av
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_where_a_camera_would_be(tmp_path):
    content = transport_stream(tmp_path / "camera.ts").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,), daemon=True)
    writer.start()
    reader = VideoReader(tmp_path / "pipe")
    assert reader.live and reader.size == (48, 64) and len(list(reader)) == 30


@needs_av
def test_a_full_disk_leaves_a_playable_clip(tmp_path, monkeypatch):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    monkeypatch.setattr(video, "RESERVE", 3 << 20)
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        noise = np.random.default_rng(0)
        written = 0
        with pytest.raises(OSError, match="a.mp4") as error:
            with VideoWriter(place / "a.mp4", (96, 128), 25) as writer:
                for written in range(3000):  # noqa: B007 - read below
                    writer.write(noise.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        assert error.value.errno == 28
        count = len(list(VideoReader(place / "a.mp4")))
        assert 0 < count <= written and [path.name for path in place.iterdir()] == ["a.mp4"]
    finally:
        subprocess.run(["umount", str(place)], check=True)


# --- the pipeline -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [None, 1])
def test_paint_on_a_device_is_the_overlay(keep):
    generator = np.random.default_rng(3)
    frames = generator.integers(0, 256, (3, 17, 22, 3), dtype=np.uint8)
    preds = generator.choice([0, 1, 5, 255], (3, 17, 22)).astype(np.uint8)
    table = generator.integers(0, 256, (256, 3), dtype=np.uint8)
    paint = Paint(table, 0.3, keep, "cpu")
    painted = paint(torch.from_numpy(frames), torch.from_numpy(preds)).numpy()
    for frame, pred, drawn in zip(frames, preds, painted, strict=True):
        want = visualize.overlay(frame, pred, table, 0.3, keep).astype(int)
        assert np.abs(drawn - want).max() <= 1
        assert keep is None or (drawn[pred == keep] == frame[pred == keep]).all()


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_batches_begun_ahead_come_back_in_order_and_whole(tmp_path, ahead, count):
    """As on a GPU: what was begun is waited for later, each frame with its own label map."""
    predictor = Predictor(tiny().eval(), dict(classes=CLASSES, imgsz=(28, 28)), "cpu")
    table, seen, waiting = visualize.color_table(CLASSES), [], []
    reader = VideoReader(write_clip(tmp_path / "clip.mp4", count, size=(30, 41)))
    originals = [frame.copy() for frame in VideoReader(tmp_path / "clip.mp4")]
    predictor.precision = Precision("off", predictor.device)
    on_gpu = FramesOnGpu(predictor, Paint(table, 0.5, None, "cpu"))

    def segment(batch):
        wait, begun = on_gpu(batch), len(waiting)
        waiting.append(True)

        def done():
            assert sum(waiting) <= ahead + 1
            waiting[begun] = False
            return wait()

        return done

    def draw(frame, pred, seconds, rate):
        seen.append((frame, pred))
        return frame

    with VideoWriter(tmp_path / "out.mp4", reader.size, reader.fps) as writer:
        pipeline = Pipeline(reader, segment, draw, writer, batch_size=2, ahead=ahead)
        pipeline.run(SimpleNamespace(asked=0))
    assert len(seen) == len(originals) == writer.frames and not any(waiting)
    for (drawn, pred), frame in zip(seen, originals, strict=True):
        want = predictor(torch.from_numpy(frame).permute(2, 0, 1)[None])[0]
        assert (pred == want).all()
        assert np.abs(drawn - visualize.overlay(frame, want, table).astype(int)).max() <= 1


def test_a_number_that_is_no_camera_is_one_line():
    with pytest.raises(InputError, match="4294967295 is no number of a camera"):
        VideoReader("4294967295")
