"""Clips side by side as an animated GIF, and as an MP4 where PyAV is installed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaescale.data.videos import encoded
from vaescale.figures.config import Scale, View
from vaescale.figures.drawing import Images, montage
from vaescale.figures.images import LETTER_PIXELS, SMALLEST_PIXELS, USUAL, coloured, with_bar
from vaescale.system.files import write_whole

BAR_PIXELS = 4
MILLISECONDS = 200  # of a frame; the last one is shown four times as long in a GIF


def animation(
    path: Path,
    clips: Sequence[Sequence[tuple[str, Images]]],
    *,
    given: int,
    view: View = USUAL,
    scale: Scale | None = None,
) -> list[Path]:
    """Draw rows of named clips of equally many frames [T, C, H, W], the names of the first row above it. Returns the paths.

    path: of the GIF; the MP4 has the same name and is there where PyAV with libx264 is installed. scale: of the clips of its name, with a bar of its
    colours. A bar below shows the time, grey for the first `given` frames. It also keeps each frame: of equal ones that follow each other
    Pillow writes the first alone. A GIF has 256 colours, enough for every level of grey.
    """
    frames = [_frame(clips, time, given=given, view=view, scale=scale) for time in range(len(clips[0][0][1]))]
    content = io.BytesIO()
    duration = [MILLISECONDS] * (len(frames) - 1) + [4 * MILLISECONDS]
    frames[0].save(content, "gif", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    write_whole(path, content.getvalue())
    paths, video = [path], path.with_suffix(".mp4")
    movie = encoded(
        np.stack([np.asarray(frame.convert("RGB")) for frame in frames]), milliseconds=MILLISECONDS
    )
    if movie is None:
        video.unlink(missing_ok=True)  # of an earlier drawing
    else:
        write_whole(video, movie)
        paths.append(video)
    return paths


def _frame(
    clips: Sequence[Sequence[tuple[str, Images]]], time: int, *, given: int, view: View, scale: Scale | None
) -> Any:
    """The picture of all clips at a time."""
    from PIL import Image, ImageDraw, ImageFont

    times, columns = len(clips[0][0][1]), len(clips[0])
    font = ImageFont.load_default(LETTER_PIXELS)
    cells = [coloured(images[time : time + 1], name, view, scale) for row in clips for name, images in row]
    channels = max(cell.shape[1] for cell in cells)
    cells = [np.broadcast_to(cell, (1, channels, *cell.shape[2:])) for cell in cells]
    whole = montage(np.concatenate(cells).astype(np.float32), columns)
    levels = (255 * np.moveaxis(whole, 0, -1).clip(0, 1)).round().astype(np.uint8)
    factor = max(1, SMALLEST_PIXELS // min(cells[0].shape[2:]))
    picture = Image.fromarray(levels[:, :, 0] if channels == 1 else levels)
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    top = round(1.5 * LETTER_PIXELS)
    frame = Image.new(picture.mode, (picture.width, top + picture.height + BAR_PIXELS), "white")
    frame.paste(picture, (0, top))
    draw = ImageDraw.Draw(frame)
    for column, (name, _) in enumerate(clips[0]):
        middle = (column + 0.5) * picture.width / columns
        draw.text((middle, top / 2), name, fill="black", anchor="mm", font=font)
    for bar in (view.bar(), None if scale is None else scale.bar()):
        frame = frame if bar is None else with_bar(frame, bar, font)
    timed = Image.new(frame.mode, (frame.width, frame.height + BAR_PIXELS), "white")
    timed.paste(frame, (0, 0))
    right = max(time + 1, (time + 1) * timed.width // times)
    place = (0, timed.height - BAR_PIXELS, right - 1, timed.height - 1)
    ImageDraw.Draw(timed).rectangle(place, fill="gray" if time < given else "black")
    return timed
