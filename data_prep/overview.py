"""What a shard folder holds, for people: a summary in words and a contact sheet of its pictures."""

import io

import numpy as np
from PIL import Image, ImageDraw

from data_prep.errors import BadInput
from data_prep.manifest import from_json_list
from data_prep.pictures import raw_pixels
from data_prep.shards import ShardFolder, ShardSplit


def summary(folder: ShardFolder) -> str:
    """What a shard folder holds, as text for a terminal."""
    manifest = folder.manifest
    lines = [
        f"{manifest.name}{'  (SIMULATED: no brain was recorded)' if manifest.simulated else ''}  in {folder.folder}"
    ]
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards) / 1e6
        responses = "with responses" if split.responses else "without responses"
        lines.append(f"  {name:<6} {split.stimuli:>6,} stimuli {responses}, {len(split.shards)} shards, {size:,.1f} MB")
    image = manifest.image
    size = f"{image.width} x {image.height} px {image.mode}"
    lines.append(f"  images {'up to ' if image.mixed else ''}{size}")
    regions = sorted({str(site["region"]) for site in manifest.sites if "region" in site})
    lines.append(f"  sites  {len(manifest.sites)}{' in ' + ', '.join(regions) if regions else ''}")
    if manifest.sites:
        lines.append(_rates_line(folder))
    if manifest.classes:
        shown = ", ".join(manifest.classes[:6]) + (", ..." if len(manifest.classes) > 6 else "")
        lines.append(f"  objects {len(manifest.classes)}: {shown}")
    if manifest.ceiling:
        rho = from_json_list(manifest.ceiling.reliability)
        lines.append(
            f"  reliability of the trial average (split-half, Spearman-Brown): median {np.nanmedian(rho):.3f}, "
            f"mean {np.nanmean(rho):.3f} over {manifest.ceiling.stimuli:,} stimuli "
            f"with {manifest.ceiling.repetitions['mean']:.1f} repetitions on average"
        )
    lines += [f"  warning: {text}" for text in manifest.provenance.get("warnings", [])]
    return "\n".join(lines)


def _rates_line(folder: ShardFolder) -> str:
    rates, window = folder.manifest.rates, folder.manifest.response_window_ms
    mean = from_json_list(rates.mean)
    when = f", {window[0]:g}-{window[1]:g} ms after onset" if window else ""
    return f"  rates  {np.nanmin(mean):.3g} to {np.nanmax(mean):.3g} on average per site ({rates.units}{when})"


def contact_sheet(split: ShardSplit, columns: int = 8, rows: int = 6, tile: int = 112) -> Image.Image:
    """Evenly spaced pictures of a split, each with its object's name.

    Args:
        split: to take pictures from.
        columns, rows: of the sheet.
        tile: pixels of one picture's side.
    """
    positions = np.unique(np.linspace(0, len(split) - 1, columns * rows).astype(int))
    sheet = Image.new("RGB", (columns * tile, -(-len(positions) // columns) * (tile + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, position in enumerate(positions):
        x, y = place % columns * tile, place // columns * (tile + 14)
        try:
            data, encoding = split.image(position)
            raw = encoding == "image.npy"
            picture = Image.fromarray(raw_pixels(data)) if raw else Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise BadInput(f"{split.place(position)}: the picture cannot be decoded ({error})") from None
        sheet.paste(picture.resize((tile - 2, tile - 2)), (x, y))
        draw.text((x + 2, y + tile), split.label(position) or split.stimulus_ids[position], fill="black")
    return sheet
