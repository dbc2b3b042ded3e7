"""Reports on a shard folder: a summary, a verification, a contact sheet of its images."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_prep.common.atomic_writes import write_bytes
from data_prep.common.errors import BadInput, CannotWrite
from data_prep.common.image_decoding import rgb_image
from data_prep.common.progress import Progress
from data_prep.common.terminal import bold, histogram, printable
from data_prep.shards.copies import copy_lines, copy_warnings
from data_prep.shards.folder import ShardFolder, ShardSplit
from data_prep.shards.manifest import Ceiling, Manifest, from_json_list
from data_prep.shards.shown_images import COMPOSITED, FROM_CMYK, NOT_TURNED, TURNED

MOST_NAMED = 6  # sites in a warning


def summary(folder: ShardFolder) -> str:
    """A summary of a shard folder, as text for a terminal."""
    manifest = folder.manifest
    simulated = "  (SIMULATED: no brain was recorded)" if manifest.simulated else ""
    lines = []
    for name, split in manifest.splits.items():
        megabytes = sum(shard.bytes for shard in split.shards) / 1e6
        responses = _responses(folder, name)
        lines.append(
            f"  {name:<6} {split.stimuli:>6,} stimuli {responses}, {len(split.shards)} shards, {megabytes:,.1f} MB"
        )
    lines.append(_split_line(manifest))
    image = manifest.image
    largest = "up to " if image.mixed else ""
    lines.append(f"  images {largest}{image.width} x {image.height} px {image.mode}")
    lines += _image_lines(manifest.provenance.get("images") or {})
    regions = sorted({str(site["region"]) for site in manifest.sites if "region" in site})
    location = f" in {', '.join(regions)}" if regions else ""
    lines.append(f"  sites  {len(manifest.sites)}{location}")
    if manifest.sites:
        lines.append(_rates_line(folder))
    if manifest.classes:
        more = ", ..." if len(manifest.classes) > 6 else ""
        lines.append(f"  objects {len(manifest.classes)}: {', '.join(manifest.classes[:6])}{more}")
    if manifest.ceiling:
        lines += _ceiling_lines(manifest.ceiling)
    copies = manifest.provenance.get("copies")
    lines += copy_lines(copies) if copies else []
    warnings = [*manifest.provenance.get("warnings", []), *_shared_groups(manifest), *_sites_without_score(manifest)]
    warnings += copy_warnings(copies) if copies else []
    lines += [f"  warning: {text}" for text in warnings]
    title = f"{bold(printable(manifest.name))}{simulated}  in {printable(str(folder.folder))}"
    return "\n".join([title, *map(printable, lines)])  # a name from a file must not control the terminal


def _responses(folder: ShardFolder, name: str) -> str:
    """Whether the stimuli of a split have responses, and how many have none to any site."""
    split = folder.split(name)
    if not split.has_responses:
        return "without responses"
    try:
        silent = [] if split.is_remote else np.flatnonzero(np.isnan(split.rates()).all(axis=1)).tolist()
    except BadInput:  # damaged, which --verify reports in full
        return "with responses"
    if not silent:
        return "with responses"
    return f"with responses ({len(silent):,} without any, e.g. {split.stimulus_ids[silent[0]]})"


def _sites_without_score(manifest: Manifest) -> Iterator[str]:
    """A warning about sites that no model can be fitted to."""
    without = np.flatnonzero(~manifest.rates.fitted_sites())
    if len(without):
        names = ", ".join(manifest.site_ids[site] for site in without[:MOST_NAMED])
        more = ", ..." if len(without) > MOST_NAMED else ""
        yield (
            f"{len(without)} of {len(manifest.sites)} sites have no score, because their responses in train are "
            f"constant or missing: {names}{more}"
        )


def _image_lines(facts: dict[str, Any]) -> Iterator[str]:
    """What was done with images when they were packed."""
    background = facts.get("background")
    meaning = {
        TURNED: "turned as their EXIF orientation says (--exif ignore leaves them as they are stored)",
        NOT_TURNED: "left as they are stored, although their EXIF orientation says otherwise (--exif apply turns them)",
        COMPOSITED: f"with transparent parts, put on {background} (--background chooses another colour)",
        FROM_CMYK: "turned from CMYK into RGB without a colour profile",
    }
    for note, text in meaning.items():
        if facts.get(note):
            yield f"    {facts[note]:,} of them {text}"
    if facts.get("decode") is False:
        yield "    not decoded: damaged images, and copies in other files, were not noticed"


def _split_line(manifest: Manifest) -> str:
    """How the stimuli were split, e.g. "grouped, split_by object, split_seed 0"."""
    rule = manifest.provenance.get("split", "unknown")
    if isinstance(rule, dict):
        settings = (f"{name} {value}" for name, value in rule.items() if name != "method" and value is not None)
        rule = ", ".join([str(rule.get("method", "random")), *settings])
    return f"  split  {rule}"


def _shared_groups(manifest: Manifest) -> Iterator[str]:
    """Warnings about groups of stimuli that are both in train and held out."""
    for fact, counts in manifest.provenance.get("straddling", {}).items():
        count = f"{counts['groups']} of {counts['of']} values of {fact!r} are both in train and held out"
        if fact == manifest.group_by:
            yield f"{count}, although the stimuli were split by it: scores do not hold for a new {fact}"
        else:
            yield (
                f"{count}: scores hold for new images of these, not for a new {fact} "
                f"(for that, pack with --split grouped --split-by {fact})"
            )


def _ceiling_lines(ceiling: Ceiling) -> list[str]:
    """Reliability with its interval and method, and the other estimates from trials."""
    rho = from_json_list(ceiling.reliability)
    if np.isnan(rho).all():
        return [f"  ceiling  none: no site has enough repetitions and variance ({ceiling.method})"]
    interval = "" if ceiling.mean_ci95 is None else " [{:.3f}, {:.3f}]".format(*ceiling.mean_ci95)
    lines = [
        f"  reliability of the trial average: median {np.nanmedian(rho):.3f}, mean {np.nanmean(rho):.3f}{interval} "
        f"over {ceiling.stimuli:,} stimuli with {ceiling.repetitions['mean']:.1f} repetitions on average",
        f"    ({ceiling.method})",
        f"    sites by reliability: 0 {histogram(rho[np.isfinite(rho)], 0, 1)} 1",
    ]
    others = {
        "split-half (Spearman-Brown)": ceiling.split_half,
        "ncsnr": ceiling.ncsnr,
        "noise ceiling": ceiling.noise_ceiling,
        "explainable share of single trials": ceiling.explainable_share,
    }
    medians = [
        f"{name} {np.nanmedian(from_json_list(values)):.3f}"
        for name, values in others.items()
        if values and any(values)
    ]
    if medians:
        lines.append(f"    medians over sites: {', '.join(medians)}")
    return lines


def _rates_line(folder: ShardFolder) -> str:
    rates, window = folder.manifest.rates, folder.manifest.response_window_ms
    mean = from_json_list(rates.mean)
    when = f", {window[0]:g}-{window[1]:g} ms after onset" if window else ""
    return f"  rates  {np.nanmin(mean):.3g} to {np.nanmax(mean):.3g} on average per site ({rates.units}{when})"


def contact_sheet(
    split: ShardSplit, columns: int = 8, rows: int = 6, tile: int = 112, among: np.ndarray | None = None
) -> Image.Image:
    """Evenly spaced images of a split, each with its object's name.

    Args:
        split: of the images.
        columns, rows: of the sheet.
        tile: pixels of one image's side.
        among: positions to choose from; by default all.
    """
    among = np.arange(len(split)) if among is None else among
    positions = among[np.unique(np.linspace(0, len(among) - 1, columns * rows).astype(int))]
    sheet = Image.new("RGB", (columns * tile, -(-len(positions) // columns) * (tile + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, position in enumerate(positions.tolist()):
        x, y = number % columns * tile, number // columns * (tile + 14)
        data, encoding = split.image(position)
        try:
            image = rgb_image(data, encoding)
        except ValueError as error:
            raise BadInput(f"{split.location(position)}.{encoding} cannot be decoded ({error})") from None
        sheet.paste(image.resize((tile - 2, tile - 2)), (x, y))
        draw.text((x + 2, y + tile), split.label(position) or split.stimulus_ids[position], fill="black")
    return sheet


def write_contact_sheet(shards: ShardFolder, path: Path) -> None:
    """Write a contact sheet of the first split as PNG; for a remote folder, of its first shard.

    Raises:
        BadInput: it cannot be written, or an image cannot be decoded.
    """
    name = next(iter(shards.manifest.splits))
    split, shown = shards.split(name), f"the {name} split"
    positions = np.arange(len(split))
    if shards.is_remote:  # evenly spaced images would need every shard
        positions, shown = positions[split.shards_of(positions) == 0], split.shards[0].file
    if not path.parent.is_dir():
        raise BadInput(f"{path} cannot be written (its folder does not exist); choose another --contact-sheet")
    content = io.BytesIO()
    contact_sheet(split, among=positions).save(content, format="PNG")
    try:
        write_bytes(path, content.getvalue())
    except CannotWrite as error:
        raise BadInput(f"{error}; choose another --contact-sheet") from None
    print(f"  contact sheet of {shown}: {path}")


def print_verification(shards: ShardFolder) -> None:
    """Verify every shard, and print what is damaged.

    Raises:
        BadInput: any is damaged.
    """
    count = sum(len(split.shards) for split in shards.manifest.splits.values())
    faults = []
    with Progress(count, "verifying", "shards") as progress:
        for shard, fault in shards.verify():
            progress.advance()
            if fault:
                faults.append(f"damaged: {shards.folder / shard.file}: {fault}")
    for line in faults:
        print(line, file=sys.stderr)
    if faults:
        raise BadInput(f"{len(faults)} of {count} shards of {shards.folder} are damaged; copy or pack them again")
    print(f"verified: all {count} shards are as they were packed")
