"""Photographs as people have them, as (3, H, W) uint8 RGB tensors."""

import numpy as np
import torch
from PIL import Image, ImageOps


def as_tensor(image):
    """Any image as a tensor (3, H, W) uint8 RGB.

    Args:
        image: a Pillow image of any mode, turned upright as its EXIF orientation says; an array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a tensor (1, H, W) or (3, H, W). Arrays
            and tensors are uint8, uint16, or floating in 0 .. 1. What is transparent is white.

    Raises:
        TypeError, ValueError: anything else; says what was given.
    """
    if isinstance(image, Image.Image):
        image = _pixels(ImageOps.exif_transpose(image))
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"image must be (1, H, W) or (3, H, W), got {tuple(image.shape)}")
        image = image.detach().cpu().numpy().transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"image must be a Pillow image, an array or a tensor, got {type(image).__name__}"
        )
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"image must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {image.shape}"
        )
    if not image.size:
        raise ValueError(f"image must have pixels, got {image.shape}")
    image = _as_bytes(image)
    if image.shape[2] == 4:
        opaque = image[..., 3:].astype(np.uint16)
        image = ((image[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
    if image.shape[2] == 1:
        image = np.repeat(image, 3, 2)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _pixels(image):
    """The array of a Pillow image."""
    if image.mode.startswith("I"):  # 16 bits of grey, also where Pillow holds them in 32
        return np.asarray(image).clip(0, 65535).astype(np.uint16)
    if image.mode == "F":
        return np.asarray(image)
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))


def _as_bytes(image):
    """uint8 of an array in one of the allowed types."""
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.issubdtype(image.dtype, np.floating):
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"a floating image must be in 0 .. 1, got {image.min():g} .. {image.max():g}"
            )
        return (image * 255).round().astype(np.uint8)
    raise TypeError(f"image must be uint8, uint16 or floating, got {image.dtype}")
