"""Scenes: scans stay in their pool, and the picture shows what the scene says."""

import numpy as np

from grace.data.scenes import (
    CELL_PIXELS,
    COLOURS,
    EMPTY,
    STUDENT_SCANS,
    TEST_SCANS,
    VALIDATION_SCANS,
    Painter,
    Scene,
    random_scene,
    scan_pools,
)


def cells(picture: np.ndarray) -> list[np.ndarray]:
    """The nine cells of a picture, row by row, as [32, 32, 3]."""
    side = CELL_PIXELS
    return [picture[r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(3) for c in range(3)]


def test_pools_are_disjoint_and_the_students_scans_are_the_teachers() -> None:
    pools = {name: set(pool.tolist()) for name, pool in scan_pools(seed=5).items()}
    assert len(pools["test"]) == TEST_SCANS and len(pools["validation"]) == VALIDATION_SCANS
    assert pools["student"] < pools["teacher"] and len(pools["student"]) == STUDENT_SCANS
    assert pools["test"] | pools["validation"] | pools["teacher"] == set(range(1797))
    assert len(pools["test"]) + len(pools["validation"]) + len(pools["teacher"]) == 1797
    assert set(scan_pools(seed=6)["test"].tolist()) != pools["test"]


def test_a_painter_uses_its_pool_only_and_knows_every_digit() -> None:
    for pool in scan_pools(seed=0).values():
        scans = Painter(pool).scans_of
        assert sorted(np.concatenate(scans).tolist()) == sorted(pool.tolist())
        assert min(map(len, scans)) >= 15


def test_random_scenes_hold_five_to_nine_digits() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(500)]
    assert {len(scene.occupied) for scene in scenes} == {5, 6, 7, 8, 9}
    assert all((c == EMPTY) == (d == EMPTY) for s in scenes for c, d in zip(s.colours, s.digits, strict=True))
    digits = np.bincount([d for scene in scenes for d in scene.digits if d != EMPTY], minlength=10)
    assert digits.min() > 0.8 * digits.mean() and digits.max() < 1.2 * digits.mean()


def test_pictures_show_the_colours_and_the_empty_cells() -> None:
    rng = np.random.default_rng(1)
    painter = Painter(scan_pools(seed=0)["validation"])
    palette = np.array(list(COLOURS.values())) / np.linalg.norm(list(COLOURS.values()), axis=1, keepdims=True)
    right = total = 0
    for _ in range(40):
        scene = random_scene(rng)
        picture = painter.paint(scene, rng)
        assert picture.size == (96, 96) and picture.mode == "RGB"
        for cell, pixels in enumerate(cells(np.asarray(picture, dtype=float))):
            brightest = pixels.reshape(-1, 3)[pixels.max(-1).argmax()]
            if cell in scene.occupied:
                right += int((palette @ brightest).argmax()) == scene.colours[cell]
                total += 1
            else:
                assert brightest.max() < 60
    assert 0.8 < right / total < 1  # colours vary, and a few are mistaken for their neighbours


def test_the_digit_painted_is_the_digit_of_the_scene() -> None:
    # Nearest scan of the same pool, by correlation of the ink: a check that no label is shifted.
    from sklearn.datasets import load_digits

    data = load_digits()
    pool = scan_pools(seed=0)["test"]
    painter, rng = Painter(pool), np.random.default_rng(2)
    right = total = 0
    for _ in range(12):
        scene = random_scene(rng)
        grey = np.asarray(painter.paint(scene, rng).convert("L"), dtype=float)
        for cell in scene.occupied:
            ink = cells(grey[..., None])[cell][..., 0]
            rows, columns = np.nonzero(ink > 0.35 * ink.max())
            crop = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            right += nearest(crop, data.images[pool], data.target[pool]) == scene.digits[cell]
            total += 1
    assert right / total > 0.6  # chance is 0.1


def nearest(crop: np.ndarray, scans: np.ndarray, labels: np.ndarray) -> int:
    """The label of the scan whose inked part looks most like `crop`."""
    scores = []
    for scan in scans:
        rows, columns = np.nonzero(scan > 0.35 * scan.max())
        part = scan[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        grid = [np.linspace(0, n - 1, 12).astype(int) for n in (*crop.shape, *part.shape)]
        scores.append(
            np.corrcoef(crop[np.ix_(grid[0], grid[1])].ravel(), part[np.ix_(grid[2], grid[3])].ravel())[0, 1]
        )
    return int(labels[int(np.argmax(scores))])


def test_an_empty_scene_is_dark() -> None:
    picture = Painter(scan_pools(0)["test"]).paint(
        Scene((EMPTY,) * 9, (EMPTY,) * 9), np.random.default_rng(0)
    )
    assert np.asarray(picture).max() < 60
