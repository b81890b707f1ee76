"""Video: frames from files, cameras and streams; clips that browsers play; a GPU between them.

    reader = VideoReader("clip.mp4")                  # or "0", "rtsp://..."
    with VideoWriter("out.mp4", reader.size, reader.fps, "clip.mp4", reader.start) as writer:
        with ReadAhead(reader.timed()) as frames, WriteBehind(writer.write) as encode:
            for frame, seconds in frames:             # (H, W, 3) uint8 RGB; later ones are being decoded
                encode.put(frame, seconds)            # returns at once, unless several are waiting already

Pipeline does the same with a model and an overlay in between. Clips are written through PyAV.
"""
import errno
import io
import itertools
import math
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from config import InputError
from inference.backends import ExportedModel
from inference.threads import ReadAhead, WriteBehind
from inference.times import FileTimeline, Timeline, av, seconds_of

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once; its complaints come as one line instead
TIMEOUT_MS = 15_000  # after which a stream that sends nothing has ended
LIVE_PROTOCOLS = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp", "mms"}
COUNTED = {".mp4", ".mov", ".m4v", ".avi"}  # containers that store how many frames they hold
VIDEO_ENDINGS = {*COUNTED, ".3gp", ".asf", ".flv", ".gif", ".m2ts", ".mkv", ".mpeg", ".mpg", ".mts", ".ogv",
                 ".ts", ".vob", ".webm", ".wmv"}
SHORT_LEAD = 0.1  # seconds of sound before the picture that may be left out
SNAP = 0.0006  # seconds that a time is off where a container counts in milliseconds
MOST_REORDERED = 16  # frames that H.264 may decode before the first one is shown
TICKS = 90_000  # per second, at least, in which frames are timed
MP4_SOUND = {"aac", "mp3", "ac3", "eac3", "alac", "opus"}  # codecs that an .mp4 may hold as they are
RESERVE = 1 << 26  # bytes of disk that stay free for the end of a clip: frames in the encoder, its index


# --- reading: files, cameras, streams ---------------------------------------------------------------------
class VideoReader:
    """Iterates over the frames of a file, camera index or stream URL as (H, W, 3) uint8 RGB, upright.

    size = (H, W) in pixels, fps = Fraction, count = frames the file claims or None, live = camera, stream or
    pipe, drops = whether frames that are not read in time are lost, start = seconds from where a file's
    picture starts to the first frame that can be decoded, end = seconds from there to the end of the picture,
    once all frames were read (0 = not known), leaves_out = whether a file was seen then to hold streams that
    begin later and are not read. Raises InputError where the source does not open or gives no frame.
    """

    def __init__(self, source):
        self.source = str(source)
        self.is_camera = self.source.isdecimal() and len(self.source) < 5  # indices are small
        self.is_url = "://" in self.source
        self.live = self.is_camera or self.is_url or Path(self.source).is_fifo()
        if not self.live and not Path(self.source).is_file():
            raise InputError(f"--input {source} is not a file: give a video file, pipe, camera index or URL")
        check_name(self.source)
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        # macOS asks for the right to use a camera in the main thread only
        may_hang = self.live and not (self.is_camera and sys.platform == "darwin")
        self.capture, self.first = in_background(self.open) if may_hang else self.open()
        if self.first is None:
            raise InputError(f"--input {source} does not open as a video: check the file, camera or URL")
        self.timeline = Timeline() if self.live else self.timeline_of_file()
        self.size = self.first.shape[:2]
        self.fps = exact_rate(self.capture.get(cv2.CAP_PROP_FPS))
        count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if count > 0 and not self.live else None
        is_broadcast = self.source.split("://")[0] in LIVE_PROTOCOLS or count <= 0
        self.drops = self.is_camera or self.is_url and is_broadcast
        self.duration = float(1 / self.fps)  # of a frame, where nothing else is known
        self.zero = self.timeline.seconds(self.own_seconds(), self.duration) or 0.0  # of the first frame
        self.end, self.leaves_out = 0.0, False
        # without times of its own, the picture is as late as the decoder says, which is wrong
        self.start = self.zero if self.timeline.has_times else 0.0

    def open(self):
        """Return (cv2.VideoCapture of the source, its first frame or None)."""
        if self.is_camera:
            capture = cv2.VideoCapture(int(self.source))
        elif self.is_url:
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS]
            capture = cv2.VideoCapture(self.source, cv2.CAP_FFMPEG, limits)
        else:  # absolute, or a colon in a name would look like a protocol
            capture = cv2.VideoCapture(str(Path(self.source).absolute()))
        opened, first = capture.read()
        return capture, first if opened else None

    def timeline_of_file(self):
        """Return the FileTimeline, a plain Timeline where PyAV cannot open what OpenCV can."""
        if av is not None:
            with suppress(av.error.FFmpegError, IndexError, ValueError, OSError):
                return FileTimeline(self.source)
        return Timeline()

    def own_seconds(self):
        """Return when the frame that was read is shown, as the source counts."""
        return self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000

    def __iter__(self):
        return (frame for frame, _ in self.timed())

    def timed(self):
        """Yield (frame, seconds since the first one): as the file says, else by the clock."""
        begun, seconds, stamp, frame = time.perf_counter(), 0.0, self.own_seconds(), self.first
        while True:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), seconds
            read, frame = self.capture.read()
            if not read:
                break
            last, stamp = stamp, self.own_seconds()
            if self.drops:
                seconds = time.perf_counter() - begun
                continue
            shown = None if stamp == last else self.timeline.seconds(stamp, self.duration)
            if shown is None:  # the source does not say
                seconds += self.duration
            else:
                seconds = max(shown - self.zero, seconds + 1 / TICKS)
        self.capture.release()
        if isinstance(self.timeline, FileTimeline):
            self.end = self.timeline.read_to_end() - self.zero
            self.leaves_out = self.timeline.has_later_streams

    def ended_early(self, frames):
        """Return whether `frames` is clearly fewer than the file claims, which may be off by a few; False
        where the container does not store their number, so that `count` is a guess from the duration.
        """
        is_stored = Path(self.source).suffix.lower() in COUNTED
        return is_stored and self.count is not None and frames + max(2, 0.02 * self.count) < self.count


def in_background(function):
    """Return function(), called in a thread: a signal interrupts the wait for it, but not OpenCV itself."""
    done = queue.Queue()

    def work():
        try:
            done.put((function(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        with suppress(queue.Empty):
            result, error = done.get(timeout=0.1)
            break
    if error is not None:
        raise error
    return result


def check_name(path):
    """Raise InputError for a path that is not UTF-8, at which OpenCV ends the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: its name is not UTF-8: rename the file or folder") from None


def exact_rate(fps):
    """Return a frame rate as the fraction it stands for: 29.97 -> 30000/1001, 12.5 -> 25/2."""
    if not 0.001 <= fps < 1000:  # also NaN: cameras do not always say
        return Fraction(30)
    for base in (24, 30, 48, 60, 120):
        ntsc = Fraction(base * 1000, 1001)
        if abs(ntsc - Fraction(fps)) < 0.005:
            return ntsc
    return Fraction(fps).limit_denominator(1000)


# --- writing: H.264, with the sound of the input ----------------------------------------------------------
def require_encoder():
    """Raise InputError where clips cannot be written."""
    if av is None or "libx264" not in av.codecs_available:
        raise InputError("clips are written by PyAV and its H.264 encoder, which are not installed: "
                         "pip install av")


class SoundCopy:
    """Copies the sound of one file into another, as it is, while that one's frames are written.

    start: that of the file's VideoReader. seconds = how much was copied, lead = seconds by which the sound
    begins before the picture. Sound that cannot be read or written ends early; the picture goes on.
    """

    def __init__(self, path, container, start=0.0):
        self.timeline = FileTimeline(path)  # has to outlive its packets
        if (stream := self.timeline.sound) is None:
            raise ValueError("no sound")
        if (name := stream.codec_context.codec.canonical_name) not in MP4_SOUND:
            raise ValueError(f"an .mp4 cannot hold {name}")
        with av.open(io.BytesIO(), "w", format="mp4") as trial:  # fails where nothing is known of the sound
            trial.add_stream_from_template(stream)
            trial.start_encoding()
        self.container, self.stream = container, container.add_stream_from_template(stream)
        early = start + self.timeline.start - seconds_of(stream.start_time or 0, stream)
        self.lead = early if SHORT_LEAD < early <= self.timeline.longest else 0.0
        self.packets, self.seconds = self.moved_packets(start - self.lead), 0.0
        self.packet = next(self.packets, None)

    def moved_packets(self, start):
        """Yield the packets in order, from `start` of the timeline on, which becomes 0."""
        last = -1
        for packet, shift in self.timeline.packets:
            if packet.stream is self.timeline.sound and None not in (packet.pts, packet.dts):
                moved = round((shift - start) / packet.time_base)
                packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                if packet.dts > last:
                    last = packet.dts
                    yield packet

    def copy_until(self, seconds):
        """Write the sound up to `seconds` after the start of the clip."""
        while self.packet is not None and self.packet.pts * self.packet.time_base <= seconds:
            self.seconds = float(self.packet.pts * self.packet.time_base)
            self.packet.stream = self.stream
            if mux(self.container, self.packet):
                self.packet = next(self.packets, None)
            else:
                self.packet = None


def mux(container, packet):
    """Write a packet to a PyAV container; return whether it, and what waited for it, fits in there. Raises
    OSError where the disk is full.
    """
    try:
        container.mux(packet)
    except OSError:
        raise
    except (av.error.FFmpegError, ValueError):
        return False
    return True


class VideoWriter:
    """Writes (H, W, 3) uint8 RGB frames of one size to an H.264 .mp4 of that size, each at its own time.

    fps: the rate of frames that come without times, and that the encoder plans for. sound_of: a file whose
    sound is copied (`sound`: its SoundCopy, or None); start: that of its VideoReader; preset: x264's. The
    file appears under its name at the end of the `with` block, with what was written until then, also where
    an error ends it; without a frame nothing is left. Raises InputError where PyAV is missing.
    """

    def __init__(self, path, size, fps, sound_of=None, start=0.0, preset="veryfast"):
        require_encoder()
        self.path, self.size, self.fps, self.frames = Path(path), tuple(size), Fraction(fps), 0
        check_name(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        self.temporary = temporary.absolute()  # a colon in a name would look like a protocol
        options = {"movflags": "+faststart"}  # the index in front: plays before it is loaded completely
        self.container = av.open(str(self.temporary), "w", format="mp4", options=options)
        self.stream = self.container.add_stream("libx264", rate=self.fps)
        # at a constant rate every frame lasts a whole number of ticks
        rate = self.fps.numerator if self.fps.numerator < TICKS else TICKS
        self.tick = Fraction(1, rate * math.ceil(TICKS / rate))
        self.stream.time_base = self.stream.codec_context.time_base = self.tick
        self.stream.codec_context.framerate = self.fps
        self.stream.height, self.stream.width = self.size
        # 4:2:0 is what browsers play; it cannot hold an odd size
        self.stream.pix_fmt = "yuv444p" if self.size[0] % 2 or self.size[1] % 2 else "yuv420p"
        self.stream.options = {"crf": "20", "preset": preset, "x264-params": "colormatrix=smpte170m"}
        self.position, self.end = None, 0.0  # of the last frame, in ticks; of the clip, in seconds
        self.packets = 0  # that came from the encoder
        self.at_rate = True  # every frame until now was shown at a multiple of 1 / fps
        self.is_steady = True  # at the next one
        self.sound = None
        if sound_of:
            # it may have none, or none that an .mp4 can hold
            with suppress(av.error.FFmpegError, IndexError, ValueError, OSError):
                self.sound = SoundCopy(sound_of, self.container, start)
        self.lead = self.sound.lead if self.sound else 0.0

    def position_of(self, seconds):
        """Return where a frame is shown, in ticks: behind the last one, None = 1 / fps behind it."""
        step = round(1 / self.fps / self.tick)
        if seconds is None:
            return 0 if self.position is None else self.position + step
        number = round(seconds * self.fps)
        self.at_rate = self.at_rate and abs(seconds - number / self.fps) < SNAP
        position = number * step if self.at_rate else round(seconds / self.tick)
        return position if self.position is None else max(position, self.position + 1)

    def write(self, frame, seconds=None):
        """Append one frame, shown `seconds` after the first.

        Raises ValueError for a frame of another size, OSError where the disk is full.
        """
        if frame.shape[:2] != self.size:
            raise ValueError(f"frame of {frame.shape[:2]} in a clip of {self.size}")
        if shutil.disk_usage(self.path.parent).free < RESERVE:  # once it is full, no index can be written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.frames += 1
        self.position = self.position_of(seconds)
        self.is_steady &= abs(self.position * self.tick - (self.frames - 1) / self.fps) < SNAP
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self.position + round(self.lead / self.tick), self.tick
        self.end = float(self.position * self.tick + 1 / self.fps)
        if self.sound:
            self.sound.copy_until(self.lead + self.end)
        self.mux(self.stream.encode(picture))

    def extend(self, end):
        """Show the last frame until `end`, in seconds after the first, and copy what is left of the sound."""
        if end > self.position * self.tick + 2 * SNAP and abs(end - self.end) > 2 * SNAP:
            self.end = end
        if self.sound:
            self.sound.copy_until(math.inf)

    def finish(self):
        """Write what waits in the encoder; the last frame lasts until the end of the clip."""
        packets = self.stream.encode(None)
        self.is_steady = self.is_steady and abs(self.end - self.frames / self.fps) < SNAP
        if packets and not self.is_steady:
            last = packets[-1]  # to be decoded, a B-frame perhaps: what comes after it counts as its own
            last.dts, last.duration = last.pts, round((self.lead + self.end) / self.tick) - last.pts
        self.mux(packets)

    def mux(self, packets):
        """Write packets of the encoder.

        An .mp4 adds up its length from the steps between times of decoding, which begin as far before the
        first frame as the first B-frames need: seconds, where the first frames are shown for long.
        """
        start = round(self.lead / self.tick)
        for packet in packets:
            if not self.is_steady and packet.dts < start:
                packet.dts = start - MOST_REORDERED + self.packets
            self.packets += 1
            if not mux(self.container, packet) and self.sound:  # whose packets wait for those of the picture
                self.sound.packet = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            if self.frames:
                self.finish()
            self.container.close()
            if self.sound:
                self.sound.timeline.container.close()
            if self.frames:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


# --- segmenting, and painting on a GPU --------------------------------------------------------------------
class FrameSegmenter:
    """The `segment` of a Pipeline. On a GPU it begins with a batch, and nothing but its result waits; so it
    does with the runtime of an ExportedModel where it may run `ahead`, in a thread.

    predictor: a Predictor; paint: a Paint, None = frames as they are. Memory that is pinned lets copies run
    beside the GPU's work; torch keeps and reuses it. runs_ahead: whether a batch should be begun before the
    last one is fetched.
    """

    def __init__(self, predictor, paint=None, ahead=False):
        self.predictor, self.paint, self.device = predictor, paint, predictor.device
        self.pinned = self.device.type == "cuda"
        # two threads of torch would fight for its pool of threads
        has_thread = ahead and isinstance(predictor.model, ExportedModel)
        self.thread = ThreadPoolExecutor(1) if has_thread else None
        self.runs_ahead = ahead and (self.pinned or has_thread)

    def fetch(self, values):
        """Begin to copy a tensor to the CPU; return where it will be."""
        target = torch.empty(values.shape, dtype=values.dtype, pin_memory=self.pinned)
        return target.copy_(values, non_blocking=True)

    @torch.inference_mode()
    def __call__(self, frames):
        staged = torch.empty(len(frames), *frames[0].shape, dtype=torch.uint8, pin_memory=self.pinned)
        np.stack(frames, out=staged.numpy())
        images = staged.to(self.device, non_blocking=True)  # (n, H, W, 3)
        inputs = self.predictor.rule.convert_frames(images.permute(0, 3, 1, 2))
        if self.device.type == "cpu" and not self.paint:
            maps = self.predictor.begin(inputs, self.thread and self.thread.submit)
            return lambda: list(zip(frames, maps().numpy(), strict=True))
        preds = self.predictor.label_maps(inputs)
        drawn = self.fetch(self.paint(images, preds)).numpy() if self.paint else frames
        ids = self.fetch(preds).numpy()
        done = torch.cuda.current_stream(self.device).record_event() if self.pinned else None

        def wait():
            if done:
                done.synchronize()
            return list(zip(drawn, ids, strict=True))

        return wait


class Paint:
    """visualize.overlay on a device: frames (n, H, W, 3), class ids (n, H, W) -> (n, H, W, 3), all uint8."""

    def __init__(self, table, alpha, keep, device):
        self.colors = torch.from_numpy(table).to(device).float() * alpha  # (256, 3)
        self.weights = torch.full((256, 1), 1 - alpha, device=device)  # of the frame below
        if keep is not None:
            self.colors[keep], self.weights[keep] = 0, 1

    def __call__(self, frames, preds):
        ids = preds.int()
        return (frames * self.weights[ids] + self.colors[ids]).round_().to(torch.uint8)


# --- the pipeline -----------------------------------------------------------------------------------------
def draw_rate(frame, rate):
    """Write the frames per second into the top left corner of a frame (H, W, 3) uint8, in place."""
    scale = max(0.4, frame.shape[0] / 720)
    text, font, thickness = f"{rate:.1f} FPS", cv2.FONT_HERSHEY_SIMPLEX, max(1, round(1.5 * scale))
    (width, height), _ = cv2.getTextSize(text, font, scale, thickness)
    margin = round(10 * scale)
    cv2.rectangle(frame, (0, 0), (width + 2 * margin, height + 2 * margin), (0, 0, 0), -1)
    cv2.putText(frame, text, (margin, height + margin), font, scale, (255, 255, 255), thickness, cv2.LINE_AA)


@dataclass
class Pipeline:
    """Reads, segments, draws and writes the frames of a clip, camera or stream.

    segment: list of frames (H, W, 3) uint8 -> function that returns [(frame, label map (H, W))], which is
    called when `ahead` more batches were begun; draw: (frame, label map, seconds since the first frame,
    frames per second until now) -> frame; show: frame -> whether to stop. Decoding, the model, drawing and
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
    model_seconds: float = 0.0  # spent in `segment` and what it returns

    def run(self, stop):
        """Work until the frames, max_frames or stop.asked end it; the model and show() run in this thread.

        Returns ({stage: busy seconds}, number of frames that a live source had to drop).
        """
        reader, times = self.reader, deque([time.perf_counter()], maxlen=51)  # of the last fifty frames
        # of a live source, more are read: those that are dropped do not count
        source = reader.timed() if reader.drops else itertools.islice(reader.timed(), self.max_frames)
        total = min(filter(None, (reader.count, self.max_frames)), default=None)

        def draw_and_encode(frame, pred, seconds):
            times.append(time.perf_counter())
            drawn = self.draw(frame, pred, seconds, (len(times) - 1) / (times[-1] - times[0]))
            encode.put(drawn, seconds)
            return drawn

        with (ReadAhead(source, newest=reader.drops, stop=stop) as frames,
              WriteBehind(self.writer.write) as encode, WriteBehind(draw_and_encode) as draw,
              tqdm(total=total, unit="frame", leave=False, disable=None) as bar):
            for batch in self.segmented(itertools.islice(frames, self.max_frames)):
                for frame, pred, seconds in batch:
                    if self.show is None:
                        draw.put(frame, pred, seconds)
                    elif self.show(draw_and_encode(frame, pred, seconds)):
                        stop.asked = signal.SIGINT  # as Ctrl-C
                        break
                bar.update(len(batch))
                if stop.asked:
                    break
        stages = dict(decode=frames.seconds, model=self.model_seconds, draw=draw.seconds,
                      encode=encode.seconds)
        return stages, frames.dropped

    def segmented(self, frames):
        """Yield batches [(frame, label map, seconds)] in order, each after `ahead` more were begun.

        frames: of VideoReader.timed.
        """
        begun = deque()  # (seconds of the frames, function that waits for the result)
        while batch := list(itertools.islice(frames, self.batch_size)):
            start = time.perf_counter()
            begun.append(([seconds for _, seconds in batch], self.segment([frame for frame, _ in batch])))
            self.model_seconds += time.perf_counter() - start
            if len(begun) > self.ahead:
                yield self.wait_for(*begun.popleft())
        while begun:
            yield self.wait_for(*begun.popleft())

    def wait_for(self, times, wait):
        """Return the [(frame, label map, seconds)] of a batch that was begun."""
        start = time.perf_counter()
        pairs = wait()
        self.model_seconds += time.perf_counter() - start
        return [(frame, pred, seconds) for (frame, pred), seconds in zip(pairs, times, strict=True)]
