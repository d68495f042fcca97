"""Small ICC profiles, and the colours that they say by plain formulas."""

import struct

import numpy as np


SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
PROPHOTO = np.array([[0.79767, 0.13519, 0.03134], [0.28804, 0.71188, 0.00009], [0.0, 0.0, 0.82491]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
"""Columns: XYZ of red, green and blue, adapted to D50."""

D50 = np.array([0.9642, 1.0, 0.8249])
INKS = {  # (cyan, magenta, yellow, black): CIELAB on paper, about as offset printing has it
    (0, 0, 0, 0): (95, 0, -2),
    (1, 0, 0, 0): (55, -37, -50),
    (0, 1, 0, 0): (48, 74, -3),
    (0, 0, 1, 0): (89, -5, 93),
    (1, 1, 0, 0): (24, 22, -46),
    (1, 0, 1, 0): (50, -68, 33),
    (0, 1, 1, 0): (47, 68, 48),
    (1, 1, 1, 0): (23, 0, 0),
}


def rgb_profile(primaries, gamma):
    """Of a space with these primaries (3, 3) and this exponent."""
    curve = _curve(gamma)
    colorants = {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T)}
    return _profile(b"RGB ", b"XYZ ", colorants | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def gray_profile(gamma):
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile():
    """Of the inks in `INKS`; black halves what is left of the light three times over."""
    nodes = np.zeros((2, 2, 2, 2, 3), dtype=np.uint8)
    for inks, lab in ((key[:3], np.array(value)) for key, value in INKS.items()):
        nodes[(*inks, 0)] = np.round([lab[0] * 2.55, lab[1] + 128, lab[2] + 128])
        nodes[(*inks, 1)] = np.round([lab[0] * 2.55 / 8, 128, 128])
    identity = bytes(range(256))
    matrix = b"".join(_fixed(value) for value in np.eye(3).ravel())
    table = b"mft1" + bytes([0, 0, 0, 0, 4, 3, 2, 0]) + matrix + 4 * identity + nodes.tobytes() + 3 * identity
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table}, kind=b"prtr")


def srgb_of_rgb(colors, primaries, gamma):
    """sRGB 0..255 (..., 3) of colours 0..255 in a space with these primaries and this exponent."""
    return _encoded((np.asarray(colors) / 255) ** gamma @ (np.linalg.inv(SRGB) @ primaries).T)


def srgb_of_lab(lab):
    lightness, a, b = lab
    y = (lightness + 16) / 116
    roots = np.array([y + a / 500, y, y - b / 200])
    xyz = D50 * np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29))
    return _encoded(np.linalg.inv(SRGB) @ xyz)


def _encoded(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _fixed(value):
    return struct.pack(">i", round(value * 65536))


def _xyz(values):
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))


def _curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def _profile(space, connection, tags, kind=b"mntr"):
    tags = {b"wtpt": _xyz(D50)} | tags
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4xI4s4s4s", offset + len(body), 0x02100000, kind, space, connection)
    header = header.ljust(36, b"\0") + b"acsp" + bytes(28) + b"".join(map(_fixed, D50))
    return header.ljust(128, b"\0") + table + body
