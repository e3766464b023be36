"""Pictures of tensors: grids of images, with captions."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffdistill.storage.atomic import write_bytes_atomically

CAPTION_HEIGHT = 14
LABEL_SIZE = 15
GAP = 2


def save_grid(file: FilePath, images: Tensor, *, columns: int, min_side: int = 32) -> None:
    """One PNG of [N, C, H, W] images in [-1, 1], row by row; small ones are enlarged to `min_side` pixels."""
    save_picture(tile(images, columns, min_side), file)


def save_panels(
    file: FilePath, panels: Mapping[str, Tensor], *, columns: int | Mapping[str, int], min_side: int = 32
) -> None:
    """One PNG with a captioned grid per entry, side by side.  columns: of all of them, or by caption."""
    of_each = dict.fromkeys(panels, columns) if isinstance(columns, int) else columns
    grids = {caption: tile(images, of_each[caption], min_side) for caption, images in panels.items()}
    gap, ruler = 8, ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = {caption: max(grid.width, int(ruler.textlength(caption)) + 2) for caption, grid in grids.items()}
    size = (sum(widths.values()) + gap * (len(grids) - 1), CAPTION_HEIGHT + max(grid.height for grid in grids.values()))
    sheet = Image.new("RGB", size, "white")
    pen, left = ImageDraw.Draw(sheet), 0
    for caption, grid in grids.items():
        pen.text((left + 1, 1), caption, fill="black")
        sheet.paste(grid, (left, CAPTION_HEIGHT))
        left += widths[caption] + gap
    save_picture(sheet, file)


def save_rows(file: FilePath, rows: Mapping[str, Tensor], *, titles: Sequence[str] = (), min_side: int = 56) -> None:
    """One PNG with a row of images for each entry, its label on the left, in lines as the label has them.

    rows: [N, C, H, W] in [-1, 1] by label, alike in shape.  titles: of the columns.
    """
    font, line, pad = ImageFont.load_default(LABEL_SIZE), LABEL_SIZE + 4, 8
    strips = {label: tile(images, len(images), min_side) for label, images in rows.items()}
    left = 2 * pad + max(int(font.getlength(part)) + 1 for label in rows for part in label.splitlines())
    top, (width, height) = line + pad // 2 if titles else 0, next(iter(strips.values())).size
    height = max(height, line * max(len(label.splitlines()) for label in rows))
    sheet = Image.new("RGB", (left + width, top + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, title in enumerate(titles):
        pen.text((left + width / len(titles) * (number + 0.5), top / 2), title, fill="black", font=font, anchor="mm")
    for number, (label, strip) in enumerate(strips.items()):
        middle = top + height * number + strip.height / 2
        pen.multiline_text((pad, middle), label, fill="black", font=font, anchor="lm", spacing=4)
        sheet.paste(strip, (left, top + height * number))
    save_picture(sheet, file)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0 .. 255, rounded to nearest: [N, C, H, W] uint8 on the CPU."""
    return (images.detach().float().nan_to_num(0.0) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def tile(images: Tensor, columns: int, min_side: int) -> Image.Image:
    """[N, C, H, W] images in [-1, 1] row by row, each enlarged by a whole number to `min_side` pixels at least."""
    pixels = to_uint8(images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1))
    enlarge = max(1, -(-min_side // pixels.shape[-1]))
    pixels = pixels.repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    pixels = F.pad(pixels, (0, GAP, 0, GAP), value=255)
    rows = -(-len(pixels) // columns)
    missing = rows * columns - len(pixels)
    pixels = torch.cat([pixels, pixels.new_full((missing, *pixels.shape[1:]), 255)])
    _, channels, height, width = pixels.shape
    tiled = pixels.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray(np.ascontiguousarray(tiled.reshape(rows * height, columns * width, channels)))


def save_picture(picture: Image.Image, file: FilePath) -> None:
    """In the format that the file's ending says: the old one or the new one, never a part. Its folder is made.

    Raises ValueError for an ending that is no picture's.
    """
    content = io.BytesIO()
    picture.save(content, _format_of(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(file, content.getvalue())


def _format_of(file: FilePath) -> str:
    try:
        return Image.registered_extensions()[file.suffix.lower()]
    except KeyError:
        raise ValueError(f"unknown file extension: {file.suffix}") from None
