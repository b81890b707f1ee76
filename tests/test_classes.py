"""Colors of classes: the table of made-up ones, published palettes, and who takes which."""

import cv2
import numpy as np
import pytest

from dataio.classes import BLACK, CITYSCAPES, PUBLISHED, SPARE_COLORS, VOC, fill_colors
from visualize import IGNORE_COLOR

CAMVID_32 = [
    "Animal", "Archway", "Bicyclist", "Bridge", "Building", "Car", "CartLuggagePram", "Child",
    "Column_Pole", "Fence", "LaneMkgsDriv", "LaneMkgsNonDriv", "Misc_Text", "MotorcycleScooter",
    "OtherMoving", "ParkingBlock", "Pedestrian", "Road", "RoadShoulder", "Sidewalk", "SignSymbol",
    "Sky", "SUVPickupTruck", "TrafficCone", "TrafficLight", "Train", "Tree", "Truck_Bus", "Tunnel",
    "VegetationMisc", "Void", "Wall",
]  # fmt: skip


def differences(colors, others):
    """Return (N, M) CIE76 differences of RGB colors, in CIELAB units (2.3 are just noticeable)."""
    a, b = (
        cv2.cvtColor(np.float32(some)[None] / 255, cv2.COLOR_RGB2LAB)[0] for some in (colors, others)
    )
    return np.linalg.norm(a[:, None] - b, axis=2)


def colors_of(names, given=None):
    """Return {name: color} as fill_colors decides, given = {name: color}."""
    return dict(fill_colors([(name, (given or {}).get(name)) for name in names]))


def test_254_made_up_colors_are_far_apart():
    colors = SPARE_COLORS[1:]
    assert len(set(colors)) == len(colors) == 254 and SPARE_COLORS[0] == BLACK
    between = differences(colors, colors)
    assert between[~np.eye(254, dtype=bool)].min() > 5
    assert np.diag(between, 1).min() > 25  # neighbors in the table
    assert differences(colors, [BLACK, (255, 255, 255), IGNORE_COLOR]).min() > 15
    assert [len(color) for color in colors] == [3] * 254 and all(type(part) is int for part in colors[40])


@pytest.mark.parametrize("count", [2, 20, 32, 254])
def test_classes_without_names_keep_the_first_colors_and_nobody_is_black(count):
    colors = [*colors_of([f"class {id}" for id in range(count)]).values()]
    assert len({*colors}) == count and BLACK not in colors
    assert colors[1:] == SPARE_COLORS[1:count]  # 0, which is no background by its name, takes what is left
    assert colors[1] == (0, 255, 0)


@pytest.mark.parametrize("name", ["background", "Background", "VOID", "unlabeled", " Un_labeled "])
def test_a_background_is_black_and_nothing_else(name):
    assert colors_of([name, "person"]) == {name: BLACK, "person": (0, 255, 0)}
    assert colors_of(["cat", "dog", name])[name] == BLACK != colors_of(["cat", "dog", name])["cat"]
    two = colors_of(["background", "void", "x"])
    assert two["background"] == BLACK != two["void"]
    taken = colors_of(["rails", name], {"rails": BLACK})
    assert taken["rails"] == BLACK != taken[name]


@pytest.mark.parametrize("table", PUBLISHED)
def test_names_of_a_published_table_take_its_colors(table):
    got = fill_colors([(name, None) for name, _ in table])
    seen = set()
    for (name, want), (_, color) in zip(table, got, strict=True):
        if name == "background" or len(table) > 3:  # the two others of pet are too few to tell
            assert color == want or want in seen  # ade20k has one color twice
        seen.add(want)
    assert len({color for _, color in got}) == len(table)


def test_published_colors_need_three_names_and_half_of_them():
    published = dict(CITYSCAPES)
    got = colors_of(["Traffic_Light", "trafficsign", "RIDER", "crosswalk", "tram stop", "kiosk"])
    assert [*got.values()][:3] == [published[name] for name in ("traffic light", "traffic sign", "rider")]
    assert len({*got.values()}) == 6
    names = ["traffic light", "traffic sign", "rider", "crosswalk", "tram stop", "kiosk", "shop"]
    assert [*colors_of(names).values()][1:] == SPARE_COLORS[1:7]  # three of seven
    assert colors_of(["x", "rider", "pole"])["rider"] == SPARE_COLORS[1]  # two
    assert colors_of(["background", "cat", "dog"])["cat"] == SPARE_COLORS[1]  # a background is no evidence
    animals = colors_of(["background", "cat", "dog", "cow", "road"])
    assert animals["cat"] == dict(VOC)["cat"]  # the table with most of the names
    given = colors_of(["traffic light", "traffic sign", "rider", "x"], {"x": published["rider"]})
    assert given["rider"] != given["x"] and given["traffic sign"] == published["traffic sign"]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [3, 40, 254])
def test_given_colors_stay_and_made_up_ones_keep_away_from_them(count, seed):
    generator = np.random.default_rng(seed)
    pool = [tuple(color) for color in generator.integers(0, 256, (count, 3)).tolist()]
    if seed % 2:  # the very colors of the table, and nearly those
        pool = [tuple(min(255, part + seed // 2) for part in color) for color in SPARE_COLORS[1 : count + 1]]
    keep = generator.random(count) < generator.random()
    classes = [(f"c {id}", pool[id] if keep[id] else None) for id in range(count)]
    got = fill_colors(classes)
    assert [name for name, _ in got] == [name for name, _ in classes]
    given = [color for _, color in classes if color]
    assert [color for (_, color), kept in zip(got, keep, strict=True) if kept] == given
    made_up = [color for (_, color), kept in zip(got, keep, strict=True) if not kept]
    assert len({*made_up}) == len(made_up) and not {*made_up} & {*given, BLACK}
    if given and made_up and count < 254:
        assert differences(made_up, given).min() > 4


def test_32_classes_of_camvid_differ():
    colors = colors_of(CAMVID_32)
    assert len(CAMVID_32) == 32 == len({*colors.values()}) and colors["Void"] == BLACK
    between = differences([*colors.values()], [*colors.values()])
    assert between[CAMVID_32.index("Sky"), CAMVID_32.index("Bicyclist")] > 30
    assert between[~np.eye(32, dtype=bool)].min() > 15
