"""Procedural RGB-D scenes: rendered image, exact depth and caption, made on the fly in batched torch.

A scene holds one to five solids (box, sphere, cylinder, cone) in a room, in a courtyard or on open ground. Scene
`index` of `seed` is always the same: a NumPy generator of its own draws its parameters on the CPU, and all rays of a
batch of scenes are then cast and shaded together on the device.

Lengths are in metres. World axes: z up, the floor at z = 0, the objects around the origin. Camera axes as in OpenCV: x
right, y down, z forward. In the renderer's tensors the three coordinates come first: (3, B, P) is P rays in each of B
scenes, (3, K, P) is K solids with the rays of their scenes; (B, N, P) is the N solids of each scene.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field, fields
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F


SPLITS = {"train": 0, "validation": 1, "test": 2}  # part of the key of every generator: splits share no scene
SKY, FLOOR, WALL, CEILING, FIRST_OBJECT = range(5)  # values of `SceneBatch.surfaces`; object k is FIRST_OBJECT + k
FAR = 500.0  # metres along the ray; ground beyond it counts as sky
MISS = 1e30  # a distance no ray reaches
MIN_VISIBLE = 0.005  # share of the pixels below which a caption does not mention an object
RAYS_PER_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}  # on a CPU, small enough for the tensors to stay in the cache

COLOURS = {  # sRGB
    "red": (0.80, 0.13, 0.11), "orange": (0.93, 0.46, 0.10), "yellow": (0.95, 0.80, 0.17), "green": (0.22, 0.58, 0.20),
    "teal": (0.08, 0.56, 0.56), "blue": (0.13, 0.33, 0.78), "purple": (0.47, 0.22, 0.68), "pink": (0.94, 0.50, 0.64),
    "white": (0.92, 0.91, 0.88), "grey": (0.52, 0.53, 0.55), "black": (0.16, 0.16, 0.17), "brown": (0.44, 0.26, 0.15),
}  # fmt: skip
PATTERNS = ("plain", "striped", "checkered", "marble", "speckled", "wooden", "brick", "tiled", "rough")
FINISHES = {  # reflectance at normal incidence, Blinn-Phong exponent, metalness
    "matte": (0.0, 10.0, 0.0), "satin": (0.02, 30.0, 0.0), "glossy": (0.06, 160.0, 0.0), "metal": (0.8, 220.0, 1.0),
}  # fmt: skip
GROUNDS = {  # words: two sRGB colours, pattern, metres per unit of the pattern
    "on a grassy plain": ((0.36, 0.54, 0.17), (0.56, 0.64, 0.25), "rough", 1.0),
    "in a sandy desert": ((0.86, 0.70, 0.46), (0.74, 0.55, 0.34), "rough", 1.8),
    "on a snowy field": ((0.93, 0.95, 0.98), (0.78, 0.84, 0.92), "rough", 1.6),
    "on a paved square": ((0.68, 0.64, 0.59), (0.36, 0.34, 0.32), "tiled", 0.7),
    "on a wooden deck": ((0.66, 0.47, 0.31), (0.34, 0.22, 0.14), "wooden", 0.25),
    "on dry earth": ((0.60, 0.44, 0.31), (0.44, 0.31, 0.22), "rough", 0.9),
}
SKIES = {  # word: sRGB zenith, horizon, clouds; cloud cover, sRGB sun, its strength, its radius at 10 km
    "clear": ((0.20, 0.44, 0.84), (0.72, 0.85, 0.96), (1, 1, 1), 0.0, (1.0, 0.95, 0.86), 2.9, 250),
    "cloudy": ((0.22, 0.46, 0.82), (0.78, 0.87, 0.94), (0.98, 0.98, 0.99), 0.9, (1.0, 0.96, 0.90), 2.5, 500),
    "evening": ((0.38, 0.40, 0.72), (1.2, 0.86, 0.60), (1.1, 0.70, 0.60), 0.7, (1.0, 0.76, 0.50), 3.2, 300),
    "grey": ((0.60, 0.64, 0.69), (0.82, 0.84, 0.86), (0.70, 0.72, 0.75), 0.9, (1.0, 0.99, 0.97), 1.3, 1800),
}
SHAPES = {"box": ["box", "block"], "sphere": ["sphere", "ball"], "cylinder": ["cylinder"], "cone": ["cone"]}


# ---------------------------------------------------------------------------------------------- sampling a scene


@dataclass
class Material:
    """Two linear colours (3,) mixed by a pattern of `scale` metres per unit, and a finish."""

    colour: str
    rgb: np.ndarray
    rgb2: np.ndarray
    pattern: str = "plain"
    scale: float = 1.0
    finish: str = "matte"

    def row(self) -> list[float]:
        """Eleven floats, as the renderer looks them up."""
        return [*self.rgb, *self.rgb2, PATTERNS.index(self.pattern), self.scale, *FINISHES[self.finish]]


@dataclass
class Solid:
    """An object. `size` is half its extent along its own axes, which `yaw` turns about the vertical one."""

    shape: str
    size: np.ndarray  # (3,)
    yaw: float
    material: Material
    centre: np.ndarray | None = None  # (3,)
    support: int | None = None  # index of the object it stands on; None for the floor

    @property
    def radius(self) -> float:
        """Of the vertical cylinder around it."""
        return math.hypot(*self.size[:2]) if self.shape == "box" else float(self.size[0])


@dataclass
class Scene:
    """What the renderer and the captions need to know about a scene, whatever the resolution."""

    camera_position: np.ndarray  # (3,)
    camera_rotation: np.ndarray  # (3, 3), world from camera: its columns are the camera's axes
    tan_half_fov: float  # horizontal
    ahead: np.ndarray  # (3,) level direction of view, towards the origin
    right: np.ndarray  # (3,)
    unit: float  # half width of the view at the origin: what "small" and "large" refer to
    kind: str  # room, courtyard or open
    place: str = ""  # words for open ground
    sky_word: str = ""
    objects: list[Solid] = field(default_factory=list)
    surfaces: dict[int, Material] = field(default_factory=dict)  # of FLOOR, WALL and CEILING
    low: np.ndarray | None = None  # (3,) corners of the space around the camera, -+1e6 where it is open
    high: np.ndarray | None = None
    wall_top: float = 1e6  # a ray that meets a wall above this height sees the sky
    lights: np.ndarray | None = None  # (2, 8): position, linear colour, radius, falloff; the first casts shadows
    sky: np.ndarray | None = None  # (4, 3): linear zenith, horizon and clouds times cover; direction of the sun
    ambient: np.ndarray | None = None  # (2, 3): linear light from above, from below


def scene_rng(split: str, seed: int, index: int, stream: int) -> np.random.Generator:
    """The generator of one scene (`stream` 0) or of its caption (`stream` 1)."""
    if not (0 <= seed < 2**32 and 0 <= index < 2**32):
        raise ValueError(f"seed and index must lie in [0, 2**32), not {seed} and {index}")
    return np.random.default_rng([SPLITS[split], seed, index, stream])


def linear(rgb) -> np.ndarray:
    return np.asarray(rgb, dtype=np.float64) ** 2.2


def sample_scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """Scene `index` of `seed`: camera, objects, surroundings, light."""
    rng = scene_rng(split, seed, index, 0)
    tan_half_fov = math.tan(math.radians(rng.uniform(40, 80)) / 2)
    unit = rng.uniform(1.2, 3.0)
    distance = unit / tan_half_fov
    kind = str(rng.choice(["room", "courtyard", "open"], p=[0.5, 0.12, 0.38]))
    yaw, roll = rng.uniform(0, 2 * math.pi), math.radians(rng.normal(0, 1.2))
    pitch = math.radians(rng.uniform(5, 22) if kind == "open" else rng.uniform(6, 32))
    height = unit * rng.uniform(0.25, 0.45) + distance * math.tan(pitch)
    pitch += math.radians(rng.uniform(-2, 2))

    ahead, right = np.array([math.cos(yaw), math.sin(yaw), 0]), np.array([math.sin(yaw), -math.cos(yaw), 0])
    forward = ahead * math.cos(pitch) - [0, 0, math.sin(pitch)]
    down = np.cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    rotation = np.stack([c * right + s * down, c * down - s * right, forward], axis=1)
    scene = Scene([0, 0, height] - distance * ahead, rotation, tan_half_fov, ahead, right, unit, kind)
    for _ in range(rng.choice(5, p=[0.12, 0.24, 0.28, 0.22, 0.14]) + 1):
        place_solid(rng, scene, sample_solid(rng, scene))
    (furnish_open if kind == "open" else furnish_walls)(rng, scene)
    (light_room if kind == "room" else light_outdoors)(rng, scene)
    return scene


def sample_solid(rng, scene: Scene) -> Solid:
    """An object without a place; often a twin of the last one, so that captions can count."""
    if scene.objects and rng.random() < 0.3:
        last = scene.objects[-1]
        return Solid(last.shape, last.size * rng.uniform(0.85, 1.0), last.yaw + rng.uniform(0, 1), last.material)
    shape = str(rng.choice(list(SHAPES)))
    base = scene.unit * rng.choice([0.19, 0.27, 0.36]) * rng.uniform(0.85, 1.15)
    if shape == "box":
        size = np.full(3, 0.8) if rng.random() < 0.35 else rng.uniform([0.5, 0.5, 0.4], [1.0, 1.0, 1.1])
    elif shape == "sphere":
        size = np.ones(3)
    else:
        size = rng.uniform(0.6, 0.95) * np.array([1, 1, 0]) + [0, 0, rng.uniform(0.6, 1.1)]
    return Solid(shape, base * size, rng.uniform(0, math.pi), object_material(rng, base))


def place_solid(rng, scene: Scene, solid: Solid) -> None:
    """Add an object to the scene: on another, or in view on the floor, or not at all if no free place turns up."""
    bases = {k for k, o in enumerate(scene.objects) if o.shape in ("box", "cylinder") and o.support is None}
    bases -= {o.support for o in scene.objects}
    if bases and rng.random() < 0.35:
        solid.support = int(rng.choice(sorted(bases)))
        below = scene.objects[solid.support]
        solid.size = solid.size * min(0.9, 0.9 * below.size[:2].min() / solid.radius)
        solid.centre = below.centre + np.array([0, 0, below.size[2] + solid.size[2]])
        scene.objects.append(solid)
        return
    distance = scene.unit / scene.tan_half_fov
    for _ in range(20):
        depth = distance * rng.uniform(0.8, 1.65)
        side = rng.uniform(-1, 1) * max(0.0, 0.9 * depth * scene.tan_half_fov - solid.radius)
        solid.centre = scene.ahead * (depth - distance) + scene.right * side + np.array([0, 0, solid.size[2]])
        if all(math.dist(solid.centre[:2], o.centre[:2]) > solid.radius + o.radius + 0.02 for o in scene.objects):
            scene.objects.append(solid)
            return


def object_material(rng, base: float) -> Material:
    colour = str(rng.choice(list(COLOURS)))
    rgb = linear(np.clip(np.array(COLOURS[colour]) * rng.normal(1, 0.04, 3), 0.02, 0.97))
    finish = str(rng.choice(list(FINISHES), p=[0.25, 0.25, 0.3, 0.2]))
    if finish == "metal":
        return Material(colour, 0.5 * rgb + 0.4 * rgb / max(rgb.max(), 0.25), rgb, finish=finish)
    pattern = str(rng.choice(PATTERNS[:5], p=[0.6, 0.12, 0.1, 0.09, 0.09]))
    if pattern == "marble":
        return Material(colour, rgb * 0.7 + 0.2, rgb * 0.2, pattern, base * 0.5, finish)
    rgb2 = rgb * 0.25 if rgb.mean() > 0.35 else np.full(3, 0.8)
    scale = {"striped": rng.uniform(0.35, 0.6), "checkered": rng.uniform(0.3, 0.5)}.get(pattern, 0.35)
    return Material(colour, rgb, rgb2, pattern, base * scale, finish)


def surface_material(rng, pattern: str) -> Material:
    """Of a floor or a wall."""
    if pattern == "wooden":
        rgb = linear([0.68, 0.47, 0.29]) * rng.uniform(0.5, 1.3) * rng.uniform([1, 0.9, 0.8], 1)
        return Material(
            "brown", rgb, rgb * 0.45, pattern, rng.uniform(0.16, 0.28), str(rng.choice(["satin", "glossy"]))
        )
    if pattern == "brick":
        rgb = linear(rng.uniform([0.55, 0.28, 0.2], [0.78, 0.44, 0.36]))
        return Material("red", rgb, linear(np.full(3, rng.uniform(0.55, 0.8))), pattern, rng.uniform(0.12, 0.2))
    colour = str(rng.choice(["white", "white", "grey", "grey", "blue", "green", "yellow", "pink", "teal", "brown"]))
    rgb = linear(0.6 * np.array(COLOURS[colour]) + 0.4 * rng.uniform(0.6, 0.95))
    rgb2 = rgb * 0.35 + 0.1 if pattern == "tiled" else rgb * rng.uniform(0.3, 0.6)
    scale = {"striped": 0.5, "checkered": 0.5, "tiled": 0.4, "marble": 0.9, "speckled": 0.12}.get(pattern, 1.0)
    finish = "glossy" if pattern in ("tiled", "marble", "checkered") and rng.random() < 0.5 else "matte"
    return Material(colour, rgb, rgb2, pattern, scale * rng.uniform(0.7, 1.4), finish)


def furnish_walls(rng, scene: Scene) -> None:
    """A room or a courtyard around the camera and the objects."""
    ends = [scene.camera_position[:2] + 0.4, scene.camera_position[:2] - 0.4]
    ends += [o.centre[:2] + sign * o.radius for o in scene.objects for sign in (-1, 1)]
    low, high = np.min(ends, axis=0) - rng.uniform(0.2, 2.2, 2), np.max(ends, axis=0) + rng.uniform(0.2, 2.2, 2)
    tops = [o.centre[2] + o.size[2] for o in scene.objects]
    height = max(scene.camera_position[2] + rng.uniform(0.3, 0.8), *tops, rng.uniform(1.8, 3.6)) + 0.1
    if scene.kind == "room":
        floors = ["wooden", "wooden", "wooden", "tiled", "checkered", "marble", "plain"]
        walls, ceiling = ["plain", "plain", "plain", "striped", "wooden", "brick", "tiled"], height
    else:
        floors, walls, ceiling = ["tiled", "brick", "plain"], ["brick", "brick", "plain"], 1e6
        scene.wall_top = height
    scene.low, scene.high = np.array([*low, 0.0]), np.array([*high, ceiling])
    floor, wall = (surface_material(rng, str(rng.choice(names))) for names in (floors, walls))
    scene.surfaces = {FLOOR: floor, WALL: wall, CEILING: Material("white", np.full(3, 0.75), np.full(3, 0.75))}


def furnish_open(rng, scene: Scene) -> None:
    """Ground to the horizon."""
    scene.place = str(rng.choice(list(GROUNDS)))
    first, second, pattern, scale = GROUNDS[scene.place]
    tint = rng.uniform(0.85, 1.1) * rng.uniform(0.93, 1.07, 3)
    scene.surfaces[FLOOR] = Material("", np.minimum(linear(first) * tint, 0.9), linear(second) * tint, pattern, scale)
    scene.low, scene.high = np.array([-1e6, -1e6, 0.0]), np.full(3, 1e6)


def light_room(rng, scene: Scene) -> None:
    """A warm or neutral lamp under the ceiling and a weak coloured one, both inside the room."""

    def lamp(forward, side, height, colour, radius):
        place = (scene.ahead * forward + scene.right * side) * scene.unit + np.array([0, 0, height])
        place = np.clip(place, scene.low + 0.3, scene.high - [0.3, 0.3, 0.1])
        reach = np.linalg.norm(place)  # the distance over which the light halves
        return [*place, *colour, radius * reach, reach**-2]

    warmth, side, top = rng.uniform(0, 1), rng.choice([-1, 1]) * rng.uniform(0.3, 1.3), scene.high[2]
    key = np.array([1.0, 0.93 - 0.13 * warmth, 0.86 - 0.34 * warmth]) * rng.uniform(3.2, 4.4)
    fill = linear(rng.permutation([1.0, rng.uniform(0.3, 0.9), rng.uniform(0.2, 0.6)])) * rng.uniform(0.1, 1.5)
    place = rng.uniform(-1, 1), -math.copysign(rng.uniform(0.2, 1.6), side)
    scene.lights = np.array([lamp(rng.uniform(-1.2, 0.5), side, top, key, 0.1), lamp(*place, 0.6 * top, fill, 0.0)])
    bounce = scene.surfaces[WALL].rgb * 0.3 + 0.25
    scene.ambient = np.stack([bounce, scene.surfaces[FLOOR].rgb * 0.35 + 0.08]) * rng.uniform(0.6, 1.0)
    scene.sky = np.stack([bounce, bounce, np.zeros(3), [0, 0, 1]])


def light_outdoors(rng, scene: Scene) -> None:
    """A sun to either side, behind the camera rather than before it, and a weak blue light against it."""
    scene.sky_word = str(rng.choice(list(SKIES), p=[0.35, 0.3, 0.22, 0.13]))
    zenith, horizon, clouds, cover, sun, strength, radius = SKIES[scene.sky_word]
    azimuth = rng.choice([-1, 1]) * math.radians(rng.uniform(35, 160))
    low_sun = scene.sky_word == "evening" and scene.kind == "open"
    elevation = math.radians(rng.uniform(10, 20) if low_sun else rng.uniform(28, 62))
    level = scene.ahead * math.cos(azimuth) + scene.right * math.sin(azimuth)
    to_sun = level * math.cos(elevation) + np.array([0, 0, math.sin(elevation)])
    zenith, horizon = linear(zenith), linear(horizon)
    key = [*(1e4 * to_sun), *(linear(sun) * strength), radius, 0]
    fill = [*(1e4 * (np.array([0, 0, 0.7]) - level)), *(zenith * 0.25 + 0.05), 0, 0]
    scene.lights = np.array([key, fill])
    scene.sky = np.stack([zenith, horizon, linear(clouds) * cover, to_sun])
    scene.ambient = np.stack([0.45 * (zenith + horizon), scene.surfaces[FLOOR].rgb * (0.25 + 0.1 * strength)])


# ------------------------------------------------------------------------------------------------- ray casting


@dataclass
class World:
    """B scenes as tensors that broadcast against rays (3, B, P); fields shared with `Scene` gain (..., B, 1)."""

    camera_position: torch.Tensor
    camera_rotation: torch.Tensor
    tan_half_fov: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    wall_top: torch.Tensor
    lights: torch.Tensor
    sky: torch.Tensor
    ambient: torch.Tensor
    materials: torch.Tensor  # (11, B, FIRST_OBJECT + N): `Material.row` of every surface
    solids: torch.Tensor  # (9, B, N): centre, size, cosine and sine of the yaw, number of the shape; size 0: none
    groups: dict[str, tuple[torch.Tensor, torch.Tensor]]  # for each shape, scene (K,) and slot (K,) of its solids


def pack(scenes: list[Scene], device: torch.device) -> World:
    count = max(1, max(len(scene.objects) for scene in scenes))
    materials = np.zeros((11, len(scenes), FIRST_OBJECT + count))
    solids = np.zeros((9, len(scenes), count))
    groups = defaultdict(list)
    for b, scene in enumerate(scenes):
        for surface, material in scene.surfaces.items():
            materials[:, b, surface] = material.row()
        for n, o in enumerate(scene.objects):
            materials[:, b, FIRST_OBJECT + n] = o.material.row()
            solids[:, b, n] = [*o.centre, *o.size, math.cos(o.yaw), math.sin(o.yaw), list(SHAPES).index(o.shape)]
            groups[o.shape].append((b, n))

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)

    same = {f.name for f in fields(World)} & {f.name for f in fields(Scene)}
    return World(
        **{name: tensor(np.stack([getattr(scene, name) for scene in scenes], axis=-1)[..., None]) for name in same},
        materials=tensor(materials),
        solids=tensor(solids),
        groups={shape: tuple(torch.tensor(pairs, device=device).T) for shape, pairs in groups.items()},
    )


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def normalize(v):
    return v * torch.rsqrt(dot(v, v).clamp(min=1e-20))


def turn(v, cosine, sine):
    """World to object frame: (3, ...) turned about the vertical axis by minus the yaw."""
    return torch.stack([cosine * v[0] + sine * v[1], cosine * v[1] - sine * v[0], v[2].expand_as(cosine * v[0])])


def camera_rays(world: World, columns: torch.Tensor, rows: torch.Tensor, height: int, width: int):
    """Unit directions (3, B, P) in the world through image points (P,) in pixels from the top left corner of the image
    (pixel centres at halves), and their camera z (B, P)."""
    x = (columns - width / 2) * (2 / width) * world.tan_half_fov
    y = (rows - height / 2) * (2 / width) * world.tan_half_fov
    z = torch.rsqrt(x * x + y * y + 1)
    return (world.camera_rotation * torch.stack([x * z, y * z, z])).sum(1), z


def entry(near, far):
    """Where a ray enters a convex solid that its line crosses on [near, far]; far beyond FAR if the interval is empty
    or starts behind the ray. Sums of clamps, because torch.where takes ten times longer on a CPU."""
    return near + MISS * ((near - far).clamp(min=0) + (-near).clamp(min=0))


def slab(o, d, half):
    """Interval of the line on which |o + t d| <= half. The 1e-9 keeps rays parallel to the slab finite."""
    inverse = 1 / (d + 1e-9)
    middle, half = -o * inverse, half * inverse.abs()
    return middle - half, middle + half


def roots(a, b, c):
    """Solutions of a t^2 + 2 b t + c = 0, and a penalty that is 0 where they are real."""
    square = b * b - a * c
    root = square.clamp(min=0).sqrt()
    return (-b - root) / a, (-b + root) / a, MISS * (-square).clamp(min=0)


def hit_box(o, d, size):
    near, far = slab(o, d, size)
    return entry(near.amax(0), far.amin(0))


def hit_sphere(o, d, size):
    near, far, penalty = roots(1.0, dot(o, d), dot(o, o) - size[0] ** 2)
    return entry(near, far) + penalty


def hit_cylinder(o, d, size):
    a = (d[0] * d[0] + d[1] * d[1]).clamp(min=1e-8)
    near, far, penalty = roots(a, o[0] * d[0] + o[1] * d[1], o[0] * o[0] + o[1] * o[1] - size[0] ** 2)
    start, end = slab(o[2], d[2], size[2])
    return entry(torch.maximum(near, start), torch.minimum(far, end)) + penalty


def hit_cone(o, d, size):
    """The double cone x^2 + y^2 <= k^2 w^2, w being the depth below the apex, cut to its lower half."""
    k2 = (size[0] / (2 * size[2])) ** 2
    w, dw = size[2] - o[2], -d[2]
    a = d[0] * d[0] + d[1] * d[1] - k2 * dw * dw
    b, c = o[0] * d[0] + o[1] * d[1] - k2 * w * dw, o[0] * o[0] + o[1] * o[1] - k2 * w * w
    first, second, penalty = roots(a + 1e-8 * (a.abs() < 1e-8), b, c)
    near, far = torch.minimum(first, second), torch.maximum(first, second)
    # A line steeper than the side lies inside up to its first crossing, in one half, and from its second, in the other.
    steep, sinks = a < 0, dw > 0
    lower = torch.where(steep, torch.where(sinks, far, -MISS), near)
    upper = torch.where(steep, torch.where(sinks, MISS, near), far)
    start, end = slab(o[2], d[2], size[2])
    return entry(torch.maximum(lower, start), torch.minimum(upper, end)) + penalty


HITS = {"box": hit_box, "sphere": hit_sphere, "cylinder": hit_cylinder, "cone": hit_cone}


def hit_solids(world: World, origin, direction):
    """Distance (B, N, P) to every solid along unit rays from outside them; beyond FAR where a ray misses it."""
    distance = direction.new_full((*world.solids.shape[1:], direction.shape[2]), MISS)
    for shape, (scene, slot) in world.groups.items():
        solid = world.solids[:, scene, slot].unsqueeze(-1)  # (9, K, 1)
        o, d = origin[:, scene] - solid[:3], direction[:, scene]
        if shape == "box":  # the others are round
            o, d = turn(o, solid[6], solid[7]), turn(d, solid[6], solid[7])
        distance[scene, slot] = HITS[shape](o, d, solid[3:6])
    return distance


def cast(world: World, origin, direction):
    """Distance (B, P), inf for the sky, and surface (B, P) that unit rays from inside the scene meet first."""
    inverse = 1 / (direction + 1e-9)
    exits = torch.maximum((world.low - origin) * inverse, (world.high - origin) * inverse)
    wall = torch.minimum(exits[0], exits[1])
    room = torch.minimum(wall, exits[2])
    surface = torch.where(exits[2] < wall, torch.where(direction[2] < 0, FLOOR, CEILING), WALL)
    surface = surface * ((room < FAR) & (origin[2] + room * direction[2] < world.wall_top))  # SKY is 0

    solids = hit_solids(world, origin, direction)
    nearest = solids.amin(1)
    slots = torch.arange(FIRST_OBJECT, FIRST_OBJECT + solids.shape[1], dtype=torch.float32, device=solids.device)
    owner = ((solids == nearest.unsqueeze(1)).float() * slots[:, None]).amax(1)  # argmin is far slower on a CPU
    surface = torch.where(nearest < room, owner.long(), surface)
    return torch.where(surface == SKY, torch.inf, torch.minimum(nearest, room)), surface


# --------------------------------------------------------------------------------------------------- materials


@cache
def noise_tables(device: torch.device) -> list[torch.Tensor]:
    """Periodic fractal noise (1, 1, 33, 33, 33) of mean 0.5, first layers repeated last; 1024 numbers in [0, 1)."""
    frequency = np.fft.fftfreq(32) * 32
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(frequency, frequency, frequency)))
    spectrum = np.fft.fftn(np.random.default_rng(7).normal(size=(32, 32, 32))) / np.maximum(radius, 1) ** 1.9
    values = np.fft.ifftn(spectrum * (radius > 0)).real
    values = np.pad(np.clip(0.5 + 0.22 * values / values.std(), 0, 1), (0, 1), mode="wrap")[None, None]
    cells = np.random.default_rng(8).random(1024)
    return [torch.tensor(table, dtype=torch.float32, device=device) for table in (values, cells)]


def noise(q):
    """Noise (n,) in [0, 1] at points (3, n): it repeats every 8 units, and its finest detail is a quarter of a unit."""
    grid = (q / 8).remainder(1).mul(2).sub(1).T.reshape(1, 1, 1, -1, 3)
    return F.grid_sample(noise_tables(q.device)[0], grid, align_corners=True).flatten()


def cell(i, j):
    """A number in [0, 1) for each cell of a grid."""
    return noise_tables(i.device)[1][(i.long() * 57 + j.long() * 131) % 1024]


def near_whole(u, width):
    return ((u + 0.5).remainder(1) - 0.5).abs() < width


def evaluate_pattern(name: str, q):
    """Share of the second colour and brightness, (n,) each or a number, at points (3, n) in units of the pattern."""
    u, v, w = q
    if name == "striped":
        return (u.remainder(1) < 0.5).float(), 1.0
    if name == "checkered":
        return (u.floor() + v.floor() + w.floor()).remainder(2), 1.0
    if name == "marble":
        vein = 1 - ((u + 0.6 * v + 0.3 * w) * 1.2 + 7 * noise(q * 0.8)).sin().abs()
        return vein**3, 0.85 + 0.3 * noise(q * 0.5)
    if name == "speckled":
        return ((noise(q * 2) - 0.6) * 9).clamp(0, 1), 1.0
    if name == "wooden":
        board = v.floor()
        along = u / 7 + 5 * cell(board, board)
        grain = noise(torch.stack([u * 0.3, v * 2.5, board]))
        gap = near_whole(v, 0.035) | near_whole(along, 0.005)
        return grain * 0.8, (0.75 + 0.5 * cell(board, along.floor())) * (1 - 0.6 * gap.float())
    if name == "brick":
        course = v.floor()
        along = u / 2.2 + 0.5 * course.remainder(2)
        mortar = near_whole(v, 0.07) | near_whole(along, 0.03)
        return mortar.float(), 0.75 + 0.5 * cell(course, along.floor()) * (~mortar)
    if name == "tiled":
        grout = near_whole(u, 0.03) | near_whole(v, 0.03)
        return grout.float(), 0.92 + 0.16 * cell(u.floor(), v.floor())
    broad = noise(q * 0.13)  # rough
    return broad, 0.55 + 0.5 * noise(q * 2) + 0.4 * broad


PATTERN_MEAN = {"marble": 0.2, "speckled": 0.15, "brick": 0.2, "tiled": 0.1}  # of the share; 0.5 for the others


def albedo(rows, q, footprint):
    """Linear colour (3, B, P) of materials `rows` (11, B, P) at pattern points q (3, B, P). A pattern fades to its mean
    where one ray covers a large `footprint` (B, P) of it, which would alias."""
    kind = rows[6].flatten()
    share, brightness = torch.zeros_like(kind), torch.ones_like(kind)
    for number, name in enumerate(PATTERNS[1:], start=1):
        index = (kind == number).nonzero()[:, 0]
        if len(index):
            s, b = evaluate_pattern(name, q.flatten(1)[:, index])
            detail = 1 / (1 + (2 * footprint.flatten()[index]) ** 2)
            mean = PATTERN_MEAN.get(name, 0.5)
            share[index] = mean + (s - mean) * detail
            brightness[index] = 1 + (b - 1) * detail
    return (rows[:3] + (rows[3:6] - rows[:3]) * share.view_as(footprint)) * brightness.view_as(footprint)


def surface_frame(world: World, point, direction, surface):
    """Normal (3, B, P) at the points that rays meet, and pattern coordinates (3, B, P) in metres."""
    on_wall = surface == WALL
    gap = torch.minimum((point - world.low).abs(), (point - world.high).abs())
    faces_x = on_wall & (gap[0] < gap[1])
    faces_y = on_wall & ~faces_x
    level = (surface == FLOOR).float() - (surface == CEILING).float()
    normal = torch.stack([-direction[0].sign() * faces_x, -direction[1].sign() * faces_y, level])
    u, v = torch.where(faces_x, point[1], point[0]), torch.where(on_wall, point[2], point[1])
    q = torch.stack([u, v, torch.full_like(u, 0.5)])

    index = (surface >= FIRST_OBJECT).flatten().nonzero()[:, 0]
    slot = surface.flatten()[index] - FIRST_OBJECT
    solid = world.solids[:, index // surface.shape[1], slot]  # (9, n)
    size, shape = solid[3:6], solid[8]
    local = turn(point.flatten(1)[:, index] - solid[:3], solid[6], solid[7])
    normal.flatten(1)[:, index] = turn(solid_normal(local, size, shape), solid[6], -solid[7])
    # Stripes follow the first coordinate: up. The offset keeps the edges of checks off the faces of boxes.
    q.flatten(1)[:, index] = local[[2, 0, 1]] + 0.37 * size
    return normal, q


def solid_normal(p, size, shape):
    """Unit normals (3, n) at surface points (3, n) of solids of half extents (3, n) and shape numbers (n,)."""
    ratio, rho = p / size, torch.hypot(p[0], p[1]).clamp(min=1e-6)
    box = (ratio.abs() == ratio.abs().amax(0)) * p.sign()
    cap = torch.stack([torch.zeros_like(rho), torch.zeros_like(rho), p[2].sign()])
    cylinder = torch.where(ratio[2].abs() > rho / size[0], cap, torch.stack([p[0], p[1], 0 * rho]))
    cone = torch.where(ratio[2] < -0.998, cap, torch.stack([p[0], p[1], rho * size[0] / (2 * size[2])]))
    normal = torch.where(shape == 0, box, torch.where(shape == 1, p, torch.where(shape == 2, cylinder, cone)))
    return normalize(normal)


# ----------------------------------------------------------------------------------------------------- shading


def sky_colour(world: World, direction):
    """Linear colour (3, B, P): gradient, clouds, the sun and the glow around it."""
    zenith, horizon, clouds, sun = world.sky
    up = direction[2].clamp(0, 1)
    near_sun = dot(direction, sun).clamp(min=0)
    colour = horizon + (zenith - horizon) * up**0.55
    colour = colour + world.lights[0, 3:6] * (0.1 * near_sun**6 + 3 * near_sun**600)
    cover = torch.zeros_like(up)
    index = ((direction[2] > 0.01) & (clouds[0] > 0)).flatten().nonzero()[:, 0]
    x, y, z = direction.flatten(1)[:, index]
    drift = sun[0].expand_as(up).flatten()[index]  # other clouds in every scene
    amount = ((noise(torch.stack([x / (z + 0.12), y / (z + 0.12), 8 * drift]) * 1.3) - 0.5) * 5).clamp(0, 1)
    cover.flatten()[index] = amount * (z * 8).clamp(max=1)
    return colour * (1 - 0.9 * cover) + clouds * cover


def openness(world: World, point, normal):
    """Share (B, P) of the ambient light that objects, each taken as a sphere, and the edges of a room let through."""
    centre, volume = world.solids[:3].unsqueeze(-1), world.solids[3:6].prod(0).unsqueeze(-1)
    along, towards = (torch.einsum("cbn,cbp->bnp", world.solids[:3], v) for v in (point, normal))
    square = (dot(centre, centre) - 2 * along + dot(point, point).unsqueeze(1)).clamp(min=1e-6)
    cosine = (towards - dot(point, normal).unsqueeze(1)) * square.rsqrt()  # negative for the object of the point
    blocked = cosine.clamp(min=0) * (volume ** (2 / 3) / square).clamp(max=1)
    gap = torch.minimum(point - world.low, world.high - point).clamp(min=0)
    edge = (1 - normal.abs()) * torch.exp(-4 * gap)
    return torch.exp(-1.8 * blocked.sum(1) - 0.6 * (edge[0] + edge[1] + edge[2]))


def direct_light(world: World, start, direction, normal, ambient_share, exponent, jitter):
    """Diffuse and specular light (3, B, P) from both lamps. The key light casts shadows, from a point `jitter`
    (3, 1, P) of its radius off its centre, so that the samples of a pixel make a penumbra."""
    diffuse, specular = torch.zeros(2, *start.shape, device=start.device)
    for number, light in enumerate(world.lights):
        to = light[:3] + light[6] * jitter - start
        distance = dot(to, to).sqrt()
        to = to / distance
        arrives = dot(to, normal).clamp(min=0) / (1 + distance * distance * light[7])
        if number == 0:
            arrives = arrives * (hit_solids(world, start, to).amin(1) > distance)
        else:
            arrives = arrives * (0.4 + 0.6 * ambient_share)
        half = dot(normalize(to - direction), normal).clamp(min=1e-6)
        lobe = (exponent + 8) / 8 * torch.exp(exponent * half.log())
        diffuse = diffuse + light[3:6] * arrives
        specular = specular + light[3:6] * (arrives * lobe)
    return diffuse, specular


def shade(world: World, origin, direction, jitter, angle, bounces: int = 1):
    """Linear radiance (3, B, P) along unit rays that stand for pixels `angle` (B, 1) wide."""
    distance, surface = cast(world, origin, direction)
    distance = distance.clamp(max=FAR)
    point = origin + distance * direction
    normal, q = surface_frame(world, point, direction, surface)
    rows = world.materials.gather(2, surface.expand(11, -1, -1))
    scale, reflectance, exponent, metal = rows[7:].clamp(min=1e-4)
    facing = -dot(direction, normal)
    base = albedo(rows, q / scale, angle * distance / (facing.clamp(min=0.05) * scale))

    above, below = world.ambient
    share = openness(world, point, normal)
    start = point + normal * (1e-3 + 1e-4 * distance)  # off the surface, which must not shade itself
    diffuse, specular = direct_light(world, start, direction, normal, share, exponent, jitter)
    diffuse = diffuse + (below + (above - below) * (0.5 + 0.5 * normal[2])) * share
    mirrors = (reflectance > 0.05) & (surface != SKY)
    fresnel = reflectance + 0.9 * mirrors * (1 - facing.clamp(0, 1)) ** 5
    tint = 1 + (base - 1) * metal
    colour = base * diffuse * (1 - 0.85 * metal) * (1 - fresnel * (1 - metal)) + tint * specular * reflectance
    if bounces:
        mirrored = direction + 2 * facing * normal
        colour = colour + reflections(world, start, mirrored, tint * fresnel, mirrors, angle)
    haze = 1 - torch.exp(-distance / 200)
    colour = colour + (world.sky[1] - colour) * haze
    return torch.where(surface == SKY, sky_colour(world, direction), colour)


def reflections(world: World, start, direction, weight, mask, angle):
    """Radiance (3, B, P) along the rays under `mask` (B, P), times weight (3, B, P). Those rays alone are cast, packed
    into as many columns as the scene with most of them needs."""
    scene, ray = mask.nonzero(as_tuple=True)
    colour = torch.zeros_like(weight)
    if len(scene):
        count = mask.sum(1)
        column = torch.arange(len(scene), device=mask.device) - (count.cumsum(0) - count)[scene]
        o, d = torch.zeros(2, 3, len(count), int(count.max()), device=mask.device)
        o[:], d[2] = world.camera_position, 1.0  # a harmless ray in the columns left over
        o[:, scene, column], d[:, scene, column] = start[:, scene, ray], direction[:, scene, ray]
        seen = shade(world, o, d, torch.zeros(3, 1, 1, device=mask.device), 2 * angle, bounces=0)
        colour[:, scene, ray] = seen[:, scene, column] * weight[:, scene, ray]
    return colour


def tone_map(radiance):
    """Linear radiance to linear display values in [0, 1]: K. Narkowicz's fit of the ACES filmic curve."""
    x = 0.62 * radiance
    return (x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------- captions

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = {
    "left": ["left of", "to the left of", "on the left of"],
    "right": ["right of", "to the right of", "on the right of"],
    "behind": ["behind"],
    "front": ["in front of"],
    "top": ["on", "on top of"],
}
WORDS = """a an there is are and with under sky room courtyard wall floor wide view small large glossy matte metal cube
    boxes blocks cubes spheres balls cylinders cones"""
PHRASES = [COLOURS, GROUNDS, SKIES, PATTERNS[1:-1], NUMBERS.values(), *SHAPES.values(), *RELATIONS.values()]
VOCABULARY = frozenset(" ".join([WORDS, *(phrase for group in PHRASES for phrase in group)]).split())  # but for commas


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def relations(scene: Scene, i: int, j: int) -> list[str]:
    """How object i stands to object j as the camera sees them, where a clear margin leaves no doubt."""
    a, b = scene.objects[i], scene.objects[j]
    if a.support == j:
        return ["top"]
    if b.support == i:
        return []
    p, q = (scene.camera_rotation.T @ (o.centre - scene.camera_position) for o in (a, b))
    shift, reach = p[0] / p[2] - q[0] / q[2], a.radius / p[2] + b.radius / q[2]
    if abs(shift) > reach:
        return ["left" if shift < 0 else "right"]
    if a.support is None and b.support is None and abs(p[2] - q[2]) > a.radius + b.radius:
        return ["behind" if p[2] > q[2] else "front"]
    return []


def noun(rng, scene: Scene, group: list[int]) -> str:
    """Words for objects of one colour, pattern and shape."""
    first, several = scene.objects[group[0]], len(group) > 1
    extent = [np.prod(scene.objects[k].size) ** (1 / 3) / scene.unit for k in group]
    words = []
    if rng.random() < 0.6:
        words += ["small"] if max(extent) < 0.16 else ["large"] if min(extent) > 0.27 else []
    if first.material.finish in ("glossy", "matte") and rng.random() < 0.35:
        words.append(first.material.finish)
    words.append(first.material.colour)
    words += [w for w in (first.material.finish, first.material.pattern) if w in ("metal", *PATTERNS[1:5])]
    shape = str(rng.choice(SHAPES[first.shape]))
    if first.shape == "box" and np.ptp(first.size) < 1e-6 and rng.random() < 0.7:
        shape = "cube"
    words.append(shape + ("es" if shape == "box" else "s") * several)
    return f"{NUMBERS[len(group)]} {' '.join(words)}" if several else with_article(" ".join(words))


def surroundings(rng, scene: Scene, shares: np.ndarray) -> str:
    """Words for the place, naming the wall, the floor and the sky only where they show."""
    if scene.kind == "open":
        words = scene.place
    else:
        parts = []
        for surface, name, odds in ((WALL, "wall", 0.7), (FLOOR, "floor", 0.5)):
            material = scene.surfaces[surface]
            if shares[surface] > 0.04 and rng.random() < odds:
                kind = material.colour if material.pattern == "plain" else material.pattern
                parts.append(with_article(f"{kind} {name}"))
        words = f"in a {scene.kind}" + (" with " if parts else "") + " and ".join(parts)
    if scene.sky_word and shares[SKY] > 0.04 and rng.random() < 0.7:
        words += f" under {with_article(scene.sky_word)} sky"
    return words


def describe(scene: Scene, shares: np.ndarray, rng) -> str:
    """A caption of what is visible, from the share of the pixels (FIRST_OBJECT + N,) of each surface."""
    groups = defaultdict(list)
    for k, o in enumerate(scene.objects):
        if shares[FIRST_OBJECT + k] > MIN_VISIBLE:
            groups[o.shape, o.material.colour, o.material.pattern, o.material.finish == "metal"].append(k)
    groups = [list(groups.values())[k] for k in rng.permutation(len(groups))]
    place = surroundings(rng, scene, shares)
    if not groups:
        return f"a wide view {place}"
    singles = [group[0] for group in groups if len(group) == 1]
    pairs = [(i, r, j) for i in singles for j in singles if i != j for r in relations(scene, i, j)]
    if pairs and rng.random() < 0.8:
        i, relation, j = pairs[rng.integers(len(pairs))]
        others = [group for group in groups if group not in ([i], [j])]
        verb = " is" if rng.random() < 0.3 else ""
        text = f"{noun(rng, scene, [i])}{verb} {rng.choice(RELATIONS[relation])} {noun(rng, scene, [j])}"
        if others and not verb and rng.random() < 0.5:
            text += f", and {noun(rng, scene, others[0])}"
    else:
        nouns = [noun(rng, scene, group) for group in groups[: rng.integers(1, 4)]]
        text = " and ".join([", ".join(nouns[:-1]), nouns[-1]] if len(nouns) > 1 else nouns)
        if rng.random() < 0.2:
            text = f"there {'are' if len(groups[0]) > 1 else 'is'} {text}"
    style = rng.random()
    if (style < 0.12 and len(text.split()) >= 4) or len(f"{text} {place}".split()) > 25:
        return text
    if style < 0.35:
        return f"{place}, {text}"
    return f"{text}, {place}" if ", and" in text else f"{text} {place}"


# --------------------------------------------------------------------------------------------------------- API


@dataclass
class SceneBatch:
    """Rendered scenes. The centre of pixel (row r, column c), the point whose depth and surface it has, is at (c, r) of
    the image plane, as in `mf_diffusers.geometry`, and intrinsics @ (X, Y, Z) / Z gives such coordinates."""

    image: torch.Tensor  # (B, 3, H, W) sRGB in [0, 1]
    depth: torch.Tensor  # (B, 1, H, W) metres along the optical axis; inf for the sky
    intrinsics: torch.Tensor  # (B, 3, 3) in pixels, square, principal point ((W - 1) / 2, (H - 1) / 2)
    surfaces: torch.Tensor  # (B, H, W) int64: SKY, FLOOR, WALL, CEILING or FIRST_OBJECT + object
    captions: list[str]


def render_scenes(
    indices,
    seed: int = 0,
    height: int = 128,
    width: int = 128,
    device="cpu",
    supersample: int = 2,
    split: str = "train",
) -> SceneBatch:
    """Render scenes `indices` of `seed` and `split` (see SPLITS), with supersample^2 rays a pixel for the image."""
    device = torch.device(device)
    keys = [int(index) for index in indices]
    scenes = [sample_scene(key, seed, split) for key in keys]
    # Similar scenes share a chunk, as each of its scenes costs what the one with most objects and reflections does.
    order = sorted(range(len(keys)), key=lambda k: (scenes[k].surfaces[FLOOR].finish, len(scenes[k].objects)))
    size = max(1, RAYS_PER_CHUNK.get(device.type, 1 << 20) // (height * width * supersample**2))
    chunks = [[scenes[k] for k in order[start : start + size]] for start in range(0, len(order), size)]
    rendered = zip(*(render_chunk(chunk, height, width, device, supersample) for chunk in chunks))
    back = torch.tensor(order, device=device).argsort()
    image, depth, surfaces, intrinsics = (torch.cat(parts)[back] for parts in rendered)

    count = FIRST_OBJECT + max(len(scene.objects) for scene in scenes)
    shares = torch.stack([(surfaces == k).flatten(1).float().mean(1) for k in range(count)], dim=1).cpu().numpy()
    rngs = [scene_rng(split, seed, key, 1) for key in keys]
    captions = [describe(*args) for args in zip(scenes, shares, rngs)]
    return SceneBatch(image, depth, intrinsics, surfaces, captions)


@torch.inference_mode()
def render_chunk(scenes: list[Scene], height: int, width: int, device: torch.device, supersample: int):
    """Image, depth, surfaces and intrinsics of `SceneBatch`."""
    world = pack(scenes, device)
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5, indexing="ij"
    )
    rows, columns = rows.flatten(), columns.flatten()
    direction, z = camera_rays(world, columns, rows, height, width)
    distance, surface = cast(world, world.camera_position, direction)

    steps = (torch.arange(supersample, device=device) + 0.5) / supersample - 0.5
    dy, dx = (t.reshape(-1, 1) for t in torch.meshgrid(steps, steps, indexing="ij"))
    direction, _ = camera_rays(world, (columns + dx).flatten(), (rows + dy).flatten(), height, width)
    jitter = 1.6 * torch.stack([dx, dy, dx - dy]).expand(-1, -1, height * width).reshape(3, 1, -1)
    colour = shade(world, world.camera_position, direction, jitter, 2 / width * world.tan_half_fov)
    image = tone_map(colour).view(3, len(scenes), -1, height, width).mean(2) ** (1 / 2.2)

    intrinsics = torch.zeros(len(scenes), 3, 3, device=device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = width / 2 / world.tan_half_fov[:, 0]
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = (width - 1) / 2, (height - 1) / 2, 1
    depth = (distance * z).view(-1, 1, height, width)
    return image.transpose(0, 1), depth, surface.view(-1, height, width), intrinsics
