"""Captions of what is visible in a scene, from a small grammar."""

from collections import defaultdict

import numpy as np

from .scene import COLOURS, FIRST_OBJECT, FLOOR, GROUNDS, PATTERNS, SHAPES, SKIES, SKY, WALL, Scene


MIN_VISIBLE = 0.005  # share of the pixels below which a caption does not mention an object

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


def noun(rng: np.random.Generator, scene: Scene, group: list[int]) -> str:
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


def surroundings(rng: np.random.Generator, scene: Scene, shares: np.ndarray) -> str:
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


def describe(scene: Scene, shares: np.ndarray, rng: np.random.Generator) -> str:
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
