"""Label photos in a browser: paint a few strokes, see what a model makes of them, correct it, accept.

    python label.py --input photos/ --classes background person     # then open http://127.0.0.1:7861
    python label.py                                                 # go on with what is in labels/
    python label.py --input more/ --model outputs/best_model_iou.pth        # correct what a model predicts
    python label.py --data-root my_photos                           # correct the masks of a data set
    python train.py --dataset folder --data-root labels --budget 5  # train on what was accepted

Writes to OUT_DIR, at every stroke: classes.txt, pool (links to all photos), strokes, and images and masks of
the photos that were accepted. Needs the packages fastapi and uvicorn.
"""
import io
import secrets
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from config import add_run_flags, backbone_name, image_side, port_number, script_parser


def parse_args(argv=None):
    """Return the flags."""
    parser = script_parser(__doc__)
    parser.add_argument("--input", nargs="+", default=[], help="photos to add: files or folders")
    parser.add_argument("--data-root", metavar="DIR", help="data set of one's own, whose masks are to be "
                        "corrected: as of train.py --dataset folder; it stays as it is")
    parser.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="what can be painted")
    parser.add_argument("--model", metavar="FILE", help="checkpoint with the detail head to start from")
    parser.add_argument("--backbone", type=backbone_name, default="dinov2_vits14", metavar="NAME",
                        help="as in train.py (dinov2_vits14)")
    parser.add_argument("--weights", default="auto", metavar="auto|none|FILE", help="as in train.py (auto)")
    parser.add_argument("--imgsz", nargs=2, type=image_side, metavar=("H", "W"),
                        help="size at which the network sees the photos (518 518; that of --model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine "
                        "alone; who reaches the page can change the labels)")
    parser.add_argument("--port", type=port_number, default=7861, help="port to listen at (7861)")
    add_run_flags(parser)
    parser.set_defaults(out_dir="labels")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and wrong flags are answered before torch is imported

import cv2
import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

import utils
import visualize
from checkpoint import load_model, read_checkpoint
from config import IGNORE, DataOptions, InputError, one_line
from dataio.dataloader import SegmentationDataset
from dataio.feature_cache import PhotoCache
from dataio.image_rule import ImageRule
from dataio.readers import Sample, index_table
from datasets import load_data
from inference.predictor import scores_of
from labeling.folder import LabelFolder, Stroke
from labeling.learner import Learner, at_size
from model import ModelSpec, build_model
from models.upsampling import block_slices, resized_rows

SIZE = 518, 518  # of the photos as the network sees them
SHOWN = 1600  # pixels of the longer side of a photo on the page, at most
KEPT = 8  # predictions that are in memory
LOOKED_AT = 8  # photos that a Learner looks at before it learns


# --- what the page asks for -------------------------------------------------------------------------------
class Fill(BaseModel):
    """A click that fills the predicted area around it: x, y in pixels of the photo, label: a class id."""

    x: int
    y: int
    label: int = Field(ge=0, le=IGNORE)


class Acceptance(BaseModel):
    """least: probability of a prediction, below which its pixels stay without a label."""

    least: float = Field(ge=0, le=1)


class Session:
    """A LabelFolder, the features of its photos and what is learned from its strokes.

    Requests come from several threads; one computes at a time, and the background, which computes features
    and uncertainties, waits for them.
    """

    def __init__(self, folder, model, imgsz, is_trained=False):
        self.folder, self.is_trained = folder, is_trained
        samples = [Sample(path) for path in folder.paths]
        dataset = SegmentationDataset(samples, index_table(len(folder.classes)), imgsz, (), rule=folder.rule)
        precision = utils.Precision("auto", model.mean.device)
        self.cache = PhotoCache(model, dataset, folder.path / "cache", precision)
        self.model, self.learner = model, None
        self.computing, self.waiting = threading.Lock(), 0
        self.editing = threading.RLock()  # of what is known
        self.known = {}  # number: labels (h, w), at the size of the network
        self.version = 0  # of them
        for number in range(len(folder)):
            if folder.state(number) != "untouched":
                self.note(number)
        self.learned = 0  # the version that was learned
        self.predictions, self.uncertainties = {}, {}
        self.run = secrets.token_hex(8)  # numbers of photos are those of this run
        self.damaged = {}  # number of a photo: why it cannot be read after all

    @contextmanager
    def turn(self):
        """Context in which a request computes, before what the background has to do."""
        with self.editing:
            self.waiting += 1
        with self.computing:
            with self.editing:
                self.waiting -= 1
            yield

    def note(self, number):
        """Take what is known of a photo: the mask that it came with, else what was painted. A prediction that
        was accepted teaches nothing new.
        """
        with self.editing:
            mask = self.folder.read("masks", number) if self.folder.is_taken(number) else None
            size = self.cache.dataset.size
            labels = at_size(self.folder.strokes(number), size) if mask is None else \
                cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
            if (labels == IGNORE).all():
                self.known.pop(number, None)
            else:
                self.known[number] = labels
            self.version += 1

    # --- computing
    def ready_learner(self):
        """Return the Learner, made when it is first asked for, from the photos that are ready by then."""
        if self.learner is None:
            looked_at = sorted(self.cache.computed)[:LOOKED_AT]
            self.learner = Learner(self.model, self.cache.dataset.size, self.cache.features, looked_at,
                                   self.is_trained)
        return self.learner

    def predict(self, number):
        """Return the Scores of a photo at its own size, after what was painted last. Raises InputError where
        there is nothing to predict from.
        """
        if not self.known and not self.is_trained:
            raise InputError("nothing is predicted yet: paint a stroke of every class")
        self.cache.compute(number)
        learner = self.ready_learner()
        with self.editing:
            version = self.version
            known = {other: labels for other, labels in self.known.items() if other not in self.damaged}
        if self.learned != version:
            for other in known:
                self.cache.compute(other)
            learner.learn(known)
            self.learned = version
            self.predictions.clear()
        if number not in self.predictions:
            size, shares = self.folder.sizes[number], learner.shares(number)
            blocks = block_slices((1, shares.shape[1], *size), shares.device)
            scored = ((rows, resized_rows(shares, size, rows), True) for _, rows in blocks)
            self.predictions[number] = scores_of(scored, size)
            while len(self.predictions) > KEPT:
                del self.predictions[next(iter(self.predictions))]
        return self.predictions[number]

    def background(self, stopped):
        """Compute features, then uncertainties, while no request waits, until `stopped` is set."""
        while not stopped.is_set():
            busy = False
            if not self.waiting:
                with self.computing:
                    busy = self.compute_something()
            if not busy:
                time.sleep(0.05)

    def compute_something(self):
        """Compute the features of a photo, or its uncertainty; return whether there was anything to do."""
        numbers = [number for number in range(len(self.folder)) if number not in self.damaged]
        for number in numbers:
            if number not in self.cache.computed:
                return self.survive(number, self.cache.compute)
        outdated = [number for number in numbers
                    if self.uncertainties.get(number, (-1, 0))[0] != self.learned]
        if not outdated or not (self.learned or self.is_trained):
            return False
        oldest = min(outdated, key=lambda number: self.uncertainties.get(number, (-1, 0))[0])
        return self.survive(oldest, self.doubt)

    def survive(self, number, compute):
        """Call compute(number); a photo with which that fails is listed and left out. Return True."""
        try:
            compute(number)
        except Exception as error:  # the background goes on with the others
            self.damaged[number] = said(error)
            print(f"left out: {self.damaged[number]}", file=sys.stderr, flush=True)
        return True

    def doubt(self, number):
        """Compute the uncertainty of a photo."""
        self.uncertainties[number] = self.learned, self.ready_learner().uncertainty(number)

    # --- what a page asks for
    def state(self):
        """Return all that the page lists, plain values."""
        folder = self.folder
        photos = [dict(name=name.encode("utf-8", "replace").decode(), state=folder.state(number),
                       ready=number in self.cache.computed,
                       uncertainty=self.uncertainties.get(number, (0, None))[1],
                       height=folder.sizes[number][0], width=folder.sizes[number][1])
                  for number, name in enumerate(folder.names)]
        classes = [dict(name=name, color="#" + bytes(color).hex()) for name, color in folder.classes]
        return dict(classes=classes, photos=photos, run=self.run,
                    unreadable=[*folder.unreadable.values(), *self.damaged.values()])

    def photo(self, number):
        """Return the JPEG of a photo as the page shows it."""
        picture = self.folder.rule.picture(self.folder.rule.read(self.folder.paths[number]).image)
        picture = picture.permute(1, 2, 0).numpy()
        return encoded(Image.fromarray(shrunk(picture, cv2.INTER_AREA)), "JPEG")

    def painted(self, number):
        """Return the PNG of what was painted on a photo, as the page shows it."""
        return self.colors(self.folder.strokes(number))

    def overlay(self, number):
        """Return the PNG of the labels of a photo: its mask where it was accepted, else the prediction."""
        mask = self.folder.read("masks", number)
        if mask is None:
            with self.turn():
                if self.known or self.is_trained:
                    mask = self.predict(number).pred
                else:
                    mask = np.full(self.folder.sizes[number], IGNORE, np.uint8)
        return self.colors(mask)

    def colors(self, labels):
        """Return the PNG of labels (H, W) in the colors of their classes, 255 transparent."""
        labels = shrunk(labels, cv2.INTER_NEAREST)
        colors = visualize.color_table(self.folder.classes)
        picture = np.dstack([colors[labels], np.where(labels == IGNORE, 0, 255).astype(np.uint8)])
        return encoded(Image.fromarray(picture), "PNG", compress_level=1)

    def paint(self, number, stroke):
        """Paint a Stroke."""
        self.edit(number, self.folder.paint, stroke)

    def fill(self, number, click):
        """Paint the connected area of the labels under a click in a class."""
        mask = self.folder.read("masks", number)
        if mask is None:
            with self.turn():
                mask = self.predict(number).pred
        height, width = mask.shape
        if not (0 <= click.x < width and 0 <= click.y < height):
            raise InputError("the click is outside of the photo: reload the page")
        _, areas = cv2.connectedComponents((mask == mask[click.y, click.x]).astype(np.uint8), connectivity=4)
        self.edit(number, self.folder.fill, areas == areas[click.y, click.x], click.label)

    def undo(self, number):
        """Take back the last change of a photo."""
        self.edit(number, self.folder.undo)

    def accept(self, number, least):
        """Write the mask of a photo that has none."""
        if self.folder.state(number) == "accepted":
            return
        with self.turn():
            scores = self.predict(number)
        self.edit(number, self.folder.accept, scores.pred, scores.confidence, least)

    def edit(self, number, change, *args):
        """Call change(number, *args), which changes the strokes or the mask of a photo."""
        with self.editing:
            change(number, *args)
            self.note(number)


def shrunk(pixels, interpolation):
    """Return pixels (H, W, ...) at SHOWN pixels of the longer side, where they have more."""
    factor = SHOWN / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=interpolation)


def said(error):
    """Return what is said of an exception, a line."""
    return utils.message_for_user(error) or f"{type(error).__name__}: {one_line(str(error))}"


def encoded(picture, kind, **options):
    """Return the bytes of a PIL image as a file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# --- the page ---------------------------------------------------------------------------------------------
def build_app(session, hosts):
    """Return the web application of a Session, which answers to the names `hosts` alone: a page of another
    site cannot reach it under a name of its own.
    """
    from fastapi import Depends, FastAPI, HTTPException
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    def in_one_line(request, error):
        """Answer an error in a line, which is said in the terminal, too."""
        print(f"label.py: {said(error)}", file=sys.stderr, flush=True)
        return JSONResponse(dict(error=said(error)), 400)

    for kind in (InputError, OSError, RuntimeError, ValueError, MemoryError, cv2.error):
        app.add_exception_handler(kind, in_one_line)

    def photo_number(number: int, run: str):
        """Return the number of a photo. Raises the error of HTTP for one that is none."""
        if run != session.run:
            raise InputError("label.py was started again since: reload the page")
        if not 0 <= number < len(session.folder):
            raise HTTPException(404)
        return number

    Number = Annotated[int, Depends(photo_number)]

    @app.get("/")
    def page():
        return HTMLResponse((Path(__file__).parent / "labeling/page.html").read_text(encoding="utf-8"))

    @app.get("/state")
    def state():
        return session.state()

    @app.get("/photo/{number}")
    def photo(number: Number):
        return Response(session.photo(number), media_type="image/jpeg")

    @app.get("/painted/{number}")
    def painted(number: Number):
        return Response(session.painted(number), media_type="image/png")

    @app.get("/overlay/{number}")
    def overlay(number: Number):
        return Response(session.overlay(number), media_type="image/png")

    @app.post("/paint/{number}")
    def paint(number: Number, stroke: Stroke):
        session.paint(number, stroke)

    @app.post("/fill/{number}")
    def fill(number: Number, click: Fill):
        session.fill(number, click)

    @app.post("/undo/{number}")
    def undo(number: Number):
        session.undo(number)

    @app.post("/reopen/{number}")
    def reopen(number: Number):
        session.edit(number, session.folder.reopen)

    @app.post("/accept/{number}")
    def accept(number: Number, acceptance: Acceptance):
        session.accept(number, acceptance.least)

    return app


def build_learned_model(args, folder):
    """Return (the Segmenter to learn with, its size (h, w)) of the flags. Raises InputError."""
    device = utils.pick_device(args.device)
    if not args.model:
        rule = folder.rule
        spec = ModelSpec(num_classes=len(folder.classes), backbone=args.backbone, num_bands=rule.channels,
                         colors=rule.colors)
        model = build_model(spec, args.weights)
        model.normalize_bands(rule.mean, rule.std)
        return model.to(device), args.imgsz or SIZE
    model, checkpoint = load_model(args.model)
    folder.rule = ImageRule.of(checkpoint.get("image_rule"))
    names = [name for name, _ in checkpoint["classes"]]
    if getattr(getattr(model, "spec", None), "head", "") != "detail":  # an exported file has none
        raise InputError(f"--model {args.model} has no detail head, which is what learns from strokes: train "
                         "one (--head detail), or leave it out")
    if names != [name for name, _ in folder.classes]:
        raise InputError(f"--model {args.model} has the classes {' '.join(names)}, and {folder.path} others: "
                         "choose another --out-dir")
    return model.to(device), args.imgsz or checkpoint["imgsz"]


def main():
    """Serve the page until Ctrl-C."""
    args = parse_args()
    try:
        import fastapi  # noqa: F401 - build_app takes it
        import uvicorn
    except ImportError:
        raise InputError("label.py needs the packages fastapi and uvicorn: pip install fastapi "
                         "uvicorn") from None
    class_names, data = args.classes, None
    if args.data_root:
        data = load_data(DataOptions(dataset="folder", data_root=args.data_root, classes=tuple(class_names)))
        class_names = [name for name, _ in data.classes]
        for note in data.notes:
            print(f"  {note}")
    if args.model and not class_names and not (Path(args.out_dir) / "classes.txt").exists():
        class_names = [name for name, _ in read_checkpoint(args.model)["classes"]]
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as error:
        raise InputError(f"--port {args.port}: cannot listen at {args.host} ({one_line(error.strerror)}): "
                         "name another port") from None
    with listener, LabelFolder(args.out_dir, args.input, class_names, data) as folder:
        for reason in folder.unreadable.values():
            print(f"left out: {reason}", file=sys.stderr)
        model, imgsz = build_learned_model(args, folder)
        patch = model.backbone.size_divisor
        imgsz = [max(1, round(side / patch)) * patch for side in imgsz]
        session = Session(folder, model, imgsz, bool(args.model))
        stopped = threading.Event()
        thread = threading.Thread(target=session.background, args=(stopped,), daemon=True)
        thread.start()
        hosts = ["*"] if args.host == "0.0.0.0" else [args.host, "localhost"]
        train = f"python train.py --dataset folder --data-root {folder.path}"
        if not args.model and (args.backbone, args.weights) != ("dinov2_vits14", "auto"):
            train += f" --backbone {args.backbone} --weights {args.weights}"
        print(f"open http://{args.host}:{args.port} in a browser; Ctrl-C ends it\n"
              f"train on what is accepted: {train} --budget 5\n"
              f"or on the features that are there: {train} --cache-features {folder.path / 'cache'} --imgsz "
              f"{imgsz[0]} {imgsz[1]} --steps 200 --epochs 5 --batch-size 4", flush=True)
        server = uvicorn.Server(uvicorn.Config(build_app(session, hosts), log_level="error",
                                               lifespan="off"))
        try:
            with suppress(KeyboardInterrupt):  # its normal end
                server.run(sockets=[listener])
        finally:
            stopped.set()
            thread.join()


if __name__ == "__main__":
    utils.run_main(main)
