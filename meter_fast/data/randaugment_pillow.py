"""The operations of RandAugment by Pillow, as published: the CPU path, and the oracle of the other one."""

from collections.abc import Sequence

from PIL import Image, ImageEnhance, ImageOps

from meter_fast.data.randaugment import ENHANCEMENTS, GEOMETRIC, Operation, affine, levels


def augment_picture(picture: Image.Image, operations: Sequence[Operation]) -> Image.Image:
    """An RGB picture after `operations`, one by one; the size stays."""
    for operation in operations:
        picture = _apply(picture, operation)
    return picture


def _apply(picture: Image.Image, operation: Operation) -> Image.Image:
    if operation.name in GEOMETRIC:
        matrix = affine(operation, *picture.size)
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    if operation.name in ENHANCEMENTS:
        return getattr(ImageEnhance, operation.name)(picture).enhance(operation.value)
    if operation.name == "AutoContrast":
        return ImageOps.autocontrast(picture)
    if operation.name == "Equalize":
        return ImageOps.equalize(picture)
    change = levels(operation)
    moved = [min(255, level + change.add) for level in range(256)]
    return picture.point([(255 - v if v >= change.threshold else v) & change.mask for v in moved] * 3)
