"""Scenes to images and exact depth: all rays of a batch of scenes are cast and shaded together, in plain torch.

In these tensors the three coordinates come first: (3, B, P) is P rays in each of B scenes, (3, K, P) is K solids with
the rays of their scenes; (B, N, P) is the N solids of each scene.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from .scene import CEILING, FIRST_OBJECT, FLOOR, PATTERNS, SHAPES, SKY, WALL, Scene


FAR = 500.0  # metres along the ray; ground beyond it counts as sky
MISS = 1e30  # a distance no ray reaches
RAYS_PER_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}  # on a CPU, small enough for the tensors to stay in the cache


def render(scenes: list[Scene], height: int, width: int, device: torch.device, supersample: int):
    """Image, depth, intrinsics and surfaces of a `SceneBatch`."""
    # Similar scenes share a chunk, as each of its scenes costs what the one with most objects and reflections does.
    order = sorted(range(len(scenes)), key=lambda k: (scenes[k].surfaces[FLOOR].finish, len(scenes[k].objects)))
    size = max(1, RAYS_PER_CHUNK.get(device.type, 1 << 20) // (height * width * supersample**2))
    chunks = [[scenes[k] for k in order[start : start + size]] for start in range(0, len(order), size)]
    rendered = zip(*(render_chunk(chunk, height, width, device, supersample) for chunk in chunks))
    back = torch.tensor(order, device=device).argsort()
    return tuple(torch.cat(parts)[back] for parts in rendered)


@torch.inference_mode()
def render_chunk(scenes: list[Scene], height: int, width: int, device: torch.device, supersample: int):
    """What `render` gives, of scenes that are few enough to be rendered at once."""
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
    return image.transpose(0, 1), depth, intrinsics, surface.view(-1, height, width)


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
