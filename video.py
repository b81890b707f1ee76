"""Reading frames from files, cameras and streams; writing clips that browsers play.

    reader = VideoReader("clip.mp4")                  # or "0", "rtsp://..."
    with VideoWriter("out.mp4", reader.size, reader.fps) as writer:
        for frame in reader:                          # (H, W, 3) uint8 RGB
            writer.write(frame)
"""
import os
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from config import InputError

try:
    import av
except ImportError:  # clips are then written as mp4v through OpenCV
    av = None

FALLBACK_FPS = Fraction(30)  # for cameras that do not say


class VideoReader:
    """Iterates over the frames of a file, camera index or stream URL as (H, W, 3) uint8 RGB, upright.

    size = (H, W) in pixels, fps = Fraction, count = frames the file claims or None, live = camera or stream.
    Raises InputError where the source does not open or gives no frame.
    """

    def __init__(self, source):
        self.source = str(source)
        self.live = self.source.isdecimal() or "://" in self.source
        if not self.live and not Path(self.source).is_file():
            raise InputError(f"--input {source} is not a file: give a video file, camera index or URL")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # its complaints come as our own line instead
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        self.capture = cv2.VideoCapture(int(self.source) if self.source.isdecimal() else self.source)
        opened, self.first = self.capture.read() if self.capture.isOpened() else (False, None)
        if not opened:
            raise InputError(f"--input {source} does not open as a video: check the file, camera or URL")
        self.size = self.first.shape[:2]
        self.fps = exact_rate(self.capture.get(cv2.CAP_PROP_FPS))
        count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if count > 0 and not self.live else None

    def __iter__(self):
        frame = self.first
        while frame is not None:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            good, frame = self.capture.read()
            frame = frame if good else None
        self.capture.release()

    def ended_early(self, frames):
        """Return whether `frames` read is clearly fewer than the file claims (which may be off by a few)."""
        return self.count is not None and frames + max(2, 0.02 * self.count) < self.count


def exact_rate(fps):
    """Return a frame rate as the fraction it stands for: 29.97 -> 30000/1001, 12.5 -> 25/2."""
    if not 0 < fps < 1000:  # also NaN
        return FALLBACK_FPS
    ntsc = [Fraction(base * 1000, 1001) for base in (24, 30, 48, 60, 120)]
    near = [rate for rate in ntsc if abs(rate - Fraction(fps)) < 0.005]
    return near[0] if near else Fraction(fps).limit_denominator(1000)


class VideoWriter:
    """Writes (H, W, 3) uint8 RGB frames of one size to an .mp4 of that size and rate.

    H.264 through PyAV where it is installed (plays in browsers), else mp4v through OpenCV. The file appears
    under its name when it is closed, whole; leaving the `with` block by an error closes it too.
    """

    def __init__(self, path, size, fps):
        self.path, self.size, self.fps, self.frames = Path(path), tuple(size), Fraction(fps), 0
        self.temporary = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.codec = "H.264" if av else "mp4v"
        if av:
            options = {"movflags": "+faststart"}  # the index in front: plays before it is loaded whole
            self.container = av.open(str(self.temporary), "w", format="mp4", options=options)
            self.stream = self.container.add_stream("libx264", rate=self.fps)
            self.stream.height, self.stream.width = self.size
            # 4:2:0 is what browsers play; it cannot hold an odd size
            self.stream.pix_fmt = "yuv444p" if self.size[0] % 2 or self.size[1] % 2 else "yuv420p"
            self.stream.options = {"crf": "20", "preset": "veryfast", "x264-params": "colormatrix=smpte170m"}
        else:
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(str(self.temporary), code, float(self.fps), self.size[::-1])
            if not self.writer.isOpened():
                raise InputError(f"{path} cannot be written as mp4v: install PyAV (pip install av)")

    def write(self, frame):
        """Append one frame. Raises ValueError for a frame of another size."""
        if frame.shape[:2] != self.size:
            raise ValueError(f"frame of {frame.shape[:2]} in a clip of {self.size}")
        self.frames += 1
        if av:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = self.frames - 1, 1 / self.fps
            self.container.mux(self.stream.encode(picture))
        else:
            self.writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self):
        """Finish the file and give it its name; without a frame nothing is left."""
        if av:
            if self.frames:
                self.container.mux(self.stream.encode(None))
            self.container.close()
        else:
            self.writer.release()
        if self.frames:
            os.replace(self.temporary, self.path)
        self.temporary.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
