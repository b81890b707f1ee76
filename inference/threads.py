"""Threads that read ahead of the work and write behind it.

    with ReadAhead(source) as items, WriteBehind(save) as writer:
        for item in items:                            # later ones are being read
            writer.put(item)                          # returns at once, unless several are waiting already
"""
import queue
import threading
import time
from contextlib import suppress

DEPTH = 4  # items that wait between two threads


class ReadAhead:
    """Iterates over `source` in a thread of its own, up to DEPTH items ahead of whoever takes them.

    newest: for live sources, the oldest waiting item is dropped (counted in `dropped`) rather than letting
    the source wait. stop: once its `asked` is true, the items end, even where the source sends none. seconds
    = time spent in the source. What the source raises is raised to the taker.
    """

    def __init__(self, source, newest=False, stop=None):
        self.source, self.newest, self.stop = source, newest, stop
        self.queue, self.closed = queue.Queue(DEPTH), threading.Event()
        self.seconds, self.dropped = 0.0, 0
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        """Fill the queue with (item, error) pairs; the last one is (None, error or StopIteration)."""
        try:
            items = iter(self.source)
            while not self.closed.is_set():
                start = time.perf_counter()
                try:
                    item = next(items)
                finally:
                    self.seconds += time.perf_counter() - start
                self.offer((item, None), self.newest)
        except Exception as error:  # StopIteration too
            self.offer((None, error), newest=False)

    def offer(self, pair, newest):
        """Put a pair into the queue, waiting for room or, with `newest`, making it."""
        while not self.closed.is_set():
            try:
                return self.queue.put(pair, timeout=0 if newest else 0.1)
            except queue.Full:
                if newest:
                    with suppress(queue.Empty):
                        self.queue.get_nowait()
                        self.dropped += 1

    def __iter__(self):
        while True:
            try:
                item, error = self.queue.get(timeout=0.2)
            except queue.Empty:  # a source that sends nothing must not keep a stopped run alive
                if self.stop is not None and self.stop.asked:
                    return
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.thread.join(timeout=2)  # it may hang in a source that sends nothing; it ends with the process


class WriteBehind:
    """Calls function(*items) for what is put, in its order, in a thread of its own.

    seconds = time spent in the function. What it raises is raised by the next put, or at the end.
    """

    def __init__(self, function):
        self.function, self.queue, self.error, self.seconds = function, queue.Queue(DEPTH), None, 0.0
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        """Take items until None comes; after an error the rest is thrown away, so that nobody waits."""
        while (items := self.queue.get()) is not None:
            if self.error is None:
                start = time.perf_counter()
                try:
                    self.function(*items)
                except Exception as error:
                    self.error = error
                self.seconds += time.perf_counter() - start

    def put(self, *items):
        """Hand over the arguments of one call; waits while DEPTH calls are waiting already."""
        if self.error is not None:
            raise self.error
        self.queue.put(items)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, error_type, *_):
        self.queue.put(None)
        self.thread.join()
        if error_type is None and self.error is not None:
            raise self.error
