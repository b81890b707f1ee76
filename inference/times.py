"""When frames and sound of a clip are played: gaps, late starts, recordings that were joined.

    timeline = FileTimeline("clip.ts")                # by the packets of the file
    timeline.seconds(2.5, 1 / 30)                     # of a frame 2.5 s after the first by its own time

What belongs together is decided here once, for picture and sound alike, so that they stay in step.
"""
from contextlib import suppress
from pathlib import Path

try:
    import av
except ImportError:
    av = None

LONGEST_GAP = 6 * 3600.0  # seconds between two frames that are believed: 2^32 ticks, as an .mp4 counts
LONGEST_JUMP = 10.0  # the same where recordings may be joined, as in MPEG-TS: the limit of ffmpeg
OVERLAP = 0.5  # seconds by which times may go back within one recording


class Timeline:
    """Puts the times of picture and sound on one axis in seconds, which runs on where recordings were joined.

    A stream's times belong to one recording while they go on. Where they jump back, or more than `longest`
    seconds ahead of all streams, the next recording begins: it follows the end of the one before, and its
    shift holds for all streams, so that picture and sound stay together. start: the time that becomes 0.
    """

    has_times = False

    def __init__(self, start=0.0, longest=LONGEST_JUMP):
        self.longest, self.end = longest, 0.0
        self.shifts = [-start]  # of the recordings
        self.current, self.last = {}, {}  # of the streams: number of the recording, seconds

    def recording_of(self, stream, time):
        """Return the number of the recording in which `time` continues a stream, None where none does."""
        last, newest = self.last.get(stream), len(self.shifts) - 1
        for number in (self.current.get(stream, 0), *range(newest, -1, -1)):
            seconds = time + self.shifts[number]
            earliest = -self.longest if last is None else last - OVERLAP
            if earliest <= seconds <= max(self.end, last or 0.0) + self.longest:
                return number
        return None

    def place(self, stream, time, shown=None, duration=0.0):
        """Return the shift of a stream's next time. shown: when it is shown, where `time` is for decoding."""
        shown = time if shown is None else shown
        number = self.recording_of(stream, time)
        if number is None:
            number = len(self.shifts)
            self.shifts.append(self.end - shown)
        shift = self.shifts[number]
        self.current[stream], self.last[stream] = number, time + shift
        self.end = max(self.end, shown + shift + duration)
        return shift

    def seconds(self, stamp, duration):
        """Return where a frame is shown. stamp: its own seconds since the first one."""
        return stamp + self.place("frames", stamp, duration=duration)


class FileTimeline(Timeline):
    """The Timeline of a file, by its packets: 0 is where its picture starts.

    has_times: whether the container says when pictures are shown. has_later_streams: whether streams begin in
    the middle of what was read, which are left out, as of a recording that was joined. Raises
    av.error.FFmpegError, ValueError or IndexError where PyAV cannot open the file, or it has no picture.
    """

    def __init__(self, path):
        # absolute, or a colon in a name would look like a protocol
        self.container = av.open(str(Path(path).absolute()), metadata_errors="replace")
        self.picture, self.sound = self.container.streams.video[0], None
        if self.container.streams.audio:
            self.sound = self.container.streams.audio[0]
        if not all(stream.time_base for stream in (self.picture, self.sound) if stream):
            raise ValueError("a stream without a unit of time")
        may_jump = self.container.format.flags & av.format.Flags.ts_discont.value
        start = seconds_of(self.picture.start_time or 0, self.picture)
        super().__init__(start, LONGEST_JUMP if may_jump else LONGEST_GAP)
        self.start, self.packets = start, self.placed_packets()
        self.has_later_streams = False
        self.latest, self.picture_end = 0.0, 0.0  # when the last picture is shown, from and to
        self.has_times = self.container.format.name != "avi"

    def read_packets(self):
        """Yield the packets of picture and sound in the file's order, as far as they can be read."""
        streams = [stream for stream in (self.picture, self.sound) if stream]
        with suppress(av.error.FFmpegError, ValueError):
            while True:
                try:
                    yield from self.container.demux(streams)
                    return
                except IndexError:  # PyAV does not know a stream that begins later
                    self.has_later_streams = True

    def placed_packets(self):
        """Yield (packet of picture or sound, its shift in seconds) in the file's order."""
        for packet in self.read_packets():
            times = [time for time in (packet.dts, packet.pts) if time is not None]
            if not times:
                continue
            stream = packet.stream
            time, shown, duration = (seconds_of(value, stream) for value in
                                     (times[0], times[-1], packet.duration or 0))
            if abs(shown - time) > self.longest:  # damaged
                shown = time
            shift = self.place(stream.index, time, shown, duration)
            if stream is self.picture and shown + shift >= self.latest:
                self.latest, self.picture_end = shown + shift, shown + shift + duration
            yield packet, shift

    def next_picture(self):
        """Read on until behind the next packet of the picture; return whether there was one."""
        return any(packet.stream is self.picture for packet, _ in self.packets)

    def read_to_end(self):
        """Close the file; return the seconds at which its picture ends."""
        while self.next_picture():
            pass
        end = seconds_of(self.picture.duration or 0, self.picture)
        if len(self.shifts) == 1 and self.latest <= end <= self.latest + self.longest:
            self.picture_end = end  # a packet's may be up to the next one's decoding
        self.container.close()
        return self.picture_end

    def seconds(self, stamp, duration):
        """Return where a frame is shown, None where no packet is shown then: OpenCV says 0 of frames without
        a time. stamp: its own seconds since the picture's start, as OpenCV says.
        """
        self.next_picture()  # of which there are at least as many as frames
        while self.recording_of("frames", stamp + self.start) is None:
            if not self.next_picture():
                return None
        return super().seconds(stamp + self.start, duration)


def seconds_of(time, stream):
    """Return a time or duration in units of a PyAV stream in seconds."""
    return float(time * stream.time_base)
