"""Experiment trackers: rows of history.jsonl and pictures of a run, mirrored to where people look at them.

    with Trackers(["tensorboard", "wandb"], "outputs", settings, classes) as trackers:
        trackers.follow(history)                       # rows that they do not have yet, and the pictures

Each is optional and gets everything through its own library, whose environment variables say where to
(WANDB_MODE=offline, MLFLOW_TRACKING_URI ...). A run that has begun never depends on one: what fails is a
warning.
"""
import importlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from config import InputError
from utils import write_atomically

NOTES = "trackers.json"  # which runs of the trackers belong to this one, and the epochs they have
PLOTS = ("loss", "accuracy", "miou", "per_class_iou", "confusion_matrix")


def scalars(row, classes):
    """Return {name: number} of a row of the history: train/loss, val/miou, iou/<class> ..., without None."""
    values = {re.sub(r"^(train|val)_", r"\1/", name): value for name, value in row.items()}
    ious = values.pop("per_class_iou")
    values |= {f"iou/{name}": iou for (name, _), iou in zip(classes, ious, strict=True)}
    del values["epoch"]
    return {name: value for name, value in values.items() if value is not None}


class TensorBoard:
    """Event files in OUT_DIR/tensorboard, for `tensorboard --logdir OUT_DIR`."""

    module, package = "torch.utils.tensorboard", "tensorboard"

    def __init__(self, folder, settings, id, epochs):
        tensorboard = importlib.import_module(self.module)
        self.writer = tensorboard.SummaryWriter(folder / "tensorboard", purge_step=epochs + 1 if id else None)
        self.id = "tensorboard"
        if not id:
            self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```")

    def add(self, epoch, values):
        """Log {name: number} of an epoch."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    def add_picture(self, epoch, name, path):
        """Log a picture of an epoch."""
        picture = np.array(Image.open(path, formats=["PNG"]).convert("RGB"))
        self.writer.add_image(name, picture, epoch, dataformats="HWC")
        self.writer.flush()

    def close(self, failed):
        """End."""
        self.writer.close()


class WandB:
    """Weights & Biases, project WANDB_PROJECT or dinoseg; WANDB_MODE=offline keeps all in OUT_DIR/wandb."""

    module = package = "wandb"

    def __init__(self, folder, settings, id, epochs):
        self.wandb = importlib.import_module(self.module)
        project = os.environ.get("WANDB_PROJECT", "dinoseg")
        self.run = self.wandb.init(project=project, dir=str(folder), name=folder.resolve().name,
                                   id=id or None, resume="allow" if id else None, config=settings)
        self.id = self.run.id

    def add(self, epoch, values):
        """Log {name: number} of an epoch."""
        self.run.log(values, step=epoch)

    def add_picture(self, epoch, name, path):
        """Log a picture of an epoch."""
        self.run.log({name: self.wandb.Image(str(path))}, step=epoch)

    def close(self, failed):
        """End."""
        self.run.finish(exit_code=int(failed))


class MLflow:
    """MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where to, else MLflow's own default."""

    module = package = "mlflow"

    def __init__(self, folder, settings, id, epochs):
        self.mlflow = importlib.import_module(self.module)
        run = self.mlflow.start_run(run_id=id or None, run_name=None if id else folder.resolve().name)
        self.id = run.info.run_id
        if not id:
            self.mlflow.log_params({name: str(value)[:500] for name, value in settings.items()})

    def add(self, epoch, values):
        """Log {name: number} of an epoch; class names lose what MLflow does not allow."""
        self.mlflow.log_metrics({re.sub(r"[^\w\-. /]", "_", name): value for name, value in values.items()},
                                step=epoch)

    def add_picture(self, epoch, name, path):
        """Keep a picture of an epoch."""
        self.mlflow.log_artifact(str(path), name)

    def close(self, failed):
        """End."""
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


# A new tracker is one class above and one line here.
TRACKERS = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def require(names):
    """Raise InputError where the library of a tracker is missing."""
    for name in names:
        tracker = TRACKERS[name]
        try:
            # a folder called so in the current one would be found too, and is no package
            if importlib.import_module(tracker.module).__file__ is None:
                raise ImportError
        except ImportError:
            raise InputError(f"--log {name} needs the package {tracker.package}: pip install "
                             f"{tracker.package}, or leave it out") from None


class Trackers:
    """The trackers called `names` of a run in `folder`; settings: {flag: value}; classes: [[name, color]].

    A resumed run goes on in the runs that it had there. Raises InputError for a tracker that does not start,
    unless the run is resumed; one that fails later is left out with a warning.
    """

    def __init__(self, names, folder, settings, classes, resumed=False):
        self.folder, self.classes, self.open = Path(folder), classes, {}
        try:
            self.notes = json.loads((self.folder / NOTES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.notes = {}
        for name in dict.fromkeys(names):
            note = self.notes.setdefault(name, dict(id="", epochs=0))
            try:
                self.open[name] = TRACKERS[name](self.folder, settings, note["id"], note["epochs"])
            except Exception as error:  # of another library: it could be any
                if resumed:
                    print(f"warning: --log {name} does not start and is left out: {one_line(error)}")
                    continue
                self.close(failed=True)
                raise InputError(f"--log {name} does not start: {one_line(error)}") from None
            note["id"] = self.open[name].id
        self.save()

    def save(self):
        """Write which runs of the trackers belong to this one."""
        if self.notes:
            text = json.dumps(self.notes)
            write_atomically(self.folder / NOTES, lambda path: path.write_text(text, encoding="utf-8"))

    def follow(self, history):
        """Hand over the rows of the history that a tracker does not have, and the pictures of the last."""
        last = history[-1]["epoch"]
        pictures = {"predictions": self.folder / f"valid_preds/epoch_{last:03d}.png",
                    **{name: self.folder / f"{name}.png" for name in PLOTS}}
        for name in [name for name in self.open if self.notes[name]["epochs"] < last]:
            with self.guarded(name) as tracker:
                for row in history[self.notes[name]["epochs"]:]:
                    tracker.add(row["epoch"], scalars(row, self.classes))
                for title, path in pictures.items():
                    if path.exists():
                        tracker.add_picture(last, title, path)
                self.notes[name]["epochs"] = last
        self.save()

    def close(self, failed=False):
        """End all; failed: the run did not come to its end."""
        for name in list(self.open):
            with self.guarded(name) as tracker:
                tracker.close(failed)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(failed=kind is not None)

    @contextmanager
    def guarded(self, name):
        """Yield a tracker; an error within the `with` block costs that tracker, and no more."""
        try:
            yield self.open[name]
        except Exception as error:  # of another library: it could be any
            del self.open[name]
            print(f"warning: --log {name} failed and is left out from here on: {one_line(error)}")


def one_line(error):
    """Return an error's text as one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
