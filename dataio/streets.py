"""Street scenes drawn by code: a segmentation data set with exact masks and nothing to download.

    image, mask = draw_scene(3)                        # (256, 320, 3) and (256, 320) uint8
    for image, mask in draw_clip(3, (360, 640), frames=50, fps=25): ...

World: meters, x to the right, y up, z ahead. The camera walks along z and looks straight ahead, so a point is
drawn in row = horizon + focal length * (height of the eye - y) / depth. Things are painted from back to front
into four channels, red, green, blue and class: every shape writes its color and its class in one call, so
image and mask cannot disagree. `describe` decides where things are, their seeds decide what they look like.
"""
import json
import math
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

VERSION = 2  # raise it whenever the pictures change: data sets on disk are then drawn again
SKY, ROAD, GRASS, BUILDING, TREE, CAR, PERSON = range(7)
SUPER = 2    # samples per pixel and axis, for smooth edges
NEAR, FAR, HAZE = 0.4, 90.0, 170.0   # meters: nearest that is drawn, end of the street, fading of colors
STOREY, PAVEMENT, WALK = 3.1, 1.8, 0.7   # meters; meters, beside the road; the camera's meters/s
MOODS = (   # zenith, horizon, tint of the light, light in the shade, darkness of shadows, clouds
    ((58, 126, 214), (178, 214, 242), (1.04, 1.02, 0.97), 0.66, 0.42, 0.3),   # noon
    ((92, 152, 222), (236, 226, 206), (1.08, 1.01, 0.90), 0.62, 0.40, 0.4),   # morning
    ((146, 162, 182), (206, 214, 222), (0.94, 0.97, 1.02), 0.86, 0.12, 0.7),  # overcast
    ((72, 84, 154), (246, 172, 122), (1.02, 0.86, 0.84), 0.66, 0.30, 0.5))    # dusk
WALLS = "b8483c e8e2d4 d8b04c 4c70a0 c08468 debe8c e8d6ba 9c6450 ce9c74 d2b478 e0c0b0 b8a08c"
PAINTS = "1c54be 0c98a8 3a86d8 2c46c8 c01c2c 243c8c 28303c f4f4f8"
SHIRTS = "f2387e face36 9634a8 f07a28 f26ea0 d83ac0 fa9c2c 2c8a5c"
TROUSERS, SKINS = "2c3474 5a2a4c 6a4226 3a3486 8a5a2c 30343c", "f4ceae e2b28c ba805c 82543c 603e2e"
HAIRS, ROOFS = "2c1e18 5c381e cea458 1a181c 964622 a09ea0", "a05a44 7c5240 5c5660 9c6c4c"
LAWNS, GREENS = "60a63e 70ac3a 54963c 8ca846", "3a7a2c 4a8628 2c6834 608a2e 568c3a"
BARK, GLASS, BLACK = (104, 74, 52), (64, 92, 120), (28, 28, 32)
WHITE, CHROME, RED = (240, 240, 226), (190, 194, 200), (230, 30, 36)
CARS = (  # saloon, hatchback, van: body and cabin from the side, (along, up) in meters, the nose at +along
    (((-2.2, 0.3), (-2.25, 0.8), (-2.1, 0.98), (1.1, 0.96), (2.1, 0.78), (2.25, 0.3)),
     ((-1.75, 0.96), (-1.1, 1.46), (0.35, 1.46), (1.1, 0.95))),
    (((-1.9, 0.3), (-1.95, 0.8), (-1.9, 1.0), (1.0, 0.98), (1.85, 0.8), (1.95, 0.3)),
     ((-1.88, 0.98), (-1.55, 1.56), (0.3, 1.56), (1.0, 0.97))),
    (((-2.3, 0.32), (-2.35, 0.8), (-2.3, 1.1), (1.7, 1.1), (2.25, 0.95), (2.35, 0.32)),
     ((-2.3, 1.1), (-2.2, 2.1), (0.9, 2.1), (1.75, 1.1))))
CIRCLE = np.stack([np.cos(np.arange(20) * math.pi / 10), np.sin(np.arange(20) * math.pi / 10)], 1)


# ---- what is in a scene ----

def describe(seed):
    """A scene as plain values: light, camera, street, things. `seed`: an int >= 0 or a tuple of them."""
    seed = np.atleast_1d(seed).tolist()
    rng = np.random.default_rng([*seed, 1])
    scene = SimpleNamespace(seed=seed, things=[], noise=rng.uniform(-1, 1, (256, 256)).astype(np.float32))
    mood = MOODS[rng.choice(len(MOODS), p=[0.42, 0.24, 0.2, 0.14])]
    scene.zenith, scene.haze, scene.tint, scene.ambient, scene.shadow, scene.cloud = mood
    scene.grain, scene.hills = rng.uniform(0.8, 2.8), rng.uniform(0, 6.28)
    scene.sun = int(rng.choice([-1, 1]))   # the side that the light comes from
    scene.lean = rng.uniform(0.5, 1.5)   # length of a shadow, per half width of what casts it
    scene.side = side = int(rng.choice([-1, 1]))   # the camera walks on the pavement of this side
    scene.kerb = {side: 5.3 if rng.random() < 0.7 else 3.1, -side: 5.3 if rng.random() < 0.3 else 3.1}
    scene.park = {side: rng.random() < 0.4, -side: rng.random() < 0.25}   # trees instead of buildings
    scene.lawn = {side: rng.uniform(6, 10), -side: 6.0 if scene.park[-side] else 0.0}   # meters wide
    scene.eye_x, scene.eye_height = side * (scene.kerb[side] + rng.uniform(0.6, 0.9)), rng.uniform(1.8, 2.5)
    scene.vanishing = 0.5 + side * rng.uniform(-0.16, 0.3), rng.uniform(0.45, 0.53)   # of width and height
    scene.grass, scene.asphalt = pick(rng, LAWNS), rng.uniform(84, 116) + np.array([0, 1, 5])
    scene.paving = rng.uniform(158, 190) - np.array([0, 4, 12])
    for side in (-1, 1):
        add_roadside(scene, rng, side)
    add_cars_and_persons(scene, rng)
    return scene


def pick(rng, table):
    """A color [red, green, blue] of a table of hexadecimal ones, varied a little."""
    rgb = np.frombuffer(bytes.fromhex(rng.choice(table.split())), np.uint8)
    return np.clip(rgb * rng.uniform(0.9, 1.1) + rng.uniform(-8, 8, 3), 0, 255).tolist()


def add(scene, draw, x, z, width, length, speed=0.0):
    """Add a thing whose near end is at x, z at time 0; speed: meters/s along z."""
    scene.things.append(SimpleNamespace(draw=draw, x=x, z=z, width=width, length=length, speed=speed,
                                        seed=[*scene.seed, 3, len(scene.things)]))


def add_roadside(scene, rng, side):
    """One side of the street: a row of buildings, unless it is a park, and trees on the lawn."""
    edge, lawn, z = scene.kerb[side] + PAVEMENT, scene.lawn[side], rng.uniform(-8, 0)
    while not scene.park[side] and z < FAR:
        length = rng.uniform(7, 14)
        add(scene, draw_building, side * (edge + lawn + rng.uniform(0, 0.8)), z, 4.0, length)
        z += length + rng.choice([0, 2.5], p=[0.7, 0.3])
    for z in (6, 17, 30) if scene.park[side] else (9,) if lawn else ():
        for aside in (rng.uniform(0.3, 0.6) * lawn, *rng.uniform(7, 20, int(scene.park[side]))):
            add(scene, draw_tree, side * (edge + aside), z + rng.uniform(0, 6), 4.0, 2.0)


def add_cars_and_persons(scene, rng):
    """Cars drive away from us and towards us or are parked; persons walk along or towards us, or stand."""
    cars = [(1.6, rng.uniform(5, 14), 4.0)] if rng.random() < 0.6 else []   # x, z, meters/s
    cars += [(-1.6, z, -rng.uniform(4, 6)) for z in (rng.uniform(5, 9), rng.uniform(30, 50))]
    for side in (-1, 1):
        slots = np.arange(rng.uniform(2.5, 5), 26, 6.0) if scene.kerb[side] > 4 else ()
        cars += [(side * (scene.kerb[side] - 1.1), z, 0.0) for z in slots if rng.random() < 0.4]
    for x, z, speed in cars:
        add(scene, draw_car, x, z, 2.1, 4.4, speed)
    for index in range(rng.integers(2, 4)):
        z = rng.uniform(2.6, 4.2) if index < 2 else rng.uniform(4.0, 6.0)
        side = scene.side * rng.choice([1, -0.7], p=[0.75, 0.25])
        x = scene.eye_x + side * rng.uniform(0.6, max(0.3 * z, 1.0))
        add(scene, draw_person, x, z, 0.6, 0.4, rng.choice([-1.2, -0.8, 0.0, 0.8, 1.2]))


# ---- the camera and the four-channel buffer ----

class Canvas:
    """`pixels` (SUPER*H, SUPER*W, 4) uint8 = red, green, blue, class, and the camera that sees the street."""

    def __init__(self, scene, size, time):
        height, self.width = SUPER * size[0], SUPER * size[1]
        self.pixels = np.zeros((height, self.width, 4), np.uint8)
        self.focal, self.time = 1.3 * min(height, 0.8 * self.width), time
        self.center, self.horizon = scene.vanishing[0] * self.width, scene.vanishing[1] * height
        self.top = math.ceil(self.horizon)   # the first row of the ground
        self.eye = scene.eye_x, scene.eye_height + 0.012 * math.sin(3.1 * time), WALK * time
        self.sun, self.ambient, self.haze = scene.sun, scene.ambient, scene.haze

    def project(self, points):
        """World points (..., 3) -> points for cv2 (..., 2) int32, in 1/16 sample, and their depths (...).

        What is nearer than NEAR is moved there: exact for edges along the street, all others are out of view.
        """
        points = np.asarray(points, float) - self.eye
        depth = np.maximum(points[..., 2], NEAR)
        points[..., 0] = self.center + self.focal * points[..., 0] / depth
        points[..., 1] = self.horizon - self.focal * points[..., 1] / depth
        return (16 * points[..., :2]).astype(np.int32), depth

    def tone(self, rgb, kind, depth, light):
        """The four values to write: the color in the light, paler with distance, and the class."""
        near = math.exp(-depth / HAZE)
        pairs = zip(rgb, self.haze, strict=True)
        return *(min(value * light, 255) * near + haze * (1 - near) for value, haze in pairs), kind

    def fill(self, corners, rgb, kind, light=1.0):
        """Fill a polygon (N, 3) or several (M, N, 3) that do not overlap, in meters."""
        points, depth = self.project(corners)
        if depth.max() > NEAR:
            points = [points] if points.ndim == 2 else list(points)
            cv2.fillPoly(self.pixels, points, self.tone(rgb, kind, depth.mean(), light), shift=4)

    def disc(self, center, radius, rgb, kind, light=1.0):
        """Fill a disc of `radius` meters around a world point."""
        point, depth = self.project(center)
        cv2.circle(self.pixels, point.tolist(), int(16 * radius * self.focal / depth),
                   self.tone(rgb, kind, depth, light), -1, shift=4)

    def limb(self, joints, radius, rgb, kind):
        """Draw a round-ended line through world points (N, 3), darker away from the sun; radius in meters."""
        points, depth = self.project(joints)
        thick = radius * self.focal / depth[0]
        for light, width, shift in ((0.8, 2.0, 0), (1.04, 1.28, int(4.8 * thick * self.sun))):
            cv2.polylines(self.pixels, [points + (shift, 0)], False, self.tone(rgb, kind, depth[0], light),
                          max(round(width * thick), 1), shift=4)


# ---- the backdrop ----

def noise(scene, x, y):
    """Smooth noise, -1..1, at float coordinates (H, W); it repeats every 256."""
    return cv2.remap(scene.noise, np.float32(x % 256), np.float32(y % 256), cv2.INTER_LINEAR,
                     borderMode=cv2.BORDER_WRAP)


def draw_sky(canvas, scene):
    """Gradient, soft clouds that drift, and wooded hills along the horizon."""
    u = (np.arange(0, canvas.width + 4, 4, dtype=np.float32) - canvas.center) / canvas.focal
    v = (canvas.horizon - np.arange(0, canvas.top + 4, 4, dtype=np.float32))[:, None] / canvas.focal
    v = np.maximum(v, 0)
    y = 2.2 / (v + 0.12)   # clouds lie in a plane, so they flatten to the horizon
    x, y = u * y + 0.05 * canvas.time, y + 0 * u
    cover = sum(noise(scene, (x + 31) * scale, y * scale) / scale for scale in (1, 2, 4, 8))
    cloud = (np.clip(cover + 2 * scene.cloud - 0.7, 0, 1) * np.clip(v * 9, 0, 0.85))[..., None]
    blend = (np.clip(v / 0.55, 0, 1) ** 0.7)[..., None] + 0 * cloud
    sky = np.float32(scene.haze) * (1 - blend) + np.float32(scene.zenith) * blend
    sky += (0.45 * np.float32(scene.haze) + 132 - sky) * cloud
    sky = cv2.resize(np.clip(sky, 0, 255).astype(np.uint8), None, fx=4, fy=4)
    canvas.pixels[:canvas.top, :, :3] = sky[:canvas.top, :canvas.width]
    aside = np.linspace(-3, 3, 601)   # meters per meter ahead
    far = 0.1 + 0.04 * np.sin(4 * aside + scene.hills)
    near = 0.055 + 0.015 * np.sin(9 * aside + 2 * scene.hills) + 0.01 * np.abs(np.sin(46 * aside))
    for rise, rgb in ((far, (92, 132, 116)), (near, (54, 98, 62))):
        ridge = np.stack([aside, rise, np.ones_like(aside)], 1)
        canvas.fill(np.concatenate([ridge, [(3, 0, 1), (-3, 0, 1)]]) * 60 + canvas.eye, rgb, TREE)


def draw_ground(canvas, scene):
    """Grass, pavements with kerbs, and the road with its marks, in flat colors."""
    canvas.pixels[canvas.top:] = (*scene.grass, GRASS)

    def strip(x0, x1, z0, z1, rgb):
        points, depth = canvas.project([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)])
        if depth.max() > NEAR:
            cv2.fillPoly(canvas.pixels, [points], (*rgb, ROAD), shift=4)
    for side, kerb in scene.kerb.items():   # each on the one before
        strip(0, side * (kerb + PAVEMENT + (0 if scene.lawn[side] else 2)), -9, 900, scene.paving)
        strip(0, side * (kerb + 0.2), -9, 900, scene.paving * 1.16)
        strip(0, side * kerb, -9, 900, scene.asphalt)
    for z in np.arange(0, FAR, 6.5):
        strip(-0.08, 0.08, z, z + 3, WHITE)


def shade_ground(canvas, scene, placed):
    """Multiply the ground by noise that is fixed to it and by the shadows of all (thing, x, z); add haze."""
    ground = canvas.pixels[canvas.top:]
    rows = np.arange(canvas.top, len(canvas.pixels), dtype=np.float32)[:, None]
    depth = canvas.eye[1] * canvas.focal / np.maximum(rows + 0.5 - canvas.horizon, 0.5)   # (rows, 1)
    far = depth[::SUPER]
    aside = (np.arange(0, canvas.width, SUPER, dtype=np.float32) - canvas.center) / canvas.focal
    x, z = aside * far + canvas.eye[0], far + canvas.eye[2] + 0 * aside
    texture = noise(scene, x * 9, z * 5) * np.exp(-far / 16) + 0.5 * noise(scene, x, z * 0.5)
    texture *= np.where(ground[::SUPER, ::SUPER, 3] == GRASS, np.float32(0.2), np.float32(0.07))
    dark = np.zeros(canvas.pixels.shape[:2], np.uint8)
    for thing, x, z in placed:
        lean = -scene.sun * scene.lean * thing.width / 2
        foot = CIRCLE * (thing.width / 2 + abs(lean), 0.6 * thing.length) + (x + lean, z + thing.length / 2)
        cv2.fillPoly(dark, [canvas.project(np.insert(foot, 1, 0, 1))[0]], 255, shift=4)
    light = 1 - np.float32(scene.shadow / 255) * cv2.blur(dark, (5, 5))[canvas.top:]
    light *= 1 + cv2.resize(texture, (canvas.width, len(rows)))
    near = np.exp(-depth / HAZE)
    shaded = ground[..., :3] * (light * near)[..., None] + (np.float32(scene.haze) * (1 - near))[:, None]
    ground[..., :3] = np.minimum(shaded, 255)


# ---- the things: x, z = where the near end is now, rng = what decides what it looks like ----

def draw_building(canvas, rng, thing, x, z):
    """The wall along the street and the one that faces us; a house has a pitched roof."""
    side, trim = (1 if x > 0 else -1), WHITE if rng.random() < 0.7 else BARK
    colors = pick(rng, WALLS), trim, pick(rng, PAINTS)
    lit, front = (canvas.ambient if side == canvas.sun else 1.06), 0.5 + 0.5 * canvas.ambient
    house = rng.random() < 0.5
    floors = int(rng.integers(1, 3) if house else rng.integers(3, 6))
    far_x, far_z, high = x + 8 * side, z + thing.length, STOREY * floors
    eave, crest = (x - 0.4 * side, high - 0.2), (x + 4 * side, high + 2.6)
    if house:
        slope = [(*eave, z - 0.4), (*crest, z - 0.4), (*crest, far_z), (*eave, far_z)]
        canvas.fill(slope, pick(rng, ROOFS), BUILDING, lit)
    draw_wall(canvas, (x, 0, z), (x, 0, far_z), floors, colors, lit)
    draw_wall(canvas, (x, 0, z), (far_x, 0, z), floors, colors, front)
    if house:
        canvas.fill([(x, high, z), (far_x, high, z), (*crest, z)], colors[0], BUILDING, front)


def draw_wall(canvas, start, end, floors, colors, light):
    """A wall between two points on the ground, with windows in rows and a door; colors: wall, trim, door."""
    start, end, (wall, trim, door) = np.array(start, float), np.array(end, float), colors
    width = math.dist(start, end)

    def draw(rgb, middle, half, low, high):   # rectangles: meters along the wall and up
        sides = np.broadcast_arrays(middle - half, middle + half, low, high)
        left, right, low, high = (values.ravel() for values in sides)
        along, up = np.stack([left, right, right, left], 1), np.stack([low, low, high, high], 1)
        corners = start + along[..., None] * (end - start) / width + up[..., None] * (0, 1, 0)
        canvas.fill(corners, rgb, BUILDING, light)
    columns = max(int(width / 2.6), 1)
    middle, floor = (np.arange(columns) + 0.5) * width / columns, STOREY * np.arange(floors)[:, None]
    draw(wall, width / 2, width / 2, 0, STOREY * floors)
    draw(trim, width / 2, width / 2, STOREY * floors - 0.4, STOREY * floors)
    draw(trim, middle, 0.72, floor + 0.78, floor + 2.42)
    draw(GLASS, middle, 0.56, floor + 0.94, floor + 2.26)
    draw(trim, middle[columns // 2], 0.8, 0.0, 2.42)
    draw(door, middle[columns // 2], 0.62, 0.0, 2.3)


def draw_tree(canvas, rng, thing, x, z):
    """A trunk under a crown of leaf masses and small tufts; it sways a little."""
    green, radius, high = pick(rng, GREENS), rng.uniform(1.9, 3), rng.uniform(3.6, 5)
    sway = x + 0.07 * math.sin(1.4 * canvas.time + rng.uniform(0, 6.28))
    canvas.limb([(x, 0, z), (sway, high, z)], 0.24, BARK, TREE)
    for size in [0.38] * 16 + [0.1] * 24:
        angle, reach = rng.uniform(0, 6.28), math.sqrt(rng.uniform(0, 0.6))
        across, up = reach * math.cos(angle), reach * math.sin(angle)   # in units of the radius
        light = 0.9 + 0.22 * (across * canvas.sun + up) + rng.uniform(-0.12, 0.12)
        canvas.disc((sway + radius * across, high + radius * up, z), radius * size, green, TREE, light)


def draw_car(canvas, rng, thing, x, z):
    """A body and a cabin: faces across the street, far ones first, then the side turned to the camera."""
    paint, (body, cabin) = pick(rng, PAINTS), map(np.array, CARS[rng.choice(3, p=[0.45, 0.4, 0.15])])
    way, toward = (1 if x > 0 else -1), (1 if canvas.eye[0] > x else -1)
    side_light = 1.0 if toward == canvas.sun else canvas.ambient

    def fill(corners, rgb, light=1.0):   # corners (N, 3): meters to the right, up, ahead of the car's middle
        canvas.fill(np.array(corners) * (1, 1, way) + (x, 0, z + 2.2), rgb, CAR, light)

    def rectangle(middle, half, low, high, along, rgb):
        left, right = middle - half, middle + half
        fill([(left, low, along), (right, low, along), (right, high, along), (left, high, along)], rgb)

    def prism(outline, low_half, high_half, glass):   # half widths of its foot and its top
        half = np.interp(outline[:, 1], [outline[:, 1].min(), outline[:, 1].max()], [low_half, high_half])
        left, right = np.column_stack([-half, outline[:, ::-1]]), np.column_stack([half, outline[:, ::-1]])
        faces = [np.array([*left[i:i + 2], *right[i:i + 2][::-1]]) for i in range(len(outline) - 1)][::-way]
        for face in (*faces, right if toward > 0 else left):
            light = 0.95 if np.ptp(face[:, 0]) > 1 else side_light
            fill(face, paint, light)
            if glass and np.ptp(face[:, 1]) > 0.25:   # all but the roof
                fill(face.mean(0) + 0.84 * (face - face.mean(0)), GLASS, light)
    wheels, lamp = (body[0, 0] + 0.75, body[-1, 0] - 0.75), body[1, 1]
    for along in wheels:   # the underside, with the tires of the far side
        rectangle(0, 0.8, 0, 0.5, along, BLACK)
    prism(body, 0.86, 0.88, glass=False)
    for along in wheels:
        for radius, rgb in ((0.35, BLACK), (0.19, CHROME)):
            fill(np.column_stack([np.full(20, 0.9 * toward), radius * CIRCLE + (0.35, along)]), rgb)
    end, rgb = (body[1, 0], RED) if way > 0 else (body[-1, 0], WHITE)
    for middle in (-0.66, 0.66):
        rectangle(middle, 0.16, lamp - 0.2, lamp - 0.02, end, rgb)
    rectangle(0, 0.26, 0.42, 0.55, end, WHITE)   # the number plate
    prism(cabin, 0.82, 0.64, glass=True)


def draw_person(canvas, rng, thing, x, z):
    """Legs and arms that swing while walking, torso, head with hair; flat, turned to the camera."""
    shirt, trousers, skin, hair = (pick(rng, table) for table in (SHIRTS, TROUSERS, SKINS, HAIRS))
    size, wide, dress = rng.uniform(1.0, 1.15), rng.uniform(0.85, 1.2), rng.random() < 0.25
    swing = math.sin(5.6 * thing.speed * canvas.time + rng.uniform(0, 6.28)) if thing.speed else 0.0

    def limb(radius, rgb, *joints):   # joints: meters across and up, of a person of 1.8 m
        canvas.limb([(x + size * across, size * up, z) for across, up in joints], size * radius, rgb, PERSON)
    for side in (-1, 1):
        hip, lift = 0.1 * side * wide, max(side * swing, 0)
        foot = 0.8 * hip, 0.08 + 0.14 * lift
        limb(0.09, skin if dress else trousers, (hip, 0.92), (hip * (1 + 0.3 * lift), 0.5), foot)
        limb(0.07, BLACK, foot, (foot[0] + 0.04 * side, foot[1] - 0.02))
    hem, foot = (0.27, 0.62) if dress else (0.17, 0.9)   # half width and height of the shirt's lower edge
    torso = [(-0.27, 1.42), (0.27, 1.42), (hem, foot), (-hem, foot)]
    canvas.fill([(x + size * wide * across, size * up, z) for across, up in torso], shirt, PERSON)
    for side in (-1, 1):
        shoulder, lift = 0.24 * side * wide, max(-side * swing, 0)
        limb(0.07, skin, (1.1 * shoulder, 1.16), (1.2 * shoulder, 0.9 + 0.12 * lift))
        limb(0.09, shirt, (shoulder, 1.35), (1.1 * shoulder, 1.14))
    limb(0.065, skin, (0, 1.45), (0, 1.55))
    balls = [(0, 1.645, 0.13, skin), (0, 1.71, 0.14, hair)]   # across, up, radius, color
    if thing.speed <= 0:   # looks at us
        balls = balls[::-1] + [(-0.05, 1.67, 0.016, BLACK), (0.05, 1.67, 0.016, BLACK)]
    for across, up, radius, rgb in balls:
        canvas.disc((x + size * across, size * up, z), size * radius, rgb, PERSON)


# ---- pictures and clips ----

def render(scene, size, time):
    """One picture of a described scene: image (H, W, 3) and mask (H, W), both uint8."""
    canvas = Canvas(scene, size, time)
    placed = [(thing, thing.x, thing.z + thing.speed * time) for thing in scene.things]
    placed = [(thing, x, z) for thing, x, z in placed if z + thing.length > canvas.eye[2] + NEAR]
    placed.sort(key=lambda entry: (entry[0].draw is not draw_building, -entry[2]))   # from back to front
    draw_sky(canvas, scene)
    draw_ground(canvas, scene)
    shade_ground(canvas, scene, placed)
    for thing, x, z in placed:
        thing.draw(canvas, np.random.default_rng(thing.seed), thing, x, z)
    mask = np.ascontiguousarray(canvas.pixels[SUPER // 2::SUPER, SUPER // 2::SUPER, 3])
    image = cv2.resize(canvas.pixels, (size[1], size[0]), interpolation=cv2.INTER_AREA)[..., :3]
    rng = np.random.default_rng([*scene.seed, 2, round(time * 1000)])
    grain = np.float32(scene.grain) * rng.standard_normal((*size, 1), np.float32)
    image = image * np.float32(scene.tint) + grain
    return np.clip(image, 0, 255).astype(np.uint8), mask


def draw_scene(seed, size=(256, 320), time=0.0):
    """One street scene of size (H, W): image (H, W, 3) uint8 RGB and mask (H, W) uint8 with the classes 0..6.

    `seed` is an int >= 0 or a tuple of them; `time` >= 0, in seconds, moves camera, cars and persons.
    """
    return render(describe(seed), size, float(time))


def draw_clip(seed, size, frames, fps):
    """Yield `frames` pairs of image and mask, as draw_scene, of one scene: pair i at i / fps seconds.

    For up to a minute: the camera walks, the cars drive away, and the street ends after 90 m.
    """
    scene = describe(seed)
    for index in range(frames):
        yield render(scene, size, index / fps)


# ---- the data set on disk ----

def settings_of(train, val, size, seed):
    """What streets.json holds: all that decides the files of a data set."""
    return dict(version=VERSION, seed=seed, size=list(size), train=train, val=val)


def is_current(root, train, val, size, seed):
    """Whether `root` holds all that `write_streets` would write today with these arguments."""
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            if len(list(Path(root, split, kind).glob("*.png"))) != count:
                return False
    try:
        return json.loads(Path(root, "streets.json").read_text()) == settings_of(train, val, size, seed)
    except (OSError, ValueError):
        return False


def write_pair(job):
    """Draw and write one image and its mask; job = folder of the split, number, seed, (H, W), palette."""
    folder, index, seed, size, palette = job
    image, mask = draw_scene(seed, size)
    Image.fromarray(image).save(folder / "images" / f"{index:05d}.png", compress_level=1)
    mask = Image.fromarray(mask)
    mask.putpalette(palette)   # makes it a palette picture, mode P
    mask.save(folder / "masks" / f"{index:05d}.png", compress_level=1)


def write_pairs(jobs):
    """Run `write_pair` on all jobs, in several processes if there are many."""
    progress = dict(total=len(jobs), desc="drawing streets", leave=False, disable=None)
    workers = min(os.cpu_count() or 1, len(jobs) // 32, 8)
    if workers < 2:
        for job in tqdm(jobs, **progress):
            write_pair(job)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, cv2.setNumThreads, (1,)) as pool:
        for _ in tqdm(pool.map(write_pair, jobs, chunksize=8), **progress):
            pass


def write_streets(root, classes, train=480, val=96, size=(256, 320), seed=0):
    """Write root/{train,val}/{images,masks}/00000.png ..., root/classes.txt and root/streets.json.

    `classes` lists the seven (name, (r, g, b)) in mask order. All is written to a folder next to root and
    renamed at the end, so an interrupted run leaves no root; an older set is replaced, anything else at root
    raises FileExistsError. Draws in several processes: a script needs the usual `if __name__ == "__main__":`.
    """
    root = Path(root).absolute()
    if len(classes) != 7:
        raise ValueError(f"street scenes have 7 classes, got {len(classes)}")
    if root.exists() and not (root / "streets.json").exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} exists and holds no street scenes: choose another folder")
    draft = root.with_name(f".{root.name}.{os.getpid()}.part")
    palette = [value for _, rgb in classes for value in rgb]
    jobs = []
    try:
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            for kind in ("images", "masks"):
                (draft / split / kind).mkdir(parents=True)
            jobs += [(draft / split, index, (seed, number, index), size, palette) for index in range(count)]
        (draft / "classes.txt").write_text("".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in classes))
        (draft / "streets.json").write_text(json.dumps(settings_of(train, val, size, seed)) + "\n")
        write_pairs(jobs)
        if root.exists():
            shutil.rmtree(root)
        draft.rename(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_examples(root):
    """Return (root/picture.png, root/clip.mp4), drawn where missing; nothing trains on them.

    Returns () where they are missing and cannot be written, as on a medium that is read-only.
    """
    from utils import save_image, write_atomically   # not above: the processes that draw need no torch
    picture, clip = Path(root) / "picture.png", Path(root) / "clip.mp4"
    try:
        if not picture.exists():
            save_image(draw_scene(10_006, size=(480, 640))[0], picture)
        if not clip.exists():
            write_atomically(clip, write_clip)
    except OSError:
        return ()
    return picture, clip


def write_clip(path):
    """Draw six seconds of a street into a video file (mp4v, which every OpenCV writes)."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 15, (640, 360))
    for frame, _ in draw_clip(322, (360, 640), frames=90, fps=15):
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
