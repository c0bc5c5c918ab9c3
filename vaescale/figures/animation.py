"""Clips side by side as an animated GIF."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vaescale.figures.config import View
from vaescale.figures.drawing import Images, montage
from vaescale.figures.images import LETTER_PIXELS, SMALLEST_PIXELS, USUAL
from vaescale.system.files import write_whole

BAR_PIXELS = 4
MILLISECONDS = 200  # of a frame; the last one is shown four times as long


def animation(
    path: Path, clips: Sequence[Sequence[tuple[str, Images]]], *, given: int, view: View = USUAL
) -> None:
    """Draw rows of named clips of equally many frames [T, C, H, W], the names of the first row above it.

    A bar below shows the time, grey for the first `given` frames. It also keeps each frame: of equal ones that follow each other Pillow
    writes the first alone. A GIF has 256 colours, enough for every level of grey.
    """
    from PIL import Image, ImageDraw, ImageFont

    times, columns = len(clips[0][0][1]), len(clips[0])
    font, frames = ImageFont.load_default(LETTER_PIXELS), []
    for time in range(times):
        cells = [view.of(images[time : time + 1], name) for row in clips for name, images in row]
        channels = max(cell.shape[1] for cell in cells)
        cells = [np.broadcast_to(cell, (1, channels, *cell.shape[2:])) for cell in cells]
        whole = montage(np.concatenate(cells).astype(np.float32), columns)
        levels = (255 * np.moveaxis(whole, 0, -1).clip(0, 1)).round().astype(np.uint8)
        scale = max(1, SMALLEST_PIXELS // min(cells[0].shape[2:]))
        picture = Image.fromarray(levels[:, :, 0] if channels == 1 else levels)
        picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
        top = round(1.5 * LETTER_PIXELS)
        frame = Image.new(picture.mode, (picture.width, top + picture.height + 2 * BAR_PIXELS), "white")
        frame.paste(picture, (0, top))
        draw = ImageDraw.Draw(frame)
        for column, (name, _) in enumerate(clips[0]):
            middle = (column + 0.5) * picture.width / columns
            draw.text((middle, top / 2), name, fill="black", anchor="mm", font=font)
        right = max(time + 1, (time + 1) * frame.width // times)
        colour = "gray" if time < given else "black"
        draw.rectangle((0, frame.height - BAR_PIXELS, right - 1, frame.height - 1), fill=colour)
        frames.append(frame)
    content = io.BytesIO()
    duration = [MILLISECONDS] * (times - 1) + [4 * MILLISECONDS]
    frames[0].save(content, "gif", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    write_whole(path, content.getvalue())
