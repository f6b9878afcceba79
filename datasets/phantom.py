"""The built-in synthetic dataset: short-axis views of a heart in ACDC's four classes."""

import numpy as np


def draw_phantom(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Phantom `number`: a 96x96 gray uint8 image and its uint8 mask.

    The left ventricle in its ring of myocardium and the right ventricle's crescent, in a chest with
    lung, liver, vessels as bright as ventricles, a coil's uneven gain and noise. One in ten shows
    no heart, one in ten only the apex: a small left ventricle without the right one.
    """
    rng = np.random.default_rng([2019, number])
    u = rng.uniform
    rows, columns = np.mgrid[-1:1:96j, -1:1:96j]

    def ellipse(x, y, a, b, turn=0.0, wobble=0.0) -> np.ndarray:
        """Approximate signed distance to an ellipse's edge, negative inside."""
        across = (columns - x) * np.cos(turn) + (rows - y) * np.sin(turn)
        along = (rows - y) * np.cos(turn) - (columns - x) * np.sin(turn)
        angle = np.arctan2(along, across)
        edge = 1 + wobble * (np.cos(2 * angle + u(0, 6)) + np.cos(3 * angle + u(0, 6)))
        return (np.hypot(across / a, along / b) - edge) * min(a, b)

    picture, mask = np.full((96, 96), u(0, 0.05)), np.zeros((96, 96), np.uint8)

    def paint(shape: np.ndarray, value: float, label: int | None = None) -> None:
        cover = 1 / (1 + np.exp(np.clip(shape / 0.012, -40, 40)))  # partial volume at the edge
        picture[:] = picture * (1 - cover) + value * cover
        if label is not None:
            mask[shape < 0] = label

    chest = ellipse(0, 0, u(0.85, 1.0), u(0.75, 0.95))
    paint(chest, u(0.3, 0.5))
    x, y, a, b, turn = u(0.5, 0.7), u(-0.3, 0.1), u(0.2, 0.35), u(0.4, 0.6), u(-0.3, 0.3)
    lung = ellipse(x, y, a, b, turn, 0.05)
    paint(lung, u(0.02, 0.12))
    x, y, a, b, turn = u(-0.7, -0.4), u(0.4, 0.7), u(0.3, 0.5), u(0.2, 0.35), u(-0.5, 0.5)
    liver = ellipse(x, y, a, b, turn, 0.05)
    paint(liver, u(0.3, 0.55))
    for _ in range(rng.integers(2, 6)):
        x, y, a, b, turn = u(-0.8, 0.8), u(-0.8, 0.8), u(0.03, 0.13), u(0.03, 0.13), u(0, 3)
        vessel = ellipse(x, y, a, b, turn)
        paint(vessel, u(0.5, 0.9))

    kind = u()
    is_apex, has_heart = kind < 0.1, kind < 0.9
    x, y, turn = u(-0.2, 0.25), u(-0.2, 0.2), u(-0.6, 0.6)
    outer = u(0.24, 0.34) * (0.5 if is_apex else 1)
    inner, squeeze, blood, muscle = outer * u(0.5, 0.78), u(0.88, 1.12), u(0.6, 0.85), u(0.22, 0.38)
    if has_heart and not is_apex:
        distance, a, b = outer * u(0.85, 1.1), outer * u(0.7, 1), outer * u(0.9, 1.3)
        x_right, y_right = x - distance * np.cos(turn), y - distance * np.sin(turn)
        right = ellipse(x_right, y_right, a, b, turn, 0.04)
        paint(right - 0.03, muscle)
        paint(right, blood * u(0.9, 1.1), label=1)
    if has_heart:
        paint(ellipse(x, y, outer * squeeze, outer / squeeze, turn, 0.02), muscle, label=2)
        paint(ellipse(x, y, inner * squeeze, inner / squeeze, turn, 0.03), blood, label=3)
        # papillary muscles: dark, but labeled as part of the cavity
        for angle in u(0, 6.28, rng.integers(0, 3)):
            x_muscle, y_muscle = x + 0.6 * inner * np.cos(angle), y + 0.6 * inner * np.sin(angle)
            paint(ellipse(x_muscle, y_muscle, 0.03, 0.03), muscle)

    picture *= 1 + u(-0.3, 0.3) * columns + u(-0.3, 0.3) * rows
    picture += rng.normal(0, u(0.02, 0.06), picture.shape)
    return (255 * picture.clip(0, 1)).astype(np.uint8), mask
