"""Reading frames from files, cameras and streams; writing clips that browsers play; threads between them.

    reader = VideoReader("clip.mp4")                  # or "0", "rtsp://..."
    with VideoWriter("out.mp4", reader.size, reader.fps, sound_of="clip.mp4") as writer:
        with ReadAhead(reader) as frames, WriteBehind(writer.write) as encode:
            for frame in frames:                      # (H, W, 3) uint8 RGB; the next ones are decoded
            meanwhile
                encode.put(frame)                     # returns at once, unless several wait already
"""
import errno
import itertools
import os
import shutil
import time
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from collections.abc import Callable

import cv2
import numpy as np
import torch
from tqdm import tqdm

from config import InputError
from inference.threads import ReadAhead, WriteBehind

try:
    import av
except ImportError:  # clips are then written as mp4v through OpenCV
    av = None

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once; its complaints come as one line instead
FALLBACK_FPS = Fraction(30)  # for cameras that do not say
TIMEOUT_MS = 15_000  # after which a stream that sends nothing has ended
LIVE_PROTOCOLS = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp", "mms"}
COUNTED = {".mp4", ".mov", ".m4v", ".avi"}  # containers that store how many frames they hold
LONGEST_GAP = 10.0  # seconds between two frames of a file that are believed
MP4_SOUND = {"aac", "mp3", "ac3", "eac3", "alac", "opus"}  # codecs that an .mp4 may hold as they are
RESERVE = 1 << 26  # bytes of disk that stay free for the end of a clip: frames in the encoder, its index


# --- files, cameras, streams ------------------------------------------------------------------------------
class VideoReader:
    """Iterates over the frames of a file, camera index or stream URL as (H, W, 3) uint8 RGB, upright.

    size = (H, W) in pixels, fps = Fraction, count = frames the file claims or None, live = camera, stream or
    pipe, drops = whether frames are lost that are not taken in time. Raises InputError where the source does
    not open or gives no frame.
    """

    def __init__(self, source):
        self.source = str(source)
        self.live = self.source.isdecimal() or "://" in self.source or Path(self.source).is_fifo()
        if not self.live and not Path(self.source).is_file():
            raise InputError(f"--input {source} is not a file: give a video file, pipe, camera index or URL")
        check_name(self.source)
        if self.source.isdecimal() and len(self.source) > 4:
            raise InputError(f"--input {source} is no number of a camera: they count from 0")
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        if "://" in self.source:
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS]
            self.capture = cv2.VideoCapture(self.source, cv2.CAP_FFMPEG, limits)
        else:
            # the whole path, since a colon in a file's name would look like a protocol
            plain = int(self.source) if self.source.isdecimal() else str(Path(self.source).absolute())
            self.capture = cv2.VideoCapture(plain)
        opened, self.first = self.capture.read() if self.capture.isOpened() else (False, None)
        if not opened:
            raise InputError(f"--input {source} does not open as a video: check the file, camera or URL")
        self.size = self.first.shape[:2]
        self.fps = exact_rate(self.capture.get(cv2.CAP_PROP_FPS))
        count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if count > 0 and not self.live else None
        sends = self.source.split("://")[0] in LIVE_PROTOCOLS or "://" in self.source and count <= 0
        self.drops = self.source.isdecimal() or sends

    def __iter__(self):
        return (frame for frame, _ in self.timed())

    def timed(self):
        """Yield (frame, seconds since the first one): as the file says, else by the clock."""
        frame, start, shift, last = self.first, time.perf_counter(), None, 0.0
        while frame is not None:
            seconds = time.perf_counter() - start
            if not self.drops:
                stamp = self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if shift is None:
                    shift = stamp
                elif not 0 <= stamp - shift - last < LONGEST_GAP:  # recordings that were joined
                    shift = stamp - last - float(1 / self.fps)
                seconds = last = stamp - shift
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), seconds
            good, frame = self.capture.read()
            frame = frame if good else None
        self.capture.release()

    def ended_early(self, frames):
        """Return whether `frames` read is clearly fewer than the file claims (which may be off by a few).

        Only where the container stores their number; elsewhere it is a guess from the duration.
        """
        stored = Path(self.source).suffix.lower() in COUNTED
        return stored and self.count is not None and frames + max(2, 0.02 * self.count) < self.count


def check_name(path):
    """Raise InputError for a path that is not UTF-8, at which OpenCV ends the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: its name is not UTF-8, which clips need: rename the file or folder"
                         ) from None


def exact_rate(fps):
    """Return a frame rate as the fraction it stands for: 29.97 -> 30000/1001, 12.5 -> 25/2."""
    if not 0 < fps < 1000:  # also NaN
        return FALLBACK_FPS
    ntsc = [Fraction(base * 1000, 1001) for base in (24, 30, 48, 60, 120)]
    near = [rate for rate in ntsc if abs(rate - Fraction(fps)) < 0.005]
    return near[0] if near else Fraction(fps).limit_denominator(1000)


def has_h264():
    """Return whether PyAV is installed with an H.264 encoder."""
    return av is not None and "libx264" in av.codecs_available


class SoundCopy:
    """Copies the sound of one file into another, as it is, while that one's frames are written.

    seconds = how much was copied. Sound that cannot be read or written ends early; the picture goes on.
    """

    def __init__(self, path, container):
        self.container, self.source = container, av.open(str(Path(path).absolute()))
        stream, picture = self.source.streams.audio[0], self.source.streams.video[0]
        name = stream.codec_context.codec.canonical_name
        if name not in MP4_SOUND:
            raise ValueError(f"an .mp4 cannot hold {name}")
        self.stream = container.add_stream_from_template(stream)
        start = (picture.start_time or 0) * picture.time_base  # files need not start at 0
        self.shift, self.last, self.seconds = round(start / stream.time_base), None, 0.0
        self.packets = self.source.demux(stream)
        self.packet = self.following()

    def following(self):
        """Return the next packet that lies after the picture's start and the last packet, or None."""
        try:
            for packet in self.packets:
                if packet.pts is None or packet.dts is None:
                    continue
                packet.pts, packet.dts = packet.pts - self.shift, packet.dts - self.shift
                if packet.dts >= 0 and (self.last is None or packet.dts > self.last):
                    return packet
        except (av.error.FFmpegError, ValueError):
            pass
        return None

    def until(self, seconds):
        """Write the sound up to `seconds` after the start."""
        while self.packet is not None and self.packet.pts * self.packet.time_base <= seconds:
            self.last, self.seconds = self.packet.dts, float(self.packet.pts * self.packet.time_base)
            self.packet.stream = self.stream
            try:
                self.container.mux(self.packet)
            except ValueError:  # out of order for the container
                self.packet = None
                return
            self.packet = self.following()


class VideoWriter:
    """Writes (H, W, 3) uint8 RGB frames of one size to an .mp4 of that size and rate.

    H.264 through PyAV where it is installed (plays in browsers), else mp4v through OpenCV. sound_of: a file
    whose sound is copied (PyAV only; `sound` says whether it is). The file appears under its name when it is
    closed, whole; leaving the `with` block by an error closes it too, with what was written before.
    """

    def __init__(self, path, size, fps, sound_of=None):
        self.path, self.size, self.fps, self.frames = Path(path), tuple(size), Fraction(fps), 0
        temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        self.temporary = temporary.absolute()  # a colon in a name would look like a protocol
        check_name(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.codec, self.sound, self.position = "H.264" if has_h264() else "mp4v", None, -1
        if self.codec == "H.264":
            options = {"movflags": "+faststart"}  # the index in front: plays before it is loaded whole
            self.container = av.open(str(self.temporary), "w", format="mp4", options=options)
            self.stream = self.container.add_stream("libx264", rate=self.fps)
            self.stream.height, self.stream.width = self.size
            # 4:2:0 is what browsers play; it cannot hold an odd size
            self.stream.pix_fmt = "yuv444p" if self.size[0] % 2 or self.size[1] % 2 else "yuv420p"
            self.stream.options = {"crf": "20", "preset": "veryfast", "x264-params": "colormatrix=smpte170m"}
            self.sound = self.open_sound(sound_of)
        else:
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(str(self.temporary), code, float(self.fps), self.size[::-1])
            if not self.writer.isOpened():
                raise InputError(f"{path} cannot be written as mp4v: install PyAV (pip install av)")

    def open_sound(self, path):
        """Return the SoundCopy of a file, or None where it has no sound that an .mp4 may hold."""
        try:
            return SoundCopy(path, self.container) if path else None
        except (av.error.FFmpegError, IndexError, ValueError, OSError):
            return None

    def write(self, frame, seconds=None):
        """Append one frame, shown `seconds` after the first, by default as long after the last as fps says.

        Raises ValueError for a frame of another size, OSError where the disk is full.
        """
        if frame.shape[:2] != self.size:
            raise ValueError(f"frame of {frame.shape[:2]} in a clip of {self.size}")
        if shutil.disk_usage(self.path.parent).free < RESERVE:  # once it is full, no index can be written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.frames, before = self.frames + 1, self.position
        self.position = max(before + 1, round((seconds or 0.0) * self.fps))  # in units of 1 / fps
        if self.codec == "H.264":
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = self.position, 1 / self.fps
            if self.sound:
                self.sound.until((self.position + 1) / self.fps)
            self.container.mux(self.stream.encode(picture))
        else:
            for _ in range(self.position - before):  # this way of writing knows no times
                self.writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self):
        """Finish the file and give it its name; without a frame nothing is left."""
        try:
            if self.codec == "H.264":
                if self.frames:
                    self.container.mux(self.stream.encode(None))
                self.container.close()
            else:
                self.writer.release()
            if self.frames:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# --- the pipeline -----------------------------------------------------------------------------------------
def draw_rate(frame, rate):
    """Write the frames per second into the top left corner of a frame (H, W, 3) uint8, in place."""
    scale = max(0.4, frame.shape[0] / 720)
    text, font, thickness = f"{rate:.1f} FPS", cv2.FONT_HERSHEY_SIMPLEX, max(1, round(1.5 * scale))
    (width, height), _ = cv2.getTextSize(text, font, scale, thickness)
    margin = round(10 * scale)
    cv2.rectangle(frame, (0, 0), (width + 2 * margin, height + 2 * margin), (0, 0, 0), -1)
    cv2.putText(frame, text, (margin, height + margin), font, scale, (255, 255, 255), thickness, cv2.LINE_AA)


class Rate:
    """Frames per second of the last half a hundred frames that were drawn."""

    def __init__(self):
        self.times = deque([time.perf_counter()], maxlen=51)

    def tick(self):
        """Count one frame and return the rate."""
        self.times.append(time.perf_counter())
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def batches_of(frames, size):
    """Yield lists of up to `size` frames."""
    while batch := list(itertools.islice(frames, size)):
        yield batch


def at_once(predictor):
    """Return the `segment` of a Pipeline that calls a function of images (n, 3, H, W) uint8 and waits."""
    def segment(frames):
        preds = predictor(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))  # (n, H, W) uint8
        return lambda: list(zip(frames, preds, strict=True))

    return segment


@dataclass
class Pipeline:
    """Reads, predicts, draws and writes the frames of a clip, camera or stream.

    segment: list of frames (H, W, 3) uint8 -> function that returns [(frame, label map (H, W))], which is
    called when `ahead` more batches were begun; draw: (frame, label map, seconds since the first frame,
    frames per second so far) -> frame; show: frame -> whether to stop. Decoding, the model, drawing and
    encoding each have a thread, with short queues between them, so that the slowest alone decides.
    """

    reader: VideoReader
    segment: Callable
    draw: Callable
    writer: VideoWriter
    batch_size: int = 1
    max_frames: int = None
    show: Callable = None
    ahead: int = 0

    def run(self, stop):
        """Work until the frames, max_frames or stop.asked end it; the model and show() run in this thread.

        Returns ({stage: busy seconds}, number of frames that a live source had to drop).
        """
        reader, rate, begun, model_seconds = self.reader, Rate(), deque(), 0.0
        total = min(filter(None, (reader.count, self.max_frames)), default=None)
        # what a live source drops does not count
        source = reader.timed() if reader.drops else itertools.islice(reader.timed(), self.max_frames)

        def finish(frame, pred, seconds):
            drawn = self.draw(frame, pred, seconds, rate.tick())
            encode.put(drawn, seconds)
            return drawn

        with (ReadAhead(source, newest=reader.drops, stop=stop) as frames,
              WriteBehind(self.writer.write) as encode, WriteBehind(finish) as draw,
              tqdm(total=total, unit="frame", leave=False, disable=None) as bar):
            batches = batches_of(itertools.islice(frames, self.max_frames), self.batch_size)
            for batch in itertools.chain(batches, [[]] * self.ahead):  # at the end nothing more is begun
                start = time.perf_counter()
                if batch:
                    begun.append(([seconds for _, seconds in batch], self.segment([one for one, _ in batch])))
                segmented = []
                if begun and (len(begun) > self.ahead or not batch):
                    times, wait = begun.popleft()
                    segmented = [(*pair, seconds) for pair, seconds in zip(wait(), times, strict=True)]
                model_seconds += time.perf_counter() - start
                for one in segmented:
                    if self.show is None:
                        draw.put(*one)
                    elif self.show(finish(*one)):
                        stop.asked = True
                        break
                bar.update(len(segmented))
                if stop.asked:
                    break
        stages = dict(decode=frames.seconds, model=model_seconds, draw=draw.seconds, encode=encode.seconds)
        return stages, frames.dropped
