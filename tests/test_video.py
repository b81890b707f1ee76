"""Frame rates, sizes, colors, sound and times survive; broken sources are one line; threads; the pipeline."""
import contextlib
import functools
import http.server
import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch
from conftest import tiny

import infer_video
import visualize
from checkpoint import pack_checkpoint
from config import PRESETS, InputError
from inference import threads, video
from inference.predictor import Predictor
from inference.backends import ExportedModel
from inference.threads import ReadAhead, WriteBehind
from inference.video import FrameSegmenter, Paint, Pipeline, VideoReader, VideoWriter, exact_rate
from utils import Precision

CLASSES = [("a", (250, 0, 9)), ("b", (0, 180, 0)), ("c", (0, 9, 200))]


def frames(count, height=48, width=64):
    """Yield frames with a bright column that moves, red on the left and blue on the right."""
    for number in range(count):
        frame = np.full((height, width, 3), (200, 30, 30), np.uint8)
        frame[:, width // 2:] = (30, 30, 200)
        frame[:, number % width] = 255
        yield frame


def write_clip(path, count=30, fps=Fraction(30000, 1001), size=(48, 64)):
    """Write a clip and return its path."""
    with VideoWriter(path, size, fps) as writer:
        for frame in frames(count, *size):
            writer.write(frame)
    return path


def copy_clip(source, target, **options):
    """Write the frames of a clip at their times to another one; return the closed VideoWriter."""
    reader = VideoReader(source)
    if "sound_of" in options:
        options["start"] = reader.start
    with VideoWriter(target, reader.size, reader.fps, **options) as writer:
        for frame, seconds in reader.timed():
            writer.write(frame, seconds)
        writer.extend(reader.end)
    return writer


@pytest.mark.parametrize(("fps", "want"), [
    (29.97, "30000/1001"), (29.97002997, "30000/1001"), (23.976, "24000/1001"), (59.94, "60000/1001"),
    (30.0, "30"), (25.0, "25"), (12.5, "25/2"), (10.0, "10"), (0.5, "1/2"), (0.0, "30"),
    (float("nan"), "30"), (1e-5, "30"), (90000.0, "30")])
def test_frame_rates_as_fractions(fps, want):
    assert exact_rate(fps) == Fraction(want)


@pytest.mark.parametrize(("fps", "size"), [
    (Fraction(30000, 1001), (48, 64)), (Fraction(25, 2), (47, 63)), (25, (49, 64)), (25, (48, 65))], ids=str)
def test_a_clip_keeps_size_rate_count_and_colors(tmp_path, fps, size):
    reader = VideoReader(write_clip(tmp_path / "a.mp4", 30, fps, size))
    read = list(reader)
    assert reader.size == size and reader.fps == fps and reader.count == len(read) == 30
    assert not reader.live and not reader.ended_early(30) and reader.ended_early(20)
    for got, want in list(zip(read, frames(30, *size), strict=True))[5:]:
        assert np.abs(got[:, 50:].astype(int).mean((0, 1)) - want[:, 50:].mean((0, 1))).max() < 25
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]


def test_presets_change_the_size_of_the_file_and_no_time(tmp_path, run):
    clip, model = write_clip(tmp_path / "a.mp4"), tmp_path / "m.pth"
    torch.save(pack_checkpoint(tiny(), CLASSES, (28, 42)), model)
    times, sizes = {}, {}
    for preset in PRESETS[::2]:
        code, _, err = run(infer_video, "--input", clip, "--model", model, "--out-dir", tmp_path, "--preset",
                           preset, "--backend", "torch")
        assert code == 0, err
        made = tmp_path / "inference_results_video/a.mp4"
        sizes[preset] = made.stat().st_size
        times[preset] = [seconds for _, seconds in VideoReader(made).timed()]
    assert len(set(sizes.values())) > 1 and len(times["ultrafast"]) == len(list(VideoReader(clip)))
    assert all(own == times["ultrafast"] for own in times.values())


def test_h264_that_browsers_play(tmp_path):
    with av.open(str(write_clip(tmp_path / "a.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
    assert (tmp_path / "a.mp4").read_bytes().find(b"moov") < 1000  # plays before it is loaded completely


def test_without_pyav_it_is_one_line_before_a_model_is_loaded(tmp_path, run, monkeypatch):
    clip = write_clip(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(video, "av", None)
    code, _, err = run(infer_video, "--input", clip, "--model", tmp_path / "gone.pth")
    assert code == 2 and "pip install av" in err and err.count("\n") == 1
    with pytest.raises(InputError, match="pip install av"):
        VideoWriter(tmp_path / "b.mp4", (48, 64), 25)


def test_an_error_midway_leaves_a_playable_file_and_none_without_frames(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "cut.mp4", (48, 64), 25) as writer:
        for frame in frames(7):
            writer.write(frame)
        raise RuntimeError
    assert len(list(VideoReader(tmp_path / "cut.mp4"))) == 7
    with VideoWriter(tmp_path / "none.mp4", (48, 64), 25):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["cut.mp4"]
    with pytest.raises(ValueError, match="10"), VideoWriter(tmp_path / "x.mp4", (48, 64), 25) as writer:
        writer.write(np.zeros((10, 10, 3), np.uint8))


@pytest.mark.parametrize("content", [None, b"", b"not a video", "header"], ids=str)
def test_a_source_that_does_not_open_is_one_line(tmp_path, capfd, content):
    path = tmp_path / "bad.mp4"
    if content == "header":
        content = write_clip(tmp_path / "good.mp4").read_bytes()[:500]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="--input .*bad.mp4") as error:
        VideoReader(path)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_a_cut_off_clip_is_noticed(tmp_path):
    path = write_clip(tmp_path / "long.mp4", 100)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    reader = VideoReader(path)
    assert reader.ended_early(len(list(reader)))


def test_a_rotated_phone_clip_comes_out_upright(tmp_path, monkeypatch):
    """OpenCV turns frames by the file's rotation; the size is that of the turned frame."""

    class Turned:
        def __init__(self, source):
            pass

        def get(self, key):
            return {cv2.CAP_PROP_FRAME_HEIGHT: 48, cv2.CAP_PROP_FRAME_WIDTH: 64}.get(key, 25)

        def read(self):
            return True, np.zeros((64, 48, 3), np.uint8)

    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(cv2, "VideoCapture", Turned)
    assert VideoReader(tmp_path / "a.mp4").size == (64, 48)


# --- threads ----------------------------------------------------------------------------------------------
def test_read_ahead_keeps_the_order_and_stays_a_few_items_ahead():
    received, made = [], []

    def source():
        for number in range(200):
            made.append(number)
            yield number

    with ReadAhead(source()) as items:
        for item in items:
            received.append(item)
            assert len(made) - len(received) <= threads.DEPTH + 2  # in the queue, on its way, and being made
    assert received == list(range(200))


def test_read_ahead_passes_errors_on_and_stops_when_it_is_left():
    def fails():
        yield 1
        raise InputError("broken")

    with ReadAhead(fails()) as items, pytest.raises(InputError):
        list(items)
    with ReadAhead(itertools.count()) as items:  # endless
        assert next(iter(items)) == 0
    assert not items.thread.is_alive()


def test_a_slow_taker_gets_the_newest_frames_of_a_live_source():
    go = threading.Event()

    def camera():
        yield from range(100)
        go.set()

    with ReadAhead(camera(), newest=True) as items:
        assert go.wait(5)  # the camera never waits
        got = list(items)
    assert got == list(range(100))[-threads.DEPTH:] and items.dropped == 100 - threads.DEPTH


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
    with pytest.raises(OSError), WriteBehind(fails) as writer:
        for number in range(100):  # never waits for ever, though nothing more is taken
            writer.put(number)
    assert done == [0]
    with pytest.raises(OSError), WriteBehind(fails) as writer:
        writer.put(1)  # the last one, so that only the end can tell


# --- sound, time stamps, pipes, streams, full disks -------------------------------------------------------
def write_sound(path, seconds=1, codec="aac"):
    """Write a clip of 25 frames/s with a tone."""
    with av.open(str(path), "w") as container:
        picture, sound = container.add_stream("libx264", rate=25), container.add_stream(codec, rate=48000)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        for number, frame in enumerate(frames(25 * seconds)):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            tone = np.sin(np.arange(1920) * 0.05).astype(np.float32) * 0.3
            samples = av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
            samples.rate, samples.pts = 48000, 1920 * number
            container.mux(sound.encode(samples))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))
    return path


def write_frames(path, times, rate=25, **options):
    """Write a clip whose frames are shown at `times`, in 1 / rate seconds."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for moment, frame in zip(times, frames(len(times)), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = moment, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def sound_packets(path):
    """Return [(seconds, content)] of the sound of a clip, without the encoder's lead-in."""
    with av.open(str(path)) as container:
        packets = [(float(packet.pts * packet.time_base), bytes(packet))
                   for packet in container.demux(container.streams.audio[0]) if packet.size]
    return [packet for packet in packets if packet[0] >= 0]


def test_sound_is_copied_as_it_is(tmp_path):
    source = write_sound(tmp_path / "a.mp4")
    assert copy_clip(source, tmp_path / "b.mp4", sound_of=source).sound is not None
    before, after = sound_packets(source), sound_packets(tmp_path / "b.mp4")
    assert after == before[:len(after)] and len(after) >= len(before) - 2
    silent = write_clip(tmp_path / "silent.mp4", 2)
    assert copy_clip(silent, tmp_path / "c.mp4", sound_of=silent).sound is None
    other = write_sound(tmp_path / "pcm.mkv", codec="pcm_f32le")  # no player takes it in an .mp4
    assert copy_clip(other, tmp_path / "d.mp4", sound_of=other).sound is None
    assert len(list(VideoReader(tmp_path / "d.mp4"))) == 25


@pytest.mark.parametrize("ending", [".ts", ".mkv", ".avi"])
def test_sound_and_picture_that_start_late_are_copied_in_step(tmp_path, ending):
    source = write_sound(tmp_path / f"a{ending}")  # .ts starts at 1.4 s
    assert copy_clip(source, tmp_path / "b.mp4", sound_of=source).sound.seconds > 0.8
    reader = VideoReader(source)
    assert reader.start == 0
    assert reader.ended_early(10) == (ending == ".avi")  # the others do not store how many frames they hold
    with av.open(str(tmp_path / "b.mp4")) as container:
        starts = [float(stream.start_time * stream.time_base) for stream in container.streams]
    assert len(starts) == 2 and abs(starts[0] - starts[1]) < 0.1


def test_joined_recordings_and_damaged_sound_do_not_end_the_run(tmp_path):
    content = write_sound(tmp_path / "a.ts", seconds=2).read_bytes()
    (tmp_path / "joined.ts").write_bytes(content + content)
    damaged = bytearray(content)
    for position in range(len(damaged) // 3, len(damaged), 1000):
        damaged[position] ^= 0x55
    (tmp_path / "damaged.ts").write_bytes(damaged)
    for name, least in (("joined.ts", 90), ("damaged.ts", 10)):
        writer = copy_clip(tmp_path / name, tmp_path / "b.mp4", sound_of=tmp_path / name)
        assert len(list(VideoReader(tmp_path / "b.mp4"))) == writer.frames >= least
        assert writer.end < 6  # no gap of the hours that a damaged time stamp may claim


@pytest.mark.parametrize(("ending", "codec"), [("avi", "mpeg4"), ("mpg", "mpeg2video")])
def test_a_last_frame_without_a_time_follows_the_one_before(tmp_path, ending, codec):
    """As the B-frames of these leave it, whose time OpenCV calls 0; the sound goes on for longer."""
    with av.open(str(tmp_path / f"a.{ending}"), "w") as container:
        picture, sound = container.add_stream(codec, rate=25), container.add_stream("mp2", rate=48000)
        picture.height, picture.width, picture.pix_fmt, picture.options = 48, 64, "yuv420p", {"bf": "2"}
        for frame in frames(50):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for number in range(125):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            samples.rate, samples.pts = 48000, 1152 * number
            container.mux(sound.encode(samples))
        container.mux([*picture.encode(None), *sound.encode(None)])
    times = [seconds for _, seconds in VideoReader(tmp_path / f"a.{ending}").timed()]
    assert np.allclose(times, [number / 25 for number in range(50)], atol=0.001)


def test_sound_of_which_nothing_is_known_is_left_out(tmp_path):
    """A recording that announces sound and has none yet: an .mp4 of it could not be begun."""
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        picture = container.add_stream("libx264", rate=25)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        container.add_stream("aac", rate=48000)
        for frame in frames(10):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(picture.encode(None))
    writer = copy_clip(tmp_path / "a.ts", tmp_path / "b.mp4", sound_of=tmp_path / "a.ts")
    assert writer.sound is None and len(list(VideoReader(tmp_path / "b.mp4"))) == 10


def test_a_recording_with_streams_of_its_own_is_left_out_and_named(tmp_path, run):
    """Joined behind another one, its streams begin in the middle of the file, where nothing reads them."""
    write_sound(tmp_path / "a.ts")
    options = {"mpegts_start_pid": "0x300", "mpegts_pmt_start_pid": "0x200"}
    with (av.open(str(tmp_path / "a.ts")) as source,
          av.open(str(tmp_path / "b.ts"), "w", options=options) as target):
        streams = {stream: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                target.mux(packet)
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    torch.save(pack_checkpoint(tiny(), CLASSES, (28, 42)), tmp_path / "m.pth")
    flags = ["--model", tmp_path / "m.pth", "--out-dir", tmp_path, "--backend", "torch"]
    code, out, err = run(infer_video, "--input", tmp_path / "c.ts", *flags)
    assert code == 0 and "with its sound" in out and err.count("c.ts") == 1
    assert len(list(VideoReader(tmp_path / "inference_results_video/c.mp4"))) == 25


def test_sound_that_an_mp4_refuses_ends_early_and_no_frame_is_lost(tmp_path):
    content = bytearray(write_sound(tmp_path / "a.ts", seconds=2).read_bytes())
    headers = [match.start() for match in re.finditer(b"\xff\xf1", content)]
    for place in headers[len(headers) // 2:]:  # several blocks per frame and a checksum: FFmpeg gives up
        content[place + 1], content[place + 6] = 0xf0, content[place + 6] & 0xfc | 1
    (tmp_path / "a.ts").write_bytes(content)
    writer = copy_clip(tmp_path / "a.ts", tmp_path / "b.mp4", sound_of=tmp_path / "a.ts")
    assert len(list(VideoReader(tmp_path / "b.mp4"))) == writer.frames == 50
    assert 0.5 < writer.sound.seconds < 1.5


def write_beeps(path, times, beeps, length, start=0.0, **options):
    """Write a clip of `length` seconds that beeps at `beeps`; of its frames, shown at `times`, those at a
    beep are white. start: seconds by which its picture begins after its sound.
    """
    unit, heard = Fraction(1, 90_000), 0
    with av.open(str(path), "w", **options) as container:
        picture, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=48000)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        picture.codec_context.time_base, picture.options = unit, {"bf": "2", "g": "25"}
        for moment in [*times, None]:
            while heard / 48000 < (length if moment is None else moment + start):
                clock = (np.arange(1024) + heard) / 48000
                loud = np.any([(clock >= beep) & (clock < beep + 0.1) for beep in beeps], axis=0)
                samples = av.AudioFrame.from_ndarray((loud * np.sin(6000 * clock)).astype(np.float32)[None],
                                                     format="fltp", layout="mono")
                samples.rate, samples.pts, heard = 48000, heard, heard + 1024
                container.mux(sound.encode(samples))
            if moment is not None:
                bright = 255 if any(abs(moment + start - beep) < 0.001 for beep in beeps) else 20
                pixels = np.full((48, 64, 3), bright, np.uint8)
                shown = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                shown.pts, shown.time_base = round((moment + start) / unit), unit
                container.mux(picture.encode(shown))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))
    return path


def read_beeps(path):
    """Return (times of all frames, of the white ones, of the beeps, end of the sound), in seconds."""
    shown, white, beeps, last = [], [], [], -1.0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            shown.append(float(frame.time))
            if frame.to_ndarray(format="gray").mean() > 128:
                white.append(shown[-1])
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            for position in np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.2):
                moment = frame.time + position / frame.rate
                if moment - last > 0.2:
                    beeps.append(moment)
                last = moment
            end = frame.time + frame.samples / frame.rate
    return shown, white, beeps, end


STEADY = [number / 25 for number in range(100)]
BURST = ([number / 2 for number in range(6)] + [3 + number / 50 for number in range(100)]
         + [5 + number / 2 for number in range(6)])


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(("times", "beeps", "length", "start"), [
    (BURST, [1, 4, 7], 8, 0), (BURST, [1, 4, 7], 9, 0.5),
    ([*STEADY, *(19 + time for time in STEADY)], [1, 3, 20, 22], 23, 0)], ids=["burst", "late", "pause"])
def test_picture_and_sound_stay_together_where_the_rate_varies(tmp_path, ending, times, beeps, length, start):
    source = write_beeps(tmp_path / f"a.{ending}", times, beeps, length, start)
    made = copy_clip(source, tmp_path / "b.mp4", sound_of=source)
    shown, white, heard, end = read_beeps(tmp_path / "b.mp4")
    assert np.allclose(shown, np.add(times, shown[0]), atol=1e-4) and abs(shown[0] - start) < 0.03
    assert np.allclose(white, beeps, atol=0.03)
    assert np.allclose(heard, beeps, atol=0.03) and abs(end - length) < 0.1
    with av.open(str(tmp_path / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.frames == made.frames == len(times)
        assert 0 < float(stream.duration * stream.time_base) - times[-1] <= 0.5


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("start", [0.0, 0.52])
def test_a_constant_rate_stays_one_and_a_picture_that_starts_late_keeps_its_sound(tmp_path, ending, start):
    beeps = [start + 1, start + 3]
    source = write_beeps(tmp_path / f"a.{ending}", STEADY, beeps, 5 + start, start)
    copy_clip(source, tmp_path / "b.mp4", sound_of=source)
    shown, white, heard, end = read_beeps(tmp_path / "b.mp4")
    assert np.allclose(np.diff(shown), 0.04, atol=1e-4) and abs(shown[0] - start) < 0.03
    assert len(white) == 2 and np.allclose(white, heard, atol=0.03)
    assert end > 4.9 + start  # it goes on after the picture
    with av.open(str(tmp_path / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 25 and stream.duration * stream.time_base == 4


@pytest.mark.parametrize(("fps", "ending"), [(Fraction(24000, 1001), "mkv"), (Fraction(30000, 1001), "mp4"),
                                             (Fraction(25, 2), "ts")], ids=str)
def test_rates_survive_containers_that_round_times(tmp_path, fps, ending):
    times = [float(number / fps) for number in range(60)]
    source = write_beeps(tmp_path / f"a.{ending}", times, [], 5)
    with VideoWriter(tmp_path / "b.mp4", (48, 64), fps) as writer:
        for frame, seconds in VideoReader(source).timed():
            writer.write(frame, seconds)
    with av.open(str(tmp_path / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == fps and stream.duration * stream.time_base == 60 / fps
    capture = cv2.VideoCapture(str(tmp_path / "b.mp4"))
    assert round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 60
    assert abs(capture.get(cv2.CAP_PROP_FPS) - fps) < 1e-6


@pytest.mark.parametrize("jump", [0.0, 40.0], ids=["back", "ahead"])
def test_picture_and_sound_stay_together_where_recordings_were_joined(tmp_path, jump):
    first = write_beeps(tmp_path / "a.ts", STEADY, [1, 3], 4.3)  # the sound is longer
    content = first.read_bytes()
    if jump:
        with av.open(str(first)) as source, av.open(str(tmp_path / "moved.ts"), "w") as target:
            streams = {stream: target.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    moved = round(jump / packet.time_base)
                    packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                    packet.stream = streams[packet.stream]
                    target.mux(packet)
        content = first.read_bytes() + (tmp_path / "moved.ts").read_bytes() + content
    (tmp_path / "joined.ts").write_bytes(first.read_bytes() + content)
    copy_clip(tmp_path / "joined.ts", tmp_path / "b.mp4", sound_of=tmp_path / "joined.ts")
    shown, white, heard, _ = read_beeps(tmp_path / "b.mp4")
    parts = 4 if jump else 2
    with av.open(str(tmp_path / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert abs(float(stream.duration * stream.time_base) + shown[0] - shown[-1] - 0.04) < 0.02
    assert len(shown) == 100 * parts and np.all(np.diff(shown) > 0.03) and max(np.diff(shown)) < 0.5
    assert len(white) == 2 * parts and np.allclose(white, heard, atol=0.03)


@pytest.mark.parametrize("times", [[0, 1, 2, 600, 601], [0, 1, 2, *(3 + time for time in STEADY)],
                                   [*STEADY, 5, 6, 7], STEADY, [0], [0, 0.04, 0.0401]], ids=len)
def test_the_length_of_a_clip_is_the_end_of_its_last_frame(tmp_path, times):
    """In the edit list too, by which browsers show it; the first frames may be decoded long before."""
    with VideoWriter(tmp_path / "a.mp4", (48, 64), 25) as writer:
        for number, seconds in enumerate(times):  # calm enough for B-frames
            writer.write(np.full((48, 64, 3), 90 + number % 3, np.uint8), seconds)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert abs(stream.duration * stream.time_base - times[-1] - 0.04) < 0.001
        shown = [float(frame.time) for frame in container.decode(video=0)]
        assert np.allclose(shown, times, atol=1e-4) and np.all(np.diff(shown) > 0)
    content = (tmp_path / "a.mp4").read_bytes()
    start = content.find(b"elst") + 12
    assert abs(int.from_bytes(content[start:start + 4], "big") / 1000 - times[-1] - 0.04) < 0.002
    start = content.find(b"mdhd") + 16  # of decoding, which may begin a frame early
    unit, length = (int.from_bytes(content[place:place + 4], "big") for place in (start, start + 4))
    assert abs(length / unit - times[-1] - 0.04) < 0.05


def test_a_recording_cut_off_in_front_keeps_its_sound_in_step(tmp_path, run):
    content = write_beeps(tmp_path / "a.ts", STEADY, [1, 3], 4).read_bytes()
    (tmp_path / "cut.ts").write_bytes(content[len(content) * 45 // 100 // 188 * 188:])  # not at a key frame
    torch.save(pack_checkpoint(tiny(), CLASSES, (28, 42)), tmp_path / "m.pth")
    flags = ["--model", tmp_path / "m.pth", "--out-dir", tmp_path, "--backend", "torch", "--alpha", 1e-3]
    code, _, err = run(infer_video, "--input", tmp_path / "cut.ts", *flags)
    assert code == 0, err
    _, white, heard, end = read_beeps(tmp_path / "inference_results_video/cut.mp4")
    assert len(white) == len(heard) == 1 and abs(white[0] - heard[0]) < 0.03 and end > 2
    assert run(infer_video, "--input", tmp_path / "cut.ts", *flags, "--max-frames", 5)[0] == 0
    shown, _, _, end = read_beeps(tmp_path / "inference_results_video/cut.mp4")
    assert len(shown) == 5 and abs(end - shown[-1]) < 0.15


def test_a_source_without_times_is_shown_at_its_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(VideoReader, "own_seconds", lambda reader: 0.0)
    reader = VideoReader(write_clip(tmp_path / "a.mp4", 5, Fraction(25)))
    assert np.allclose([seconds for _, seconds in reader.timed()], np.arange(5) / 25)


def test_frames_are_shown_when_the_source_shows_them(tmp_path):
    times = [0, 1, 2, 3, 25, 26, 50, 51, 75, 76, 77, 100]  # 12 frames in 4 seconds, unevenly
    assert copy_clip(write_frames(tmp_path / "a.mkv", times), tmp_path / "b.mp4").frames == 12
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert [round(float(frame.time) * 25) for frame in container.decode(video=0)] == times


def test_a_stopped_run_does_not_wait_for_a_source_that_sends_nothing():
    def silent():
        yield 1
        threading.Event().wait(20)

    stop, started = SimpleNamespace(asked=False), time.perf_counter()
    with ReadAhead(silent(), stop=stop) as items:
        for _ in items:
            stop.asked = True
    assert time.perf_counter() - started < 10


def test_a_colon_in_a_name_is_not_a_protocol_and_a_large_number_not_a_camera(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30:05.mp4", "20240131"):
        assert len(list(VideoReader(write_clip(tmp_path / "a.mp4", 4).rename(name).name))) == 4


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


def test_a_stream_over_http_is_segmented_to_its_end(tmp_path, served, run):
    write_frames(tmp_path / "camera.ts", range(30), format="mpegts")
    torch.save(pack_checkpoint(tiny(), CLASSES, (28, 42)), tmp_path / "m.pth")
    flags = ["--model", tmp_path / "m.pth", "--out-dir", tmp_path, "--backend", "torch"]
    code, text, err = run(infer_video, "--input", f"{served}/camera.ts", *flags)
    assert code == 0, err
    (made,) = (tmp_path / "inference_results_video").glob("stream_*.mp4")
    written, dropped = len(list(VideoReader(made))), re.search(r"(\d+) frames? came faster", text)
    assert written >= 1 and written + (int(dropped[1]) if dropped else 0) >= 28
    code, _, err = run(infer_video, "--input", f"{served}/gone.ts", *flags)
    assert code == 2 and "gone.ts" in err and err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_where_a_camera_would_be(tmp_path):
    content = write_frames(tmp_path / "camera.ts", range(30), format="mpegts").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,), daemon=True).start()
    reader = VideoReader(tmp_path / "pipe")
    assert reader.live and not reader.drops and reader.size == (48, 64) and len(list(reader)) == 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_source_that_sends_nothing_can_be_stopped(tmp_path, run, monkeypatch, number):
    """OpenCV waits in C, where no signal interrupts it."""
    waiting, released = threading.Event(), threading.Event()

    class Silent:
        """A capture that opens for ever."""

        def __init__(self, *_):
            waiting.set()
            end = time.monotonic() + 20
            while not released.is_set() and time.monotonic() < end:
                with contextlib.suppress(BaseException):  # as code in C
                    released.wait(10)

    def stop():
        if waiting.wait(60):
            signal.raise_signal(number)

    monkeypatch.setattr(video.cv2, "VideoCapture", Silent)
    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    try:
        code, _, err = run(infer_video, "--input", "rtsp://host/stream", "--out-dir", tmp_path / "out")
        assert code == 128 + number and not released.is_set()
        assert "Traceback" not in err and not (tmp_path / "out").exists()
    finally:
        released.set()
        stopper.join()


def test_a_full_disk_leaves_a_playable_clip(tmp_path, monkeypatch):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    monkeypatch.setattr(video, "RESERVE", 3 << 20)
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        noise = np.random.default_rng(0)
        with pytest.raises(OSError, match="a.mp4") as error:
            with VideoWriter(folder / "a.mp4", (96, 128), 25) as writer:
                for _ in range(3000):
                    writer.write(noise.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        assert error.value.errno == 28
        count = len(list(VideoReader(folder / "a.mp4")))
        assert 0 < count == writer.frames and [path.name for path in folder.iterdir()] == ["a.mp4"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- the pipeline -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [None, 1])
def test_paint_on_a_device_is_the_overlay(keep):
    generator = np.random.default_rng(3)
    images = generator.integers(0, 256, (3, 17, 22, 3), dtype=np.uint8)
    preds = generator.choice([0, 1, 5, 255], (3, 17, 22)).astype(np.uint8)
    table = generator.integers(0, 256, (256, 3), dtype=np.uint8)
    painted = Paint(table, 0.3, keep, "cpu")(torch.from_numpy(images), torch.from_numpy(preds)).numpy()
    for image, pred, drawn in zip(images, preds, painted, strict=True):
        want = visualize.overlay(image, pred, table, 0.3, keep).astype(int)
        assert np.abs(drawn - want).max() <= 1
        assert keep is None or (drawn[pred == keep] == image[pred == keep]).all()


class BrightestColor(ExportedModel):
    """A runtime whose logits are the colors; it takes its time."""

    def run(self, batches):
        time.sleep(0.02)
        return [images.astype(np.float32) for images in batches]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_runtime_that_computes_the_next_batch_mixes_no_frames(tmp_path, batch_size):
    frames = [np.full((30, 41, 3), 40 * number, np.uint8) for number in range(5)]
    for number, frame in enumerate(frames):
        frame[:, :8 * number, number % 3] = 255
    model = BrightestColor(None, (15, 41))
    model.num_classes = 3
    predictor = Predictor(model, dict(classes=CLASSES[:3], imgsz=(15, 41)), "cpu")
    segmenter, preds = FrameSegmenter(predictor, ahead=True), []
    assert segmenter.runs_ahead and not FrameSegmenter(predictor).runs_ahead
    pipeline = Pipeline(None, segmenter, None, None, batch_size, ahead=1)
    for batch in pipeline.segmented(iter((frame, number) for number, frame in enumerate(frames))):
        preds += [(frame, pred, seconds) for frame, pred, seconds in batch]
    assert [seconds for *_, seconds in preds] == [0, 1, 2, 3, 4]
    for (frame, pred, _), expected in zip(preds, frames, strict=True):
        assert (frame == expected).all() and (pred == expected.argmax(2)).mean() > 0.95


@pytest.mark.parametrize(("count", "ahead"), [(1, 3), (7, 0), (7, 1), (7, 3)])
def test_batches_begun_ahead_come_back_in_order_and_complete(tmp_path, count, ahead):
    """As on a GPU: what was begun is waited for later, each frame with its own label map."""
    predictor = Predictor(tiny().eval(), dict(classes=CLASSES, imgsz=(28, 28)), "cpu")
    table, results, waiting = visualize.color_table(CLASSES), [], []
    reader = VideoReader(write_clip(tmp_path / "clip.mp4", count, size=(30, 41)))
    originals = [frame.copy() for frame in VideoReader(tmp_path / "clip.mp4")]
    predictor.precision = Precision("off", predictor.device)
    on_gpu = FrameSegmenter(predictor, Paint(table, 0.5, None, "cpu"))

    def segment(batch):
        wait, index = on_gpu(batch), len(waiting)
        waiting.append(True)

        def done():
            assert sum(waiting) <= ahead + 1
            waiting[index] = False
            return wait()

        return done

    def draw(frame, pred, seconds, rate):
        results.append((frame, pred))
        return frame

    with VideoWriter(tmp_path / "out.mp4", reader.size, reader.fps) as writer:
        pipeline = Pipeline(reader, segment, draw, writer, batch_size=2, ahead=ahead)
        pipeline.run(SimpleNamespace(asked=0))
    assert len(results) == len(originals) == writer.frames and not any(waiting)
    for (drawn, pred), frame in zip(results, originals, strict=True):
        want = predictor(torch.from_numpy(frame).permute(2, 0, 1)[None])[0]
        assert (pred == want).all()
        assert np.abs(drawn - visualize.overlay(frame, want, table).astype(int)).max() <= 1
