"""Street scenes drawn by code: a segmentation data set with exact masks and nothing to download.

    image, mask = draw_scene(3)                        # (256, 320, 3) and (256, 320) uint8
    for image, mask in draw_clip(3, (360, 640), frames=50, fps=25): ...

World frame: meters, x to the right, y up, z ahead; the camera stays at z = 0, the street slides towards it.
The buffer has four channels, red, green, blue and class: every shape writes its color and its class in one
call, so image and mask cannot disagree. `describe` makes all random choices; the rest of the file draws.
"""
import json
import math
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

VERSION = 1  # raise it whenever the pictures change: data sets on disk are then drawn again
SKY, ROAD, GRASS, BUILDING, TREE, CAR, PERSON = range(7)
SUPER = 2    # the buffer has SUPER x SUPER samples a pixel, for smooth edges
NEAR, HAZE = 0.4, 170.0       # meters; what is nearer than NEAR is cut off, colors fade over HAZE
BEHIND, PERIOD = 14.0, 104.0  # meters; the street repeats, what is BEHIND behind comes back PERIOD ahead
MOODS = (   # zenith, horizon, tint of the light, light in the shade, darkness of cast shadows, how often
    ((58, 126, 214), (178, 214, 242), (1.04, 1.02, 0.97), 0.66, 0.42, 0.42),   # noon
    ((92, 152, 222), (236, 226, 206), (1.08, 1.01, 0.90), 0.62, 0.40, 0.24),   # morning
    ((146, 162, 182), (206, 214, 222), (0.94, 0.97, 1.02), 0.86, 0.12, 0.20),  # overcast
    ((72, 84, 154), (246, 172, 122), (1.02, 0.86, 0.84), 0.66, 0.30, 0.14))    # dusk
WALLS = "c08468 debe8c e8d6ba 9c6450 ce9c74 d2b478 e0c0b0 b8a08c"
ROOFS, TRIMS, DOORS = "a05a44 7c5240 5c5660 9c6c4c", "f2ece0 fafaf6 785438", "2c5a8c 7a4a30 3a6a5a 34404c"
PAINTS = "1c54be f4f4f8 0c98a8 3a86d8 dce4f0 2c46c8 c01c2c 243c8c"
SHIRTS, TROUSERS = "f2387e face36 9634a8 f07a28 f26ea0 d83ac0 fa9c2c", "2c3474 5a2a4c 6a4226 3a3486 8a5a2c"
SKINS, HAIRS = "f4ceae e2b28c ba805c 82543c 603e2e", "2c1e18 5c381e cea458 1a181c 964622 a09ea0"
GREENS, LAWNS = "3a7a2c 4a8628 2c6834 608a2e 568c3a", "60a63e 70ac3a 54963c 8ca846"
BARK, GLASS, RUBBER, CHROME = (104, 74, 52), (58, 86, 114), (28, 28, 32), (190, 194, 200)
WHITE, LAMP, RED, SHOE = (236, 236, 226), (255, 248, 214), (230, 30, 36), (52, 40, 40)
CARS = (  # saloon, hatchback, van: body and cabin from the side, (along, up) in meters, the nose at +along
    (((-2.2, 0.3), (-2.25, 0.8), (-2.1, 0.98), (1.1, 0.96), (2.1, 0.78), (2.25, 0.3)),
     ((-1.75, 0.96), (-1.1, 1.46), (0.35, 1.46), (1.1, 0.95))),
    (((-1.9, 0.3), (-1.95, 0.8), (-1.9, 1.0), (1.0, 0.98), (1.85, 0.8), (1.95, 0.3)),
     ((-1.88, 0.98), (-1.55, 1.56), (0.3, 1.56), (1.0, 0.97))),
    (((-2.3, 0.32), (-2.35, 0.8), (-2.3, 1.1), (1.7, 1.1), (2.25, 0.95), (2.35, 0.32)),
     ((-2.3, 1.1), (-2.2, 2.1), (0.9, 2.1), (1.75, 1.1))))
CIRCLE = np.stack([np.cos(np.arange(20) * math.pi / 10), np.sin(np.arange(20) * math.pi / 10)], 1)


# ---- what is in a scene: everything random is decided here, once, whatever the size and the time ----

def describe(seed):
    """A scene as plain values: light, camera, street, things. `seed`: an int >= 0 or a tuple of them."""
    rng = np.random.default_rng([*np.atleast_1d(seed).tolist(), 1])
    scene = SimpleNamespace(seed=seed, noise=rng.uniform(-1, 1, (256, 256)).astype(np.float32), things=[])
    mood = MOODS[rng.choice(4, p=[mood[-1] for mood in MOODS])]
    scene.zenith, scene.haze, scene.tint, scene.ambient, scene.shadow, _ = mood
    scene.cloud = 0.7 if scene.shadow < 0.2 else rng.uniform(0.1, 0.55)
    scene.exposure, scene.blur = rng.uniform(0.9, 1.08), rng.uniform(0.0, 0.6)
    scene.grain = rng.uniform(0.8, 2.8)
    sun = rng.choice([-1, 1]) * rng.uniform(0.35, 0.9), rng.uniform(0.6, 1.1), rng.uniform(-0.9, -0.1)
    scene.sun, scene.hills = [s / math.hypot(*sun) for s in sun], rng.uniform(0, 6.28, 4)
    scene.here = here = int(rng.choice([-1, 1]))   # the camera walks on this side's pavement
    parked = {here: rng.random() < 0.7, -here: rng.random() < 0.3}
    scene.kerb = {side: 5.3 if parked[side] else 3.1 for side in (here, -here)}
    scene.pavement, scene.grass = rng.uniform(1.6, 2.0), pick(rng, LAWNS)
    scene.park = {here: rng.random() < 0.45, -here: rng.random() < 0.3}   # lawn and trees, no buildings
    scene.lawn = {here: rng.uniform(4.5, 8), -here: 5.0 if scene.park[-here] else 0.0}
    scene.eye_x, scene.eye_height = here * (scene.kerb[here] + rng.uniform(0.6, 0.9)), rng.uniform(1.8, 2.5)
    scene.yaw, scene.pan = here * rng.uniform(-0.12, 0.24), rng.uniform(-0.05, 0.05)
    scene.speed, scene.horizon = rng.uniform(0.5, 0.9), rng.uniform(0.45, 0.53)
    scene.asphalt = rng.uniform(84, 116) + np.array([0, 1, 5])
    scene.paving = rng.uniform(158, 190) - np.array([0, 4, 12])
    scene.zebra = rng.uniform(6.0, 8.0) if rng.random() < 0.25 else None
    for side in (-1, 1):
        describe_side(scene, rng, side)
    describe_cars(scene, rng)
    describe_persons(scene, rng)
    return scene


def pick(rng, table):
    """A color [red, green, blue] of a table of hexadecimal ones, varied a little."""
    rgb = np.array(list(bytes.fromhex(table)), float).reshape(-1, 3)
    return np.clip(rng.choice(rgb) * rng.uniform(0.9, 1.1) + rng.uniform(-8, 8, 3), 0, 255).tolist()


def add(scene, draw, x, z, shadow, **values):
    """Adds a thing: its place at time 0, half width, half length and height of its shadow (m), and more."""
    still = dict(vx=0.0, vz=0.0, length=0.0)   # speed in m/s, length along the street
    scene.things.append(SimpleNamespace(draw=draw, x=x, z=z, shadow=shadow, **{**still, **values}))


def describe_side(scene, rng, side):
    """One side of the street: a row of buildings, unless it is a park, and trees on the lawn."""
    edge, lawn, z = scene.kerb[side] + scene.pavement, scene.lawn[side], -BEHIND + rng.uniform(0, 4)
    while not scene.park[side] and z < PERIOD - BEHIND - 8:
        kind = rng.choice(["house", "block", "shop"], p=[0.5, 0.25, 0.25])
        length = min(rng.uniform(7, 11) if kind == "house" else rng.uniform(10, 16), PERIOD - BEHIND - z)
        floors = int(rng.integers(1, 3) if kind == "house" else rng.integers(3, 6))
        add(scene, draw_building, side * (edge + lawn + rng.uniform(0, 0.8)), z, (0.1, length / 2, 6),
            length=length, kind=kind, side=side, floors=floors, storey=rng.uniform(2.9, 3.3),
            deep=rng.uniform(7, 10), wall=pick(rng, WALLS), roof=pick(rng, ROOFS), trim=pick(rng, TRIMS),
            door=pick(rng, DOORS), gable=bool(rng.random() < 0.5))
        z += length + (rng.uniform(1, 4) if rng.random() < 0.3 else 0.0)
    for z in (-4, 8, 20) if scene.park[side] else (5,) if lawn else ():
        for x in (rng.uniform(0.3, 0.6) * lawn, *rng.uniform(7, 26, int(scene.park[side]))):
            describe_tree(scene, rng, side * (edge + x), z + rng.uniform(0, 6))


def describe_tree(scene, rng, x, z):
    """A fir, or a round tree of 16 masses of leaves and 50 tufts (across, up, size, shade) in its radius."""
    angle, reach = rng.uniform(0, 6.28, 66), np.sqrt(rng.random(66)) * np.repeat([0.68, 0.88], [16, 50])
    across, up, size = reach * np.cos(angle), reach * np.sin(angle), rng.uniform(0.32, 0.48, 66)
    size[16:] *= 0.17
    shade = 0.9 + 0.22 * (across * np.sign(scene.sun[0]) + up) + rng.uniform(-0.12, 0.12, 66)
    order = [*np.argsort(shade[:16]), *range(16, 66)]   # the lit masses lie on the dark ones
    height, radius = rng.uniform(5.6, 8) * np.array([1, rng.uniform(0.33, 0.4)])
    add(scene, draw_tree, x, z, (0.8 * radius, 0.8 * radius, height - radius), fir=bool(rng.random() < 0.3),
        height=height, radius=radius, green=pick(rng, GREENS), phase=rng.uniform(0, 6.28),
        blobs=np.stack([across, up, size, shade], 1)[order])


def describe_cars(scene, rng):
    """Cars drive away from us and towards us, or wait at a zebra crossing; others are parked."""
    def car(x, z, vz=0.0):
        shape = CARS[rng.choice(3, p=[0.45, 0.4, 0.15])]
        way = 1 if x > 0 else -1
        add(scene, draw_car, x, z, (1.05, 2.3, 0.8), vz=vz, way=way, shape=shape, paint=pick(rng, PAINTS))
    start, speed = (5.0, -rng.uniform(4, 7)) if scene.zebra is None else (scene.zebra + 3, 0.0)
    if rng.random() < 0.6:
        car(1.6, start + rng.uniform(1.5, 3.5), vz=4.0)
    for z in (start + rng.uniform(1.5, 4), rng.uniform(84, 89)):
        car(-1.6, z, vz=speed)
    for side in (-1, 1):
        for z in np.arange(rng.uniform(4.5, 7), 15, 6.0) if scene.kerb[side] > 4 else ():
            if rng.random() < 0.8 and (scene.zebra is None or abs(z - scene.zebra) > 4):
                car(side * (scene.kerb[side] - 1.1), z)


def describe_persons(scene, rng):
    """Two or three persons walk along with us or towards us, stand, or walk over the zebra crossing."""
    for index in range(3 if scene.zebra is not None else 2 + int(rng.random() < 0.4)):
        side = -1 if index == 2 and scene.kerb[scene.here] < 4 else 1   # the camera passes between them
        aside, angle = rng.uniform(0.8, 1.1 if side < 0 else 1.8), 0.38 + side * scene.here * scene.yaw
        x = scene.eye_x + side * scene.here * aside
        z = max(3.0 + 0.7 * index, aside / math.tan(max(angle, 0.15))) + rng.uniform(0, 0.6)   # is in view
        pace, way = rng.uniform(0.8, 1.3), int(rng.choice([-1, 1]))
        heading, motion = (0.0 if way > 0 else math.pi), dict(vz=way * pace)
        if index == 2 and scene.zebra is not None:
            way, pace = -scene.here, 0.8   # to the other side
            x, z = rng.uniform(-3, 0.5) * way, scene.zebra + rng.uniform(-0.8, 0.8)
            heading, motion = way * math.pi / 2, dict(vx=way * pace)
        elif rng.random() < 0.16:
            heading, pace, motion = rng.uniform(0, 6.28), 0.0, {}
        add(scene, draw_person, x, z, (0.28, 0.28, 1.6), heading=heading, pace=pace,
            size=rng.uniform(1.05, 1.2), phase=rng.uniform(0, 6.28), skin=pick(rng, SKINS),
            hair=pick(rng, HAIRS), shirt=pick(rng, SHIRTS), legs=pick(rng, TROUSERS),
            dress=bool(rng.random() < 0.25), long_hair=bool(rng.random() < 0.4),
            sleeves=bool(rng.random() < 0.5), **motion)


# ---- the camera and the four-channel buffer ----

class Canvas:
    """`pixels` (SUPER*H, SUPER*W, 4) uint8 = red, green, blue, class, and the camera that sees the street."""

    def __init__(self, scene, size, time):
        height, self.width = SUPER * size[0], SUPER * size[1]
        self.pixels = np.zeros((height, self.width, 4), np.uint8)
        self.focal, self.horizon = 1.3 * min(height, 0.8 * self.width), scene.horizon * height
        self.top = math.ceil(self.horizon)  # the first row of the ground
        self.eye = (scene.eye_x, scene.eye_height + 0.012 * math.sin(3.1 * time), 0.0)
        self.slide, self.time, yaw = scene.speed * time, time, scene.yaw + scene.pan * math.sin(0.45 * time)
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)
        self.turn = np.array([[self.cos, 0, self.sin], [0, 1, 0], [-self.sin, 0, self.cos]])
        self.haze, self.ambient, self.sun = scene.haze, scene.ambient, scene.sun

    def ahead(self, z):
        """Where something at z meters along the street is by now; the street repeats every PERIOD meters."""
        return (z - self.slide + BEHIND) % PERIOD - BEHIND

    def tone(self, rgb, kind, depth, gain=1.0):
        """The four values to write: color times gain, paler with distance, and the class."""
        near = math.exp(-depth / HAZE)
        pairs = zip(rgb, self.haze, strict=True)
        return *(min(c * gain, 255) * near + h * (1 - near) for c, h in pairs), kind

    def see(self, point):
        """World point -> x, y in 1/16 sample, 1/16 samples per meter there, depth; None if it is too near."""
        x, y, z = point[0] - self.eye[0], point[1] - self.eye[1], point[2]
        depth = z * self.cos + x * self.sin
        if depth < NEAR:
            return None
        scale = 16 * self.focal / depth
        x = 8 * self.width + (x * self.cos - z * self.sin) * scale
        return x, 16 * self.horizon - y * scale, scale, depth

    def outline(self, corners):
        """World points -> points for cv2 (1/16 sample) and a depth in meters.

        One polygon (N, 3) is clipped at NEAR; of several, (M, N, 3), those that reach it are left out.
        """
        seen = (np.asarray(corners, float) - self.eye) @ self.turn
        if seen.ndim == 3:
            seen = seen[seen[..., 2].min(1) > NEAR]
        elif seen[:, 2].min() < NEAR:
            after, beyond = np.roll(seen, -1, 0), seen[:, 2:] >= NEAR
            with np.errstate(divide="ignore", invalid="ignore"):
                cuts = seen + (after - seen) * ((NEAR - seen[:, 2:]) / (after[:, 2:] - seen[:, 2:]))
            seen = np.stack([seen, cuts], 1)[np.hstack([beyond, beyond != np.roll(beyond, -1, 0)])]
        screen = seen[..., :2] * (16 * self.focal, -16 * self.focal) / seen[..., 2:]
        screen += (8 * self.width, 16 * self.horizon)
        return screen.astype(np.int32), seen[..., 2].mean() if seen.size else NEAR

    def fill(self, corners, rgb, kind, gain=1.0):
        """Fills a polygon (N, 3) or several (M, N, 3) that do not overlap, meters; False if out of view."""
        points, depth = self.outline(corners)
        across = points[..., 0]
        if not points.size or across.max() < 0 or across.min() > 16 * self.width:
            return False
        points = [points] if points.ndim == 2 else list(points)
        cv2.fillPoly(self.pixels, points, self.tone(rgb, kind, depth, gain), shift=4)
        return True

    def face(self, corners, rgb, kind, inside):
        """Fills the face (N, 3), or the faces (M, N, 3) in one plane, of a solid around the point `inside`.

        Its light follows from where it faces. Returns False if it faces away or is out of view.
        """
        corners = np.asarray(corners, float)
        (ax, ay, az), b, c = corners.reshape(-1, 3)[:3].tolist()
        ux, uy, uz, vx, vy, vz = b[0] - ax, b[1] - ay, b[2] - az, c[0] - ax, c[1] - ay, c[2] - az
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        outward = nx * (ax - inside[0]) + ny * (ay - inside[1]) + nz * (az - inside[2])
        if outward * (nx * (ax - self.eye[0]) + ny * (ay - self.eye[1]) + nz * az) >= 0:
            return False
        length = math.copysign(math.hypot(nx, ny, nz), outward)
        light = max((nx * self.sun[0] + ny * self.sun[1] + nz * self.sun[2]) / length, 0)
        light = self.ambient + (1.12 - self.ambient) * light + 0.06 * ny / length
        return self.fill(corners, rgb, kind, light)

    def ball(self, center, radius, rgb, kind):
        """A disc of `radius` meters around a world point."""
        if seen := self.see(center):
            x, y, scale, depth = seen
            tone = self.tone(rgb, kind, depth)
            cv2.circle(self.pixels, (int(x), int(y)), int(radius * scale), tone, -1, shift=4)

    def limb(self, start, end, radius, rgb, kind):
        """A round-ended limb between two world points, darker away from the sun; radius in meters."""
        a, b = self.see(start), self.see(end)
        for gain, size, move in ((0.80, 2.0, 0.0), (1.04, 1.28, 0.3)) if a and b else ():
            thick, shift = radius * a[2], math.copysign(move * radius * a[2], self.sun[0])
            cv2.line(self.pixels, (int(a[0] + shift), int(a[1])), (int(b[0] + shift), int(b[1])),
                     self.tone(rgb, kind, a[3], gain), max(round(size * thick / 16), 1), shift=4)


# ---- the backdrop ----

def noise(scene, x, y):
    """Smooth noise, -1..1, at float coordinates (H, W); it repeats every 256."""
    x, y = (np.float32(v - 256 * np.floor(v / 256)) for v in (x, y))
    return cv2.remap(scene.noise, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_WRAP)


def draw_sky(canvas, scene):
    """Gradient, soft clouds that drift, and two ranges of wooded hills along the horizon."""
    rows, columns = canvas.top // 4 + 2, canvas.width // 4 + 1
    u = (np.arange(columns, dtype=np.float32) / columns - 0.5) * canvas.width / canvas.focal
    u += canvas.sin / canvas.cos
    v = np.maximum(canvas.horizon - 4 * np.arange(rows, dtype=np.float32), 0)[:, None] / canvas.focal
    flat = 2.2 / (v + 0.12)   # clouds lie in a plane, so they flatten to the horizon
    x, y = u * flat + 0.05 * canvas.time, flat + 0 * u
    cover = sum(noise(scene, x * 2 ** k + 31 * k, y * 2 ** k) / 2 ** k for k in range(4))
    alpha = (np.clip((cover + 2.0 * scene.cloud - 0.75) * 1.1, 0, 1) * np.clip(v * 9, 0, 0.85))[..., None]
    blend = np.clip(v / 0.55, 0, 1)[..., None] ** 0.7
    sky = (np.float32(scene.haze) * (1 - blend) + np.float32(scene.zenith) * blend) * (1 - alpha)
    sky += (0.45 * np.float32(scene.haze) + 140 - 34 * np.clip(cover - 0.2, 0, 1)[..., None]) * alpha
    sky = cv2.resize(np.clip(sky, 0, 255).astype(np.uint8), (canvas.width, 4 * rows))
    canvas.pixels[:canvas.top, :, :3] = sky[:canvas.top]
    turn = np.linspace(-1.3, 1.3, 261)   # direction of the view, in radians from straight ahead
    for rgb, base, bumps, (a, b) in (((92, 132, 116), 0.10, 0.0, scene.hills[:2]),
                                     ((54, 98, 62), 0.06, 0.008, scene.hills[2:])):
        rise = base * (1 + 0.4 * np.sin(4 * turn + a) + 0.25 * np.sin(9 * turn + b))
        rise += bumps * (np.abs(np.sin(46 * turn)) + 0.5 * np.abs(np.sin(119 * turn)))
        ridge = np.stack([np.tan(turn), rise, np.ones_like(turn)], 1)
        canvas.fill(np.concatenate([ridge, [[4, -0.01, 1], [-4, -0.01, 1]]]) * 60 + canvas.eye, rgb, TREE)


def draw_ground(canvas, scene):
    """Grass, pavements, kerbs, roads, parking lines, lane marks and a zebra crossing, in flat colors."""
    canvas.pixels[canvas.top:] = (*scene.grass, GRASS)

    def strip(x0, x1, z0, z1, rgb):
        points, _ = canvas.outline([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)])
        if points.size:
            cv2.fillPoly(canvas.pixels, [points], (*rgb, ROAD), shift=4)
    left, right, kerb = -scene.kerb[-1], scene.kerb[1], scene.paving * 1.16
    for side, edge in scene.kerb.items():
        strip(0, side * (edge + scene.pavement + (0 if scene.lawn[side] else 2)), -9, 900, scene.paving)
    strip(left - 0.2, right + 0.2, -9, 900, kerb)
    strip(left, right, -9, 900, scene.asphalt)
    for side, edge in scene.kerb.items():
        if edge > 4:
            strip(side * 3.1 - 0.06, side * 3.1 + 0.06, -9, 900, WHITE)
    for z in canvas.ahead(np.arange(0, PERIOD, 6.5)):
        strip(-0.08, 0.08, z, z + 3, WHITE)
    if scene.zebra is not None:
        z = canvas.ahead(scene.zebra)
        strip(left, right, z - 2, z + 2, scene.asphalt)
        for x in np.arange(left + 0.3, right - 0.3, 1.0):
            strip(x, x + 0.5, z - 1.4, z + 1.4, WHITE)


def shade_ground(canvas, scene, shadows):
    """Multiplies the ground by noise that is fixed to it and by the cast shadows, and adds haze."""
    top, half = canvas.top, SUPER // 2
    rows = np.arange(top + half, len(canvas.pixels), SUPER, dtype=np.float32)[:, None]
    depth = canvas.eye[1] * canvas.focal / np.maximum(rows + 0.5 - canvas.horizon, 0.5)
    aside = np.arange(half, canvas.width, SUPER, dtype=np.float32) + 0.5 - canvas.width / 2
    aside = aside / canvas.focal * depth
    x = canvas.cos * aside + canvas.sin * depth + canvas.eye[0]
    z = canvas.cos * depth - canvas.sin * aside + canvas.slide
    fine = noise(scene, x * 9, z * 5) * np.exp(-depth / 16)
    fine += 0.5 * (noise(scene, x, z * 0.5) + noise(scene, x * 2.7, z * 1.6) * np.exp(-depth / 40))
    grassy = canvas.pixels[top + half::SUPER, half::SUPER, 3] == GRASS
    fine *= np.where(grassy, np.float32(0.2), np.float32(0.07))
    dark = np.zeros(canvas.pixels.shape[:2], np.uint8)
    for points, _ in map(canvas.outline, shadows):
        if points.size:
            cv2.fillPoly(dark, [points], 255, shift=4)
    size = (canvas.width, len(canvas.pixels) - top)
    near = cv2.resize(np.exp(-depth / HAZE), (1, size[1]))
    gain = 1 - np.float32(scene.shadow / 255) * cv2.blur(dark[top:], (5, 5))
    gain *= near * (1 + cv2.resize(fine, size))
    ground = canvas.pixels[top:, :, :3] * gain[..., None]
    ground += np.float32(scene.haze) * (1 - near[..., None])
    canvas.pixels[top:, :, :3] = np.minimum(ground, 255, out=ground)


# ---- the things: `at` meters aside and z ahead is their place now, `grown` their growth, 0..1 ----

def draw_building(canvas, item, at, z, grown):
    """Walls with windows, a door or a shop front, and a flat roof with a cornice or a gabled one."""
    high, x1, z1 = item.floors * item.storey * grown, at + item.side * item.deep, z + item.length
    inside = ((at + x1) / 2, high / 2, z + item.length / 2)
    for start, end in (((at, 0, z1), (at, 0, z)), ((at, 0, z), (x1, 0, z)), ((at, 0, z1), (x1, 0, z1))):
        draw_wall(canvas, item, np.array(start), np.array(end), grown, inside)
    if item.kind != "house":
        return
    e0, e1, n0, n1 = at - 0.35 * item.side, x1 + 0.35 * item.side, z - 0.35, z1 + 0.35
    top, low, (mx, _, mz) = high + 2.6 * grown, high - 0.15, inside
    if item.gable:   # the ridge runs away from the street, or along it
        gables = [[(at, high, z), (at, high, z1), (at, top, mz)]]
        slopes = [[(e0, low, n), (e1, low, n), (e1, top, mz), (e0, top, mz)] for n in (n1, n0)]
    else:
        gables = [[(at, high, n), (x1, high, n), (mx, top, n)] for n in (z, z1)]
        slopes = [[(e, low, n0), (e, low, n1), (mx, top, n1), (mx, top, n0)] for e in (e1, e0)]
    for gable in gables:
        canvas.face(gable, item.wall, BUILDING, inside)
    for slope in np.array(slopes):
        if canvas.face(slope, item.roof, BUILDING, inside):
            eave, ridge = slope[[0, 1, 1, 0]], slope[[3, 2, 2, 3]]
            up = np.array([[0], [0], [0.05], [0.05]])
            rows = [eave + (ridge - eave) * (t + up) for t in (0.18, 0.4, 0.62, 0.84)]
            canvas.face(rows, [0.82 * c for c in item.roof], BUILDING, inside)


def draw_wall(canvas, item, start, end, grown, inside):
    """One wall between two points on the ground, with all that is on it."""
    width, top, rise = math.dist(start, end), item.floors * item.storey, np.array([0, grown, 0])

    def draw(rgb, a0, a1, y0, y1):   # rectangles a0..a1 along the wall and y0..y1 up, meters
        a0, a1, y0, y1 = (v.ravel() for v in np.broadcast_arrays(a0, a1, y0, y1))
        along, up = np.stack([a0, a1, a1, a0], 1)[..., None], np.stack([y0, y0, y1, y1], 1)[..., None]
        return canvas.face(start + along * ((end - start) / width) + up * rise, rgb, BUILDING, inside)
    if not draw(item.wall, 0, width, 0, top):
        return
    columns = max(int(width / 2.6), 1)
    middle = (np.arange(columns) + 0.5) * width / columns
    floor = (np.arange(item.floors) * item.storey)[:, None]
    draw([0.7 * c for c in item.wall], 0, width, 0, 0.5)
    if item.kind != "house":
        draw(item.trim, 0, width, np.append(floor[1:] - 0.12, top - 0.5), np.append(floor[1:] + 0.12, top))
    if item.kind == "shop":
        draw(GLASS, 0.5, width - 0.5, 0.5, 2.3)
        draw(item.door, 0.3, width - 0.3, 2.3, 2.9)
        floor = floor[1:]
    draw(item.trim, middle - 0.72, middle + 0.72, floor + 0.78, floor + 2.42)
    draw((70, 96, 122), middle - 0.58, middle + 0.58, floor + 0.92, floor + 2.3)
    draw((104, 132, 156), middle - 0.58, middle + 0.58, floor + 1.7, floor + 2.3)
    draw(item.trim, middle - 0.05, middle + 0.05, floor + 0.92, floor + 2.3)
    if item.kind != "shop":
        door = middle[columns // 2]
        draw(item.wall, door - 0.75, door + 0.75, 0.5, 2.45)
        draw(item.trim, door - 0.6, door + 0.6, 0.0, 2.35)
        draw(item.door, door - 0.48, door + 0.48, 0.0, 2.22)


def draw_tree(canvas, item, at, z, grown):
    """A trunk under a crown of leaf masses and tufts, or a fir of four tiers; it sways a little."""
    high, radius = item.height * grown, item.radius * grown
    sway = 0.012 * high * math.sin(1.4 * canvas.time + item.phase)

    def point(aside, up):   # trees are flat and face the camera
        return at + canvas.cos * aside, up, z - canvas.sin * aside
    canvas.limb(point(0, 0), point(sway, 0.6 * high), 0.24 * grown, BARK, TREE)
    for tier in range(4) if item.fir else ():
        low, top, half = (0.08 + 0.21 * tier) * high, (0.5 + 0.167 * tier) * high, radius * (1.0 - 0.2 * tier)
        lit = math.copysign(half, canvas.sun[0])
        for gain, dark in ((0.62, -lit), (0.8, -0.1 * lit)):
            canvas.fill([point(dark, low), point(lit, low), point(sway, top)], item.green, TREE, gain)
    seen = canvas.see(point(sway, high - radius))
    if item.fir or not seen:
        return
    size, (red, green, blue, kind) = radius * seen[2], canvas.tone(item.green, TREE, seen[3])
    for aside, up, r, shade in item.blobs[:66 if size > 250 else 16].tolist():
        center = int(seen[0] + aside * size), int(seen[1] - up * size)
        tone = red * shade, green * shade, blue * shade, kind
        cv2.circle(canvas.pixels, center, int(r * size), tone, -1, shift=4)


def draw_car(canvas, item, at, z, grown):
    """A body and a cabin, both prisms, with windows, wheels, lights and number plates on them."""
    axes = grown * np.array([[0, 0, item.way], [0, 1, 0], [item.way, 0, 0]])   # along, up, to its right

    def face(points, rgb, inside):
        canvas.face(points @ axes + (at, 0, z), rgb, CAR, inside @ axes + (at, 0, z))

    def prism(outline, low, high):   # the outline, `low` wide at its foot, `high` at its top
        outline = np.array(outline)
        wide = np.interp(outline[:, 1], [outline[:, 1].min(), outline[:, 1].max()], [low, high])
        sides = np.stack([np.column_stack([outline, sign * wide]) for sign in (-1, 1)])
        ends = np.stack([sides[0], np.roll(sides[0], -1, 0), np.roll(sides[1], -1, 0), sides[1]], 1)
        inside = sides.mean((0, 1))
        for points in (*sides, *ends):
            face(points, item.paint, inside)
        return sides, ends, inside

    def box(along, y0, y1, w0, w1):
        return np.array([(along, y0, w0), (along, y0, w1), (along, y1, w1), (along, y1, w0)])
    body, cabin = item.shape
    tail, nose, lamp = body[1][0], body[-1][0], body[1][1]
    wheels = (body[0][0] + 0.75, nose - 0.8)
    for along in wheels:   # the underside, with the tyres of the far side
        canvas.fill(box(along, 0, 0.5, -0.8, 0.8) @ axes + (at, 0, z), RUBBER, CAR)
    _, _, inside = prism(body, 0.86, 0.88)
    for sign in (-1, 1):
        for radius, rgb in ((0.35, RUBBER), (0.19, CHROME)):
            disc = np.column_stack([radius * CIRCLE + (0, 0.35), np.full(20, 0.9 * sign)])
            face(np.stack([disc + (along, 0, 0) for along in wheels]), rgb, inside)
    for along, rgb in ((tail - 0.01, RED), (nose + 0.01, LAMP)):
        face(np.stack([box(along, lamp - 0.22, lamp - 0.02, w, w + 0.32) for w in (-0.82, 0.5)]), rgb, inside)
        face(box(along, 0.42, 0.55, -0.26, 0.26), WHITE, inside)
    sides, ends, inside = prism(cabin, 0.82, 0.64)
    for pane in (ends[0], ends[2]):   # rear window and windscreen
        face(pane.mean(0) + 0.86 * (pane - pane.mean(0)), GLASS, inside)
    for side in sides:   # two panes with a pillar between them
        rear, rear_top, front_top, front = side.mean(0) + 0.84 * (side - side.mean(0))
        low, high = front - rear, front_top - rear_top
        face(np.array([[rear, rear_top, rear_top + 0.46 * high, rear + 0.48 * low],
                       [rear + 0.55 * low, rear_top + 0.53 * high, front_top, front]]), GLASS, inside)


def draw_person(canvas, item, at, z, grown):
    """Head with hair, torso, and arms and legs that swing while walking."""
    size, c, s = item.size * grown, math.cos(item.heading), math.sin(item.heading)
    angle = 5.6 * item.pace * canvas.time + item.phase
    swing, lift = (0.28 * math.sin(angle), 0.1 * math.cos(angle)) if item.pace else (0.0, 0.0)

    def point(along, up, aside=0.0):   # meters ahead of the person, up, and to the right hand
        return at + size * (c * aside + s * along), size * up, z + size * (c * along - s * aside)

    def limb(radius, rgb, *joints):
        for start, end in zip(joints[:-1], joints[1:], strict=True):
            canvas.limb(point(*start), point(*end), radius * size, rgb, PERSON)

    def arm(side):
        elbow, hand = (-0.5 * swing * side, 1.17, 0.27 * side), (0.08 - swing * side, 0.93, 0.27 * side)
        limb(0.1, item.shirt, (0, 1.42, 0.22 * side), elbow)
        limb(0.085, item.shirt if item.sleeves else item.skin, elbow, hand)
        canvas.ball(point(*hand), 0.07 * size, item.skin, PERSON)
    far = 1 if (canvas.eye[0] - at) * c + z * s < 0 else -1   # the side turned away from the camera
    back = (canvas.eye[0] - at) * s - z * c < 0   # whether the back is turned towards it
    arm(far)
    for side in (far, -far):
        up = max(0.0, side * lift)
        knee, foot = (0.62 * swing * side + up, 0.5, 0.1 * side), (swing * side - up, 0.08 + up, 0.1 * side)
        limb(0.13, item.skin if item.dress else item.legs, (0, 0.92, 0.1 * side), knee, foot)
        limb(0.075, SHOE, foot, (foot[0] + 0.14, foot[1] - 0.03, foot[2]))
    for side in (far, -far):
        limb(0.15, item.shirt, (0, 1.38, 0.12 * side), (0, 0.98, 0.08 * side))
    if item.dress:
        for side in (far, 0, -far):
            limb(0.15, item.shirt, (0, 1.0, 0.08 * side), (0, 0.68, 0.15 * side))
    arm(-far)
    limb(0.07, item.skin, (0, 1.45), (0.01, 1.55))
    hair = [(-0.045, 1.71, 0.15, item.hair)] + [(-0.08, 1.56, 0.13, item.hair)] * item.long_hair
    face = [(0.03, 1.655, 0.13, item.skin)]
    for along, up, radius, rgb in face + hair if back else hair + face:
        canvas.ball(point(along, up), radius * size, rgb, PERSON)
    for side in () if back else (-1, 1):
        canvas.ball(point(0.12, 1.67, 0.05 * side), 0.02 * size, SHOE, PERSON)


# ---- pictures and clips ----

def things_in_reach(canvas, scene):
    """(thing, x, z) of everything in reach at the canvas's time, in the order in which it is to be drawn."""
    def order(entry):
        # Seen from the street, a building never hides what is in it; a car hides from its near end on.
        item, _, z = entry
        return item.draw is not draw_building, 2.2 * (item.draw is draw_car) - z
    edge = scene.kerb[-scene.here] + scene.pavement + scene.lawn[-scene.here]   # who crosses is gone there
    placed = [(item, item.x + item.vx * canvas.time, float(canvas.ahead(item.z + item.vz * canvas.time)))
              for item in scene.things]
    return sorted((entry for entry in placed if entry[2] + entry[0].length > -3
                   and not (entry[0].vx and abs(entry[1]) > edge)), key=order)


def cast_shadow(scene, item, x, z):
    """The outline (N, 3) of a shadow on the ground: around the foot and the foot moved along the light."""
    lean = np.array([scene.sun[0], scene.sun[2]]) / -scene.sun[1] * (0.25 if scene.shadow < 0.2 else 1.0)
    foot = np.clip(1.5 * CIRCLE, -1, 1) * item.shadow[:2] + (x, z + item.length / 2)
    hull = cv2.convexHull(np.float32(np.concatenate([foot, foot + lean * item.shadow[2]])))[:, 0]
    return np.insert(hull, 1, 0, 1)


def render(scene, size, time):
    """One picture of a described scene: image (H, W, 3) and mask (H, W), both uint8."""
    canvas = Canvas(scene, size, time)
    placed = things_in_reach(canvas, scene)
    draw_sky(canvas, scene)
    draw_ground(canvas, scene)
    shade_ground(canvas, scene, [cast_shadow(scene, *entry) for entry in placed])
    for item, x, z in placed:   # things grow out of the far end of the street, they do not pop up there
        item.draw(canvas, item, x, z, float(np.clip((PERIOD - BEHIND - z) / 8, 0.01, 1)))
    mask = np.ascontiguousarray(canvas.pixels[SUPER // 2::SUPER, SUPER // 2::SUPER, 3])
    image = cv2.resize(canvas.pixels, (size[1], size[0]), interpolation=cv2.INTER_AREA)[..., :3]
    image = image * (np.float32(scene.tint) * np.float32(scene.exposure))
    if scene.blur > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), scene.blur * size[0] / 256)
    grain = np.random.default_rng([*np.atleast_1d(scene.seed).tolist(), 2, round(time * 1000)])
    image += np.float32(scene.grain) * grain.standard_normal((*size, 1), np.float32)
    return np.clip(image, 0, 255, out=image).astype(np.uint8), mask


def draw_scene(seed, size=(256, 320), time=0.0):
    """One street scene of size (H, W): image (H, W, 3) uint8 RGB and mask (H, W) uint8 with the classes 0..6.

    `seed` is an int >= 0 or a tuple of them; `time` >= 0, in seconds, moves camera, cars and persons.
    """
    return render(describe(seed), size, float(time))


def draw_clip(seed, size, frames, fps):
    """Yields `frames` pairs of image and mask, as draw_scene, of one scene: pair i at i / fps seconds."""
    scene = describe(seed)
    for index in range(frames):
        yield render(scene, size, index / fps)


# ---- the data set on disk ----

def facts_of(train, val, size, seed):
    """What streets.json says about a data set."""
    return dict(version=VERSION, seed=seed, size=list(size), train=train, val=val)


def is_current(root, train, val, size, seed):
    """Whether `root` holds all that `write_streets` would write today with these arguments."""
    def count(folder):
        return len(list((Path(root) / folder).glob("*.png")))
    try:
        stored = json.loads((Path(root) / "streets.json").read_text())
    except (OSError, ValueError):
        return False
    found = [count(folder) for folder in ("train/images", "train/masks", "val/images", "val/masks")]
    return found == [train, train, val, val] and stored == facts_of(train, val, size, seed)


def write_pair(job):
    """Draws and writes one image and its mask; job = folder of the split, number, seed, (H, W), palette."""
    folder, index, seed, size, palette = job
    image, mask = draw_scene(seed, size)
    Image.fromarray(image).save(folder / "images" / f"{index:05d}.png", compress_level=1)
    mask = Image.fromarray(mask)
    mask.putpalette(palette)   # makes it a palette picture, mode P
    mask.save(folder / "masks" / f"{index:05d}.png", compress_level=1)


def write_pairs(jobs):
    """Runs `write_pair` on all jobs, in several processes where that pays and works."""
    progress = dict(total=len(jobs), desc="drawing streets", leave=False, disable=None)
    workers = min(os.cpu_count() or 1, len(jobs) // 32, 8)
    if workers > 1:
        try:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, spawn, cv2.setNumThreads, (1,)) as pool:
                for _ in tqdm(pool.map(write_pair, jobs, chunksize=8), **progress):
                    pass
            return
        except BrokenProcessPool:   # a new process cannot import a script that is read from stdin, say
            pass
    for job in tqdm(jobs, **progress):
        write_pair(job)


def write_streets(root, classes, train=480, val=96, size=(256, 320), seed=0):
    """Writes root/{train,val}/{images,masks}/00000.png ..., root/classes.txt and root/streets.json.

    `classes` lists the seven (name, (r, g, b)) in mask order. All is written to a folder next to root and
    renamed at the end, so an interrupted run leaves no root; an older set is replaced, anything else at root
    raises FileExistsError. Draws in several processes: a script needs the usual `if __name__ == "__main__":`.
    """
    root = Path(root).absolute()
    if len(classes) != 7:
        raise ValueError(f"street scenes have 7 classes, got {len(classes)}")
    if root.exists() and not (root / "streets.json").exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} exists and holds no street scenes: choose another folder")
    part = root.with_name(f".{root.name}.{os.getpid()}.part")
    palette = [value for _, rgb in classes for value in rgb]
    counts = dict(train=train, val=val)
    jobs = [(part / split, index, (seed, number, index), tuple(size), palette)
            for number, split in enumerate(counts) for index in range(counts[split])]
    try:
        for folder in [part / split / kind for split in counts for kind in ("images", "masks")]:
            folder.mkdir(parents=True)
        (part / "classes.txt").write_text("".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in classes))
        (part / "streets.json").write_text(json.dumps(facts_of(train, val, size, seed)) + "\n")
        write_pairs(jobs)
        if root.exists():
            shutil.rmtree(root)
        part.rename(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_examples(root):
    """Returns (root/picture.png, root/clip.mp4), drawn where missing; nothing trains on them.

    Returns () where they are missing and cannot be written, as on a medium that is read-only.
    """
    from utils import save_image, write_atomically   # not above: the processes that draw need no torch
    picture, clip = Path(root) / "picture.png", Path(root) / "clip.mp4"
    try:
        if not picture.exists():
            save_image(draw_scene(10_001, size=(480, 640))[0], picture)
        if not clip.exists():
            write_atomically(clip, write_clip)
    except OSError:
        return ()
    return picture, clip


def write_clip(path):
    """Draws six seconds of a street into a video file (mp4v, which every OpenCV writes)."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 15, (640, 360))
    for frame, _ in draw_clip(323, (360, 640), frames=90, fps=15):
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
