"""tools/robot.py paints where a prediction is wrong; the forests it compares with learn what is painted."""
import numpy as np
import pytest

from config import IGNORE
from labeling.learner import eigenvalues
from tools import robot

SIZE = 90, 120
Y, X = np.mgrid[:SIZE[0], :SIZE[1]]
REGIONS = {
    "disk": np.hypot(Y - 40, X - 50) < 25,
    "ring": (np.hypot(Y - 40, X - 50) < 30) & (np.hypot(Y - 40, X - 50) > 20),
    "corner": ((Y > 60) & (Y < 70) & (X < 100)) | ((X > 10) & (X < 22) & (Y < 70)),
    "line": (Y == 45) & (X > 5),
    "pixel": (Y == 89) & (X == 119),
    "noise": np.random.default_rng(0).random(SIZE) < 0.7,
    "everything": np.ones(SIZE, bool),
}


def nothing(*_):
    return np.full(SIZE, IGNORE, np.uint8)


@pytest.mark.parametrize("name", REGIONS)
def test_a_stroke_keeps_to_the_middle_of_what_is_wrong(name):
    region = REGIONS[name]
    mask = np.where(region, 2, 0).astype(np.uint8)
    stroke = robot.next_stroke(np.zeros(SIZE, np.uint8), mask, nothing())
    area = stroke.area(SIZE)
    assert stroke.label == 2 and area.any()
    assert all(region[y, x] for x, y in np.round(stroke.points).astype(int))
    if name not in ("noise", "pixel", "line"):
        assert region[area].mean() > 0.95
    if name in ("ring", "corner", "line", "everything"):  # along it, not a dot
        assert np.ptp(stroke.points, axis=0).max() > 40


def test_the_largest_wrong_region_comes_first_and_what_is_painted_or_unknown_does_not_count():
    mask = np.zeros(SIZE, np.uint8)
    mask[10:40, 10:40], mask[50:60, 60:70], mask[:5] = 1, 2, IGNORE
    pred, painted = np.zeros(SIZE, np.uint8), nothing()
    assert robot.next_stroke(pred, mask, painted).label == 1
    painted[10:40, 10:40] = 1
    assert robot.next_stroke(pred, mask, painted).label == 2
    pred[50:60, 60:70] = 2
    assert robot.next_stroke(pred, mask, painted) is None


def test_filters_see_nothing_in_one_color_and_edges_at_their_size():
    flat = robot.filtered(np.full((*SIZE, 3), 77, np.uint8))
    assert flat.shape[:2] == SIZE and np.isfinite(flat).all()
    assert np.abs(flat - flat[45, 60]).max() < 1e-4
    edge = robot.filtered(np.where(X[..., None] < 60, 50, 200).astype(np.uint8).repeat(3, 2))
    assert np.abs(edge[45, 58:62] - edge[45, 20]).max() > 10 * np.abs(edge[45, 22] - edge[45, 20]).max()


def test_eigenvalues_are_those_of_numpy():
    a, b, c = np.random.default_rng(0).normal(size=(3, 7, 5))
    want = np.linalg.eigvalsh(np.stack([np.stack([a, b], -1), np.stack([b, c], -1)], -1))
    assert np.allclose(np.sort(np.stack(eigenvalues(a, b, c), -1)), want)


def test_a_forest_learns_the_strokes_of_several_images():
    kinds = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    grids = [kinds[(X[::10, ::10] // 40 + number) % 3] for number in range(3)]
    forest = robot.Forest(lambda number: grids[number], 4)
    strokes = {0: nothing(), 1: nothing()}
    strokes[0][20:30, 5:15], strokes[1][40:50, 100:110] = 0, 1  # the third kind is painted nowhere
    forest.learn(strokes)
    pred = forest.predict(grids[2], SIZE)  # kinds 2, 0, 1
    assert (pred[:, 50:70] == 0).all() and set(np.unique(pred)) <= {0, 1} and pred.shape == SIZE


def test_strokes_go_to_one_image_after_the_other_until_all_is_right():
    """With a learner that knows the truth where three strokes were painted, and is asked at given numbers."""
    class Pictures:
        size = SIZE
        masks = [np.where(REGIONS[name], 1, 0).astype(np.uint8) for name in ("disk", "corner")]

    class Known:
        def learn(self, strokes):
            self.strokes = {number: drawn.copy() for number, drawn in strokes.items()}

    learner, seen = Known(), []
    learner.strokes = {}

    def predict(number):
        painted = learner.strokes.get(number)
        classes = [] if painted is None else np.unique(painted[painted != IGNORE])
        return Pictures.masks[number] if len(classes) == 2 else np.full(SIZE, 3, np.uint8)

    robot.paint(learner, predict, Pictures, (1, 2, 4, 50), lambda strokes, seconds: seen.append(strokes))
    assert seen == [1, 2, 4]  # and then there was nothing wrong
    for number, drawn in learner.strokes.items():
        painted = drawn != IGNORE
        assert (drawn[painted] == Pictures.masks[number][painted]).all()


def test_the_score_is_that_of_all_pixels():
    class Pictures:
        masks = [np.where(REGIONS[name], 1, 0).astype(np.uint8) for name in ("disk", "corner")]

    preds = [REGIONS["everything"].astype(np.uint8), np.zeros(SIZE, np.uint8)]
    pred, mask = np.stack(preds), np.stack(Pictures.masks)
    want = np.mean([((pred == id) & (mask == id)).sum() / ((pred == id) | (mask == id)).sum()
                    for id in (0, 1)])
    assert np.isclose(robot.score(lambda number: preds[number], Pictures, 2), want)
