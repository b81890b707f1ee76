"""Threads before and behind the work: the next items are read and the last ones written meanwhile.

    with ReadAhead(paths_read) as images, WriteBehind(save) as writer:
        for image in images:
            writer.put(work(image))                   # returns at once, unless several wait already
"""
import queue
import threading
import time

DEPTH = 4  # items that wait between two threads


class ReadAhead:
    """Iterates over `source` in a thread of its own, up to `depth` items ahead of whoever takes them.

    newest: for live sources: the oldest waiting item is dropped (counted in `dropped`) rather than letting
    the source wait. stop: once its `asked` is true, the items end, even where the source sends none. seconds
    = time spent in the source. What the source raises is raised to the taker.
    """

    def __init__(self, source, depth=DEPTH, newest=False, stop=None):
        self.source, self.newest, self.stop = source, newest, stop
        self.queue, self.closed = queue.Queue(depth), threading.Event()
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
                self.offer((item, None))
        except Exception as error:  # StopIteration too
            self.offer((None, error), keep=True)

    def offer(self, pair, keep=False):
        """Put a pair into the queue, waiting for room or, with `newest`, making it."""
        while not self.closed.is_set():
            try:
                return self.queue.put(pair, timeout=0 if self.newest and not keep else 0.1)
            except queue.Full:
                if self.newest and not keep:
                    self.drop()

    def drop(self):
        """Throw the oldest waiting item away."""
        try:
            self.queue.get_nowait()
            self.dropped += 1
        except queue.Empty:
            pass

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
    """Calls function(item) for every item that is put, in their order, in a thread of its own.

    seconds = time spent in the function. What it raises is raised by the next put, or at the end.
    """

    def __init__(self, function, depth=DEPTH):
        self.function, self.queue, self.error, self.seconds = function, queue.Queue(depth), None, 0.0
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        """Take items until None comes; after an error the rest is thrown away, so that nobody waits."""
        while (item := self.queue.get()) is not None:
            if self.error is None:
                start = time.perf_counter()
                try:
                    self.function(*item)
                except Exception as error:
                    self.error = error
                self.seconds += time.perf_counter() - start

    def put(self, *item):
        """Hand over the arguments of one call; waits while `depth` items wait already."""
        if self.error is not None:
            raise self.error
        self.queue.put(item)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, *_):
        self.queue.put(None)
        self.thread.join()
        if kind is None and self.error is not None:
            raise self.error
