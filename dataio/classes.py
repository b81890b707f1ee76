"""Class tables of the data sets, as they were published: [(name, (R, G, B)), ...], position = class id.

    from dataio.classes import VOC, fill_colors
    fill_colors([("background", None), ("person", None), ("car", (0, 0, 200))])    # made up where None
"""
import numpy as np


def parse_classes(text):
    """Return [(name, (R, G, B)), ...] of the text `name R G B, name R G B, ...`."""
    entries = [entry.rsplit(maxsplit=3) for entry in text.split(",")]
    return [(name.strip(), (int(red), int(green), int(blue))) for name, red, green, blue in entries]


VOC = parse_classes("""
    background 0 0 0, aeroplane 128 0 0, bicycle 0 128 0, bird 128 128 0, boat 0 0 128, bottle 128 0 128,
    bus 0 128 128, car 128 128 128, cat 64 0 0, chair 192 0 0, cow 64 128 0, diningtable 192 128 0,
    dog 64 0 128, horse 192 0 128, motorbike 64 128 128, person 192 128 128, pottedplant 0 64 0,
    sheep 128 64 0, sofa 0 192 0, train 128 192 0, tvmonitor 0 64 128
""")
CAMVID = parse_classes("""
    sky 128 128 128, building 128 0 0, pole 192 192 128, road 128 64 128, pavement 60 40 222, tree 128 128 0,
    sign 192 128 128, fence 64 64 128, car 64 0 128, pedestrian 64 64 0, bicyclist 0 128 192
""")
STREETS = parse_classes("""
    sky 70 130 180, road 128 64 128, grass 152 251 152, building 250 170 30, tree 35 120 35, car 0 0 200,
    person 220 20 60
""")
AEROSCAPES = parse_classes("""
    background 0 0 0, person 192 128 128, bike 0 128 0, car 128 128 128, drone 128 0 0, boat 0 0 128,
    animal 192 0 128, obstacle 192 0 0, construction 192 128 0, vegetation 0 64 0, road 128 128 0,
    sky 0 128 128
""")
PET = parse_classes("foreground 0 200 0, background 0 0 0, boundary 255 225 25")
CITYSCAPES = parse_classes("""
    road 128 64 128, sidewalk 244 35 232, building 70 70 70, wall 102 102 156, fence 190 153 153,
    pole 153 153 153, traffic light 250 170 30, traffic sign 220 220 0, vegetation 107 142 35,
    terrain 152 251 152, sky 70 130 180, person 220 20 60, rider 255 0 0, car 0 0 142, truck 0 0 70,
    bus 0 60 100, train 0 80 100, motorcycle 0 0 230, bicycle 119 11 32
""")
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # of 0..33
ADE20K = parse_classes("""
    wall 120 120 120, building 180 120 120, sky 6 230 230, floor 80 50 50, tree 4 200 3, ceiling 120 120 80,
    road 140 140 140, bed 204 5 255, windowpane 230 230 230, grass 4 250 7, cabinet 224 5 255,
    sidewalk 235 255 7, person 150 5 61, earth 120 120 70, door 8 255 51, table 255 6 82,
    mountain 143 255 140, plant 204 255 4, curtain 255 51 7, chair 204 70 3, car 0 102 200, water 61 230 250,
    painting 255 6 51, sofa 11 102 255, shelf 255 7 71, house 255 9 224, sea 9 7 230, mirror 220 220 220,
    rug 255 9 92, field 112 9 255, armchair 8 255 214, seat 7 255 224, fence 255 184 6, desk 10 255 71,
    rock 255 41 10, wardrobe 7 255 255, lamp 224 255 8, bathtub 102 8 255, railing 255 61 6,
    cushion 255 194 7, base 255 122 8, box 0 255 20, column 255 8 41, signboard 255 5 153,
    chest of drawers 6 51 255, counter 235 12 255, sand 160 150 20, sink 0 163 255, skyscraper 140 140 140,
    fireplace 250 10 15, refrigerator 20 255 0, grandstand 31 255 0, path 255 31 0, stairs 255 224 0,
    runway 153 255 0, case 0 0 255, pool table 255 71 0, pillow 0 235 255, screen door 0 173 255,
    stairway 31 0 255, river 11 200 200, bridge 255 82 0, bookcase 0 255 245, blind 0 61 255,
    coffee table 0 255 112, toilet 0 255 133, flower 255 0 0, book 255 163 0, hill 255 102 0, bench 194 255 0,
    countertop 0 143 255, stove 51 255 0, palm 0 82 255, kitchen island 0 255 41, computer 0 255 173,
    swivel chair 10 0 255, boat 173 255 0, bar 0 255 153, arcade machine 255 92 0, hovel 255 0 255,
    bus 255 0 245, towel 255 0 102, light 255 173 0, truck 255 0 20, tower 255 184 184, chandelier 0 31 255,
    awning 0 255 61, streetlight 0 71 255, booth 255 0 204, television receiver 0 255 194, airplane 0 255 82,
    dirt track 0 10 255, apparel 0 112 255, pole 51 0 255, land 0 194 255, bannister 0 122 255,
    escalator 0 255 163, ottoman 255 153 0, bottle 0 255 10, buffet 255 112 0, poster 143 255 0,
    stage 82 0 255, van 163 255 0, ship 255 235 0, fountain 8 184 170, conveyer belt 133 0 255,
    canopy 0 255 92, washer 184 0 255, plaything 255 0 31, swimming pool 0 184 255, stool 0 214 255,
    barrel 255 0 112, basket 92 255 0, waterfall 0 224 255, tent 112 224 255, bag 70 184 160,
    minibike 163 0 255, cradle 153 0 255, oven 71 255 0, ball 255 0 163, food 255 204 0, step 255 0 143,
    tank 0 255 235, trade name 133 255 0, microwave 255 0 235, pot 245 0 255, animal 255 0 122,
    bicycle 255 245 0, lake 10 190 212, dishwasher 214 255 0, screen 0 204 255, blanket 20 0 255,
    sculpture 255 255 0, hood 0 153 255, sconce 0 41 255, vase 0 255 204, traffic light 41 0 255,
    tray 41 255 0, ashcan 173 0 255, fan 0 245 255, pier 71 0 255, crt screen 122 0 255, plate 0 255 184,
    monitor 0 92 255, bulletin board 184 255 0, shower 0 133 255, radiator 255 214 0, glass 25 194 194,
    clock 102 255 0, flag 92 0 255
""")
PUBLISHED = (VOC, CAMVID, CITYSCAPES, ADE20K, AEROSCAPES, PET)
BLACK = (0, 0, 0)
BACKGROUNDS = {"background", "unlabeled", "unlabelled", "void"}
# Colors for classes that came without one, RRGGBB: black for a background, 19 chosen by hand, then of a grid
# with steps of 15 always the color farthest in OKLab (Ottosson, 2020) from those before, from white and
# from IGNORE_COLOR (at least 0.12 off; black 0.3); last put in an order in which neighbors differ by 0.25.
_SPARE = bytes.fromhex("""
    00000000ff00e6194b0082c8ffe119911eb446f0f0f58230f032e6008080d2f53caa6e28800000aaffc3808000000080fabed4
    dcbeff808080ffd7b4003c002d00ff00c3694b3c699669ff0069005ab4ffff78b44b003ca5b4964b00a5b45aa5694b00b4c300
    a5005a004bb4d287ff781effa596c3005a5a00b4b4695aa51ef096b42d00b400ff4b2d1effb44bff00960096003c69ff780078
    d269690000c3874b5ae19696c300a5b4962d0f2d5aff4b1e5ad2b48778c378a50096d2ff4b96693c006969694b1e96ffff96f0
    5a3cc387e100c35ae1691e4b9696ffb44b69ff69ff873c8700d2f000699600d2005a96b4d24b00ffff87e15ab41e2d96ff5a78
    a5e1785a000fb487691e3c3cd20f78b4b4d2874bd24b782dc378a55a4b4b96b45a004b78d2a5693c4b002d4be187ff787800d2
    78a5873c0fd200b4004b3c96d296d2873c1e5a69d2d278005a5a78d200d2965a3c78b4c3a50087ffa587691ea578c32d966987
    5a0069b478d200ffd2c30f4b0069c3d2c35a5a78a587003cc3a5ffa53ca53c2d4b0f9696d22dff3c6969e14b78692d2d87964b
    961ee1ff7869a5002d2d00871ea5e1d2a500ff3cc300b487ffff00a587965a00f0ff96b487690f78d278e169e12da54be12db4
    4b5a3c6978ff0ff05a874bffd2000fb43cd200694b5a4bffff1e69b478ff782d696987e1004b2db44bff00875a783cb4e1d200
    3c5aa596b4ffb45a4b3c2d78ff69d2a5ff00965ab4f01e0078e1a55a78785a0fc3e16996693c87e178c32d5a7887a5e1b42d78
    0087a5e187691e0f698796965a3c1ee1693c5ac387b469781e00a596c3c3e14b4b87009678875a5a1e87c3a596a53c4b005a1e
    c33c96ff9600786978d2ff874b1e2d96785ae15aff3c4b3ce1a5c3964b78ffb4ff872d3cff4b9678c3f0002dd278ffff00872d
    69002d96c3874b5a00a55ae15a8700b4e12d785a87ffc3005a8796b400c3a5a569693c5aa5a5004b1e5ae13c963c2db4785a1e
    002d78b44b001e3c5a00c3d23c3c1ea5873c693ce1a5a5b4961e006996ff695a5a5ae1ff8769a55ae169c33c3c2d78e1c3693c
""")
SPARE_COLORS = [tuple(_SPARE[start:start + 3]) for start in range(0, len(_SPARE), 3)]
NEAR = 60  # distance in RGB below which a made-up color is taken for a given one


def plain(name):
    """Return a class name as compared with published ones: lower case, letters and digits only."""
    return "".join(filter(str.isalnum, name.lower()))


def fill_colors(classes):
    """Return [(name, (R, G, B)), ...] of [(name, (R, G, B) or None), ...], up to 254 classes.

    Colors that are there stay. Of the rest, the first one called background, unlabeled or void is black, and
    nothing else is; then published_colors, and what is left takes spare_colors.
    """
    names, colors = [plain(name) for name, _ in classes], dict(enumerate(color for _, color in classes))
    missing = {id: names[id] for id, color in colors.items() if color is None}
    background = next((id for id, name in missing.items() if name in BACKGROUNDS), None)
    if background is not None and BLACK not in colors.values():
        colors[background] = BLACK
        del missing[background]
    for id, color in published_colors(missing).items():
        if color not in (*colors.values(), BLACK):  # a table may have a color twice
            colors[id] = color
            del missing[id]
    colors |= spare_colors(missing, [BLACK, *filter(None, colors.values())])
    return [(name, colors[id]) for id, (name, _) in enumerate(classes)]


def published_colors(names):
    """Return {class id: color} of {class id: plain name} by the table of PUBLISHED that fits, or {}."""
    best = {}
    for table in PUBLISHED:
        colors = {plain(name): color for name, color in table}
        known = {id: colors[name] for id, name in names.items() if name in colors}
        best = max(best, known, key=len)
    return best if len(best) >= max(3, len(names) / 2) else {}  # fewer may be chance


def spare_colors(ids, used):
    """Return {class id: color}: SPARE_COLORS[id], or the next free one that is not NEAR one in use."""
    distances = np.linalg.norm(np.array(SPARE_COLORS)[:, None] - used, axis=2).min(1)
    least = min(NEAR, np.sort(distances)[-len(ids)])  # nearer ones where there are not enough
    free = [color for color, distance in zip(SPARE_COLORS, distances, strict=True) if distance >= least]
    own = {id: SPARE_COLORS[id] for id in ids if SPARE_COLORS[id] in free}
    others = (color for color in free if color not in own.values())
    return {id: own.get(id) or next(others) for id in ids}


def first_difference(classes, others):
    """Return how the names or the order of two lists of classes differ first, as text; "" where they do not.

    classes, others: [(name, color), ...]. Colors may differ.
    """
    names, other_names = ([name for name, _ in source] for source in (classes, others))
    for id, (name, other) in enumerate(zip(names, other_names, strict=False)):
        if name != other:
            return f"class {id}: {name} against {other}"
    return "" if len(names) == len(other_names) else f"{len(names)} classes against {len(other_names)}"
