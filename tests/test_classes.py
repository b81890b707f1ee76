"""Colors of classes: the table of made-up colors, published palettes, and who takes which."""
import itertools

import cv2
import numpy as np
import pytest

from dataio.classes import BLACK, CITYSCAPES, PUBLISHED, SPARE_COLORS, VOC, fill_colors, first_difference
from visualize import IGNORE_COLOR


def differences(colors, others):
    """Return (N, M) CIE76 differences of RGB colors, in CIELAB units (2.3 are just noticeable)."""
    points, other_points = (cv2.cvtColor(np.float32(rgb)[None] / 255, cv2.COLOR_RGB2LAB)[0]
                            for rgb in (colors, others))
    return np.linalg.norm(points[:, None] - other_points, axis=2)


def colors_of(names, fixed=None):
    """Return {name: color} as fill_colors decides, fixed = {name: color}."""
    return dict(fill_colors([(name, (fixed or {}).get(name)) for name in names]))


def test_254_made_up_colors_are_far_apart():
    colors = SPARE_COLORS[1:]
    assert len(set(colors)) == len(colors) == 254 and SPARE_COLORS[0] == BLACK
    between = differences(colors, colors)
    assert between[~np.eye(254, dtype=bool)].min() > 5
    assert np.diag(between, 1).min() > 25  # neighbors in the table
    assert differences(colors, [BLACK, (255, 255, 255), IGNORE_COLOR]).min() > 15
    assert all(type(channel) is int for channel in colors[40])


@pytest.mark.parametrize("count", [2, 20, 254])
def test_classes_without_names_take_the_first_colors_and_none_is_black(count):
    colors = [*colors_of([f"class {id}" for id in range(count)]).values()]
    assert len({*colors}) == count and BLACK not in colors
    assert colors[1:] == SPARE_COLORS[1:count]  # 0, which is not a background by its name, takes what is left


@pytest.mark.parametrize("name", ["background", "VOID", "unlabeled", " Un_labeled "])
def test_a_background_is_black_and_nothing_else(name):
    assert colors_of([name, "person"]) == {name: BLACK, "person": SPARE_COLORS[1]}
    assert colors_of(["cat", "dog", name])[name] == BLACK != colors_of(["cat", "dog", name])["cat"]
    assert [*colors_of([name, "x", f"{name} "]).values()].count(BLACK) == 1
    assert colors_of(["rails", name], {"rails": BLACK})[name] != BLACK


@pytest.mark.parametrize("table", PUBLISHED)
def test_names_of_a_published_table_take_its_colors(table):
    colors = colors_of([name for name, _ in table])
    earlier = set()
    for name, published in table:
        if name == "background" or len(table) > 3:  # the two others of pet are too few to tell
            assert colors[name] == published or published in earlier  # ade20k has a color twice
        earlier.add(published)
    assert len({*colors.values()}) == len(table)


def test_published_colors_need_three_names_and_half_of_them():
    published = dict(CITYSCAPES)
    colors = colors_of(["Traffic_Light", "trafficsign", "RIDER", "crosswalk", "tram stop", "kiosk"])
    assert [*colors.values()][:3] == [published[name] for name in ("traffic light", "traffic sign", "rider")]
    names = ["traffic light", "traffic sign", "rider", "crosswalk", "tram stop", "kiosk", "shop"]
    assert [*colors_of(names).values()][1:] == SPARE_COLORS[1:7]  # three of seven
    assert colors_of(["x", "rider", "pole"])["rider"] == SPARE_COLORS[1]  # two
    assert colors_of(["background", "cat", "dog"])["cat"] == SPARE_COLORS[1]  # a background is no evidence
    animals = colors_of(["background", "cat", "dog", "cow", "road"])
    assert animals["cat"] == dict(VOC)["cat"]  # the table with most of the names
    colors = colors_of(["traffic light", "traffic sign", "rider", "x"], {"x": published["rider"]})
    assert colors["rider"] != colors["x"] and colors["traffic sign"] == published["traffic sign"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [3, 40, 254])
def test_colors_that_are_fixed_stay_and_made_up_colors_keep_away_from_them(count, seed):
    generator = np.random.default_rng(seed)
    pool = [tuple(color) for color in generator.integers(0, 256, (count, 3)).tolist()]
    if seed % 2:  # the very colors of the table, and nearly those
        pool = [tuple(min(255, channel + seed // 2) for channel in color)
                for color in SPARE_COLORS[1 : count + 1]]
    fixed = {f"c {id}": color for id, color in enumerate(pool) if generator.random() < 0.4}
    colors = colors_of([f"c {id}" for id in range(count)], fixed)
    assert len(colors) == count and fixed.items() <= colors.items()
    made_up = [color for name, color in colors.items() if name not in fixed]
    assert len({*made_up}) == len(made_up) and not {*made_up} & {*fixed.values(), BLACK}
    if fixed and made_up and count < 254:
        assert differences(made_up, [*fixed.values()]).min() > 4


def test_classes_are_the_same_by_their_names_and_order_alone():
    lists = ["", "a", "b", "ab", "ba", "abc", "abd"]
    for names, others in itertools.product(lists, lists):
        classes, other_classes = [(name, (0, 0, 0)) for name in names], [(name, (9, 9, 9)) for name in others]
        assert (first_difference(classes, other_classes) == "") == (names == others)
