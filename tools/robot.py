"""A robot that labels as a person would: what label.py is measured with, and compared to.

    python -m tools.benchmark label --data-root persons --photos 20

It paints one stroke after the other, each along the middle of the largest region that is predicted wrongly.
Who learns from the strokes: the Learner of label.py; a random forest on the same features, as
napari-convpaint has it; a random forest on colors and edges of several sizes, as ilastik has it.
"""
import time

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from config import IGNORE
from labeling.folder import Stroke
from labeling.learner import Learner, eigenvalues
from metrics import ConfusionMatrix
from models.upsampling import class_ids

GRID = 64  # cells of the longer side of a region, in which the middle of it is looked for
RADIUS = 0.01  # of the brush, of the image's longer side, at most
TREES, PER_CLASS = 100, 200  # of the forests; painted pixels of a class in an image that they learn from
SCALES = 0.7, 1.6, 3.5, 10.0  # pixels: of ilastik's filters
BATCH = 1 << 17  # pixels that a forest predicts at once


# --- strokes ----------------------------------------------------------------------------------------------
def next_stroke(pred, mask, painted):
    """Return the Stroke that a user would paint next, None where nothing is wrong.

    pred, mask, painted: (H, W) uint8, the prediction (any value that is no class where there is none), the
    truth (255 = unknown) and what was painted (255 = nothing).
    """
    wrong = (pred != mask) & (mask != IGNORE) & (painted == IGNORE)
    largest, label, region = 0, None, None
    for id in np.unique(mask[wrong]).tolist():
        _, areas, statistics, _ = cv2.connectedComponentsWithStats((wrong & (mask == id)).astype(np.uint8),
                                                                   connectivity=4)
        sizes = statistics[1:, cv2.CC_STAT_AREA]
        if sizes.max() > largest:
            largest, label, region = sizes.max(), id, areas == 1 + sizes.argmax()
    if region is None:
        return None
    points, room = middle_line(region)
    return Stroke(label=label, points=points, radius=max(0.5, min(RADIUS * max(mask.shape), room / 2)))


def middle_line(region):
    """Return (points [(x, y)], the least distance of one to the edge) of the longest line through a region
    (H, W) bool that keeps to its middle.
    """
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, left = rows[0], columns[0]
    cut = np.pad(region[top:rows[-1] + 1, left:columns[-1] + 1], 1).astype(np.uint8)
    distances = cv2.distanceTransform(cut, cv2.DIST_L2, 5)
    step = -(-max(cut.shape) // GRID)
    tall, wide = (-(-side // step) for side in cut.shape)
    cells = np.pad(distances, ((0, tall * step - cut.shape[0]), (0, wide * step - cut.shape[1])))
    cells = cells.reshape(tall, step, wide, step).transpose(0, 2, 1, 3).reshape(tall, wide, -1)
    best, room = cells.argmax(2), cells.max(2)  # the pixel of each cell that is farthest from the edge
    lengths, costs = (grid_graph(room, power) for power in (0, 2))
    start = room.argmax()
    first = farthest(dijkstra(lengths, indices=start))
    last = farthest(dijkstra(lengths, indices=first))
    _, before = dijkstra(costs, indices=first, return_predecessors=True)
    path = [last]
    while path[-1] != first:
        path.append(before[path[-1]])
    path = np.array(path)
    inner = room.ravel()[path] >= 0.5 * np.median(room.ravel()[path])  # without the tips
    path = path[inner]
    y, x = np.divmod(path, wide)
    inside_y, inside_x = np.divmod(best.ravel()[path], step)
    points = np.stack([x * step + inside_x + left - 1, y * step + inside_y + top - 1], 1)
    return points.tolist(), float(room.ravel()[path].min())


def grid_graph(room, power):
    """Return the sparse graph of the cells (h, w) with room; neighbors are as far as 1 / room ** power."""
    numbers, edges = np.arange(room.size).reshape(room.shape), []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = (slice(0, room.shape[0] - dy), slice(max(0, -dx), room.shape[1] - max(0, dx)))
        b = (slice(dy, None), slice(max(0, dx), room.shape[1] + min(0, dx)))
        both = (room[a] > 0) & (room[b] > 0)
        mean = np.minimum(room[a], room[b])[both]
        edges.append((numbers[a][both], numbers[b][both], np.hypot(dy, dx) / mean ** power))
    first, second, weight = map(np.concatenate, zip(*edges, strict=True))
    graph = coo_matrix((weight, (first, second)), shape=(room.size, room.size))
    return (graph + graph.T).tocsr()


def farthest(distances):
    """Return the index of the largest distance that is finite."""
    return int(np.where(np.isfinite(distances), distances, -1).argmax())


# --- who learns -------------------------------------------------------------------------------------------
class Forest:
    """A random forest on `values`: f(number) -> (h, w, D) float32 of an image, on any grid."""

    def __init__(self, values, num_classes, seed=0):
        self.values, self.num_classes, self.seed, self.samples = values, num_classes, seed, {}
        self.random = np.random.default_rng(seed)

    def learn(self, strokes):
        """As Learner.learn."""
        from sklearn.ensemble import RandomForestClassifier
        for number, drawn in strokes.items():
            self.take(number, drawn)
        values, labels = map(np.concatenate, zip(*self.samples.values(), strict=True))
        self.trees = RandomForestClassifier(TREES, class_weight="balanced", n_jobs=-1,
                                            random_state=self.seed).fit(values, labels)

    def take(self, number, drawn):
        """Keep the values and the labels of painted pixels."""
        grid, values, labels = self.values(number), [], []
        for label in np.unique(drawn[drawn != IGNORE]):
            points = np.argwhere(drawn == label)
            points = points[self.random.permutation(len(points))[:PER_CLASS]]
            y, x = (points * grid.shape[:2] // drawn.shape).T
            values.append(grid[y, x])
            labels.append(np.full(len(points), label))
        if values:
            self.samples[number] = np.concatenate(values), np.concatenate(labels)

    def predict(self, grid, size):
        """Return the label map at `size` = (H, W) of the values (h, w, D) of an image: its probabilities,
        resized (bilinear).
        """
        pixels = grid.reshape(-1, grid.shape[2])
        shares = np.zeros((len(pixels), self.num_classes), np.float32)
        for start in range(0, len(pixels), BATCH):
            shares[start:start + BATCH, self.trees.classes_] = self.trees.predict_proba(
                pixels[start:start + BATCH])
        shares = torch.from_numpy(shares.reshape(*grid.shape[:2], -1)).permute(2, 0, 1)[None]
        return F.interpolate(shares, size=size, mode="bilinear").argmax(1)[0].numpy().astype(np.uint8)


def filtered(picture):
    """Return colors and edges of an image (H, W, 3) uint8 at SCALES, those of ilastik's pixel classification:
    (H, W, D) float32.
    """
    picture, channels = picture.astype(np.float32) / 255, []
    for scale in SCALES:
        smooth = cv2.GaussianBlur(picture, (0, 0), scale)
        wider = cv2.GaussianBlur(picture, (0, 0), 0.66 * scale)
        across, down = (cv2.Sobel(smooth, cv2.CV_32F, *order) for order in ((1, 0), (0, 1)))
        twice = [cv2.Sobel(smooth, cv2.CV_32F, *order) for order in ((2, 0), (1, 1), (0, 2))]
        tensor = [cv2.GaussianBlur(product, (0, 0), scale)
                  for product in (across * across, across * down, down * down)]
        channels += [smooth, cv2.Laplacian(smooth, cv2.CV_32F), np.hypot(across, down), smooth - wider,
                     *eigenvalues(*tensor), *eigenvalues(*twice)]
    return np.concatenate(channels, 2)


# --- the measurement --------------------------------------------------------------------------------------
class Pictures:
    """Images of a data set with masks, as the network sees them: strokes and scores are at that size."""

    def __init__(self, dataset, cache):
        self.dataset, self.cache, self.size = dataset, cache, dataset.size
        self.masks = []
        for number in range(len(dataset)):
            cache.compute(number)
            self.masks.append(dataset[number][1]["mask"].numpy())

    def picture(self, number):
        """Return an image (h, w, 3) uint8."""
        return self.dataset[number][0][:3].permute(1, 2, 0).contiguous().numpy()

    def maps(self, number):
        """Return the maps of an image side by side, (h, w, D) float32."""
        maps = torch.cat(self.cache.features(number).maps, 1)[0].permute(1, 2, 0)
        return maps.float().contiguous().numpy()


def score(predict, pictures, num_classes):
    """Return the mIoU of predict(number) -> (h, w) uint8 over Pictures."""
    matrix = ConfusionMatrix(num_classes)
    for number, mask in enumerate(pictures.masks):
        matrix.update(torch.from_numpy(predict(number)), torch.from_numpy(mask))
    return matrix.miou()


def paint(learner, predict, pictures, marks, report):
    """Let the robot paint: a stroke on each image in turn, until the last of `marks`, numbers of strokes, at
    which report(strokes, seconds that learning and predicting took per stroke) is called.
    """
    strokes = {number: np.full(pictures.size, IGNORE, np.uint8) for number in range(len(pictures.masks))}
    painted, seconds, skipped = 0, 0.0, 0
    while painted < marks[-1] and skipped < len(strokes):
        number = (painted + skipped) % len(strokes)
        start = time.perf_counter()
        pred = predict(number) if painted else np.full(pictures.size, IGNORE - 1, np.uint8)
        seconds += time.perf_counter() - start
        stroke = next_stroke(pred, pictures.masks[number], strokes[number])
        if stroke is None:  # nothing is wrong with this one
            skipped += 1
            continue
        area = stroke.area(pictures.size) & (pictures.masks[number] == stroke.label)
        strokes[number][area] = stroke.label
        start = time.perf_counter()
        learner.learn({other: drawn for other, drawn in strokes.items() if (drawn != IGNORE).any()})
        seconds += time.perf_counter() - start
        painted, skipped = painted + 1, 0
        if painted in marks:
            report(painted, seconds / painted)


def our_learner(model, pictures, num_classes):
    """Return (the Learner of label.py, predict(pictures, number) -> (h, w) uint8)."""
    learner = Learner(model, pictures.size, pictures.cache.features, range(min(16, len(pictures.masks))))

    def predict(pictures, number):
        return class_ids(learner.shares_of(pictures.cache.features(number)))[0].cpu().numpy()

    return learner, predict


def forest_on(values):
    """Return a function as our_learner for a Forest on values(pictures, number) -> (h, w, D)."""
    def make(model, pictures, num_classes):
        forest = Forest(lambda number: values(pictures, number), num_classes)

        def predict(pictures, number):
            return forest.predict(values(pictures, number), pictures.size)

        return forest, predict

    return make


LEARNERS = {
    "label.py": our_learner,
    "forest on the same features": forest_on(Pictures.maps),
    "forest on colors and edges": forest_on(lambda pictures, number: filtered(pictures.picture(number))),
}
