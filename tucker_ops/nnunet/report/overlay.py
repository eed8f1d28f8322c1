"""One slice of one case: image, label, and what each model made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from tucker_ops.nnunet.segmentations import Class, Dataset, check_same_grid, read_volume

CLASS_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
FILL_OPACITY = 0.45
# Leaves out the metal and bone that would darken the organs of a CT.
WINDOW_PERCENTILES = (1, 98)
# A plane is worth looking at if its slices are at least this share of the thickest there are.
COARSEST_PLANE = 0.5


@dataclass(frozen=True)
class Volume:
    """Array [z, y, x] and spacing in mm; where ``oriented``, axes run to superior, posterior and left."""

    array: np.ndarray
    spacing: np.ndarray
    oriented: bool


@dataclass(frozen=True)
class Slice:
    """A plane of a volume: the axis it is normal to (0 z, 1 y, 2 x) and its index there."""

    axis: int
    index: int


def read_oriented(dataset: Dataset, path: Path, *, image: bool = False) -> Volume:
    """A volume turned to the patient's axes where the file says how, else as nnU-Net reads it."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    array, spacing = read_volume(dataset.reader(), path, image=image)
    if dataset.file_ending not in SimpleITKIO.supported_file_endings:
        return Volume(array[0], spacing, False)
    import SimpleITK

    stored = SimpleITK.ReadImage(str(path))
    if stored.GetDimension() != 3:
        return Volume(array[0], spacing, False)
    turned = SimpleITK.DICOMOrient(stored, "LPS")
    return Volume(SimpleITK.GetArrayFromImage(turned), np.array(turned.GetSpacing()[::-1]), True)


def largest_slice(label: Volume) -> Slice:
    """The plane with the largest labelled area in mm².

    Planes that cut along much thicker slices are left out: where voxels are not cubes, those are the two
    that show the thickness.
    """
    best, found = -1.0, Slice(0, label.array.shape[0] // 2)
    for axis, thickness in enumerate(label.spacing):
        if thickness < COARSEST_PLANE * label.spacing.max():
            continue
        others = tuple(a for a in range(3) if a != axis)
        areas = (label.array > 0).sum(axis=others) * np.prod(label.spacing[list(others)])
        if areas.max() > best:
            best, found = float(areas.max()), Slice(axis, int(areas.argmax()))
    return found


def overlay_figure(
    dataset: Dataset, image_path: Path, segmentation_paths: Mapping[str, Path], case: str
) -> Figure:
    """Panels of one slice: the image, then each segmentation drawn over it.

    The slice is that of the largest labelled area of the first segmentation. Pixels have their physical
    aspect ratio, the same colour is the same class in every panel. Raises ShapeError where extents differ.
    """
    image = read_oriented(dataset, image_path, image=True)
    volumes = {name: read_oriented(dataset, path) for name, path in segmentation_paths.items()}
    for name, volume in volumes.items():
        check_same_grid(
            (image.array[None], image.spacing),
            (volume.array[None], volume.spacing),
            (image_path, segmentation_paths[name]),
        )
    chosen = largest_slice(next(iter(volumes.values())))
    background = _plane(image.array, chosen)
    planes = {name: _plane(volume.array, chosen) for name, volume in volumes.items()}
    aspect = _aspect(image.spacing, chosen.axis)
    present = [n for n, c in dataset.classes.items() if any(_mask(p, c).any() for p in planes.values())]
    colours = _colours(present)

    rows, columns = background.shape
    panel_width = 2.6
    panel_height = float(np.clip(panel_width * rows * aspect / columns, 1.6, 5.0))
    legend_rows = -(-len(present) // 5)
    figure = Figure(
        figsize=(panel_width * (1 + len(planes)), panel_height + 0.75 + 0.25 * legend_rows),
        layout="constrained",
    )
    low, high = np.percentile(background, WINDOW_PERCENTILES)
    window = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6), "aspect": aspect}
    axes = figure.subplots(1, 1 + len(planes), squeeze=False)[0]
    for panel, name in zip(axes, ("image", *planes), strict=True):
        panel.imshow(background, interpolation="nearest", **window)
        if name in planes:
            _draw_classes(panel, planes[name], {n: dataset.classes[n] for n in present}, colours, aspect)
        panel.set_title(name, fontsize=10)
        panel.set_xticks([])
        panel.set_yticks([])
        if image.oriented:
            _name_sides(panel, chosen.axis)
    normal = ("axial", "coronal", "sagittal")[chosen.axis] if image.oriented else f"axis {chosen.axis}"
    figure.suptitle(
        f"{case}, {normal} slice {chosen.index + 1} of {image.array.shape[chosen.axis]}", fontsize=10
    )
    if present:
        handles = [Patch(facecolor=to_rgba(colours[n], 0.8), edgecolor=colours[n], label=n) for n in present]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(5, len(present)), frameon=False, fontsize=9
        )
    return figure


def _plane(array: np.ndarray, chosen: Slice) -> np.ndarray:
    """The slice with superior up (coronal, sagittal) or anterior up (axial)."""
    plane = np.take(array, chosen.index, axis=chosen.axis)
    return plane if chosen.axis == 0 else plane[::-1]


def _aspect(spacing: np.ndarray, axis: int) -> float:
    down, across = np.delete(spacing, axis)
    return float(down / across)


def _mask(plane: np.ndarray, key: Class) -> np.ndarray:
    from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask

    return region_or_label_to_mask(plane, key)


def _colours(classes: Sequence[str]) -> dict[str, str]:
    """Okabe and Ito's colours, or, for more classes than those, hues spread over the spectrum."""
    if len(classes) <= len(CLASS_COLOURS):
        return dict(zip(classes, CLASS_COLOURS, strict=False))
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # Steps by the golden ratio keep neighbouring labels, often neighbouring organs, apart in hue.
    hues = (np.arange(len(classes)) * 0.618034) % 1
    return {
        name: to_hex(colormaps["turbo"](0.05 + 0.9 * hue)) for name, hue in zip(classes, hues, strict=True)
    }


def _draw_classes(panel, plane: np.ndarray, classes: Mapping[str, Class], colours, aspect: float) -> None:
    for name, key in classes.items():
        mask = _mask(plane, key)
        if not mask.any():
            continue
        fill = np.zeros((*mask.shape, 4))
        fill[mask] = to_rgba(colours[name], FILL_OPACITY)
        panel.imshow(fill, interpolation="nearest", aspect=aspect)
        if not mask.all():
            panel.contour(mask.astype(float), levels=[0.5], colors=[colours[name]], linewidths=1.2)


def _name_sides(panel, axis: int) -> None:
    left, right = ("A", "P") if axis == 2 else ("R", "L")
    outline = [withStroke(linewidth=1.5, foreground="black")]
    style = {"color": "white", "fontsize": 8, "transform": panel.transAxes, "va": "center"}
    style["path_effects"] = outline
    panel.text(0.03, 0.5, left, ha="left", **style)
    panel.text(0.97, 0.5, right, ha="right", **style)
