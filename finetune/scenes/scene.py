"""What is in a scene: camera, objects, surroundings and light, sampled from the split, the seed and the index alone.

Lengths are in metres. World axes: z up, the floor at z = 0, the objects around the origin. Camera axes as in OpenCV: x
right, y down, z forward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


SPLITS = {"train": 0, "validation": 1, "test": 2}  # part of the key of every generator: splits share no scene
SKY, FLOOR, WALL, CEILING, FIRST_OBJECT = range(5)  # values of `SceneBatch.surfaces`; object k is FIRST_OBJECT + k

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
        """The radius of the vertical cylinder around it."""
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


def linear(rgb: Sequence[float]) -> np.ndarray:
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


def sample_solid(rng: np.random.Generator, scene: Scene) -> Solid:
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


def place_solid(rng: np.random.Generator, scene: Scene, solid: Solid) -> None:
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


def object_material(rng: np.random.Generator, base: float) -> Material:
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


def surface_material(rng: np.random.Generator, pattern: str) -> Material:
    """The material of a floor or a wall."""
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


def furnish_walls(rng: np.random.Generator, scene: Scene) -> None:
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


def furnish_open(rng: np.random.Generator, scene: Scene) -> None:
    """Ground to the horizon."""
    scene.place = str(rng.choice(list(GROUNDS)))
    first, second, pattern, scale = GROUNDS[scene.place]
    tint = rng.uniform(0.85, 1.1) * rng.uniform(0.93, 1.07, 3)
    scene.surfaces[FLOOR] = Material("", np.minimum(linear(first) * tint, 0.9), linear(second) * tint, pattern, scale)
    scene.low, scene.high = np.array([-1e6, -1e6, 0.0]), np.full(3, 1e6)


def light_room(rng: np.random.Generator, scene: Scene) -> None:
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


def light_outdoors(rng: np.random.Generator, scene: Scene) -> None:
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
