"""Images as the subject saw them: one rule for EXIF, depth, transparency, colour and frames, whatever the format."""

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_refused, run_here, succeed_here
from hostile import reindexed, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from make_sources import encode, make_folder, make_images
from PIL import Image

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import decode
from data_prep.recording import OTHER_FORMAT
from data_prep.shards.folder import ShardFolder
from data_prep.shards.image_rules import ImageRules
from data_prep.shards.packing import pack
from data_prep.shards.shown_images import COMPOSITED, FROM_CMYK, NOT_TURNED, TURNED, as_shown
from data_prep.sources.folder import Folder

IMAGE = make_images(1, size=24)[0][0][:, :16]  # neither symmetric nor square
LOSSLESS = {"TIFF": {}, "PNG": {}, "WEBP": {"lossless": True}}
APPLY, IGNORE = ImageRules(), ImageRules(exif="ignore")

# What a viewer shows for each EXIF orientation, from the definition: where row 0 and column 0 of the stored pixels lie.
SEEN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def saved(image: Image.Image, kind: str, orientation: int | None = None, **options) -> bytes:
    file = io.BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    image.save(file, kind, **options)
    return file.getvalue()


def deep_png(colour: int, channels: int) -> bytes:
    """A PNG with 16 bits a channel, which Pillow cannot write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(2 * channels * 8) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(samples: int) -> bytes:
    """A TIFF with 16 bits a channel."""
    depths = struct.pack(f"<{samples}H", *[16] * samples)
    entries = 9
    place = 8 + 2 + 12 * entries + 4
    pixels = bytes(8 * 8 * samples * 2)
    tags = {256: 8, 257: 8, 258: place if samples > 2 else 16, 259: 1, 262: 2 if samples == 3 else 1}
    tags |= {273: place + len(depths), 277: samples, 278: 8, 279: len(pixels)}
    table = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, samples if tag == 258 else 1, value)
        for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<IH", 8, entries) + table + bytes(4) + depths + pixels


# ---- EXIF orientation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("orientation", SEEN)
def test_every_orientation_of_every_format_is_seen_as_viewers_show_it(kind, orientation):
    data = saved(Image.fromarray(IMAGE), kind, orientation, **LOSSLESS[kind])
    shown, stored = as_shown(data, OTHER_FORMAT, APPLY), as_shown(data, OTHER_FORMAT, IGNORE)
    assert np.array_equal(shown.pixels, SEEN[orientation](IMAGE))
    assert np.array_equal(stored.pixels, IMAGE)
    assert (shown.notes, stored.notes) == (((), ()) if orientation == 1 else ((TURNED,), (NOT_TURNED,)))
    assert (shown.width, shown.height) == SEEN[orientation](IMAGE).shape[1::-1]
    for image in (shown, stored):
        assert np.array_equal(decode(image.data, image.encoding), image.pixels)
    if orientation != 1:  # whoever applies EXIF to what is in the shard must not turn it again
        assert Image.open(io.BytesIO(shown.data)).getexif() == {}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_decoded_as_the_loader_does_and_turned(orientation, mode):
    data = saved(Image.fromarray(IMAGE).convert(mode), "JPEG", orientation)
    shown, stored = as_shown(data, "jpg", APPLY), as_shown(data, "jpg", IGNORE)
    assert np.array_equal(shown.pixels, SEEN[orientation](decode(data, "jpg")))
    assert (stored.data, stored.encoding) == (data, "jpg")
    assert np.array_equal(stored.pixels, decode(data, "jpg"))
    assert (shown.encoding, shown.converted_from) == (("jpg", None) if orientation == 1 else ("png", "jpeg"))


def test_exif_data_that_cannot_be_read_leave_an_image_as_it_is():
    data = saved(Image.fromarray(IMAGE), "JPEG", 6)
    start = data.index(b"Exif\0\0") + 6
    broken = data[:start] + bytes(8) + data[start + 8 :]
    assert as_shown(broken, "jpg", APPLY).data == broken


# ---- depth, colour, transparency, frames ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        *(deep_png(colour, channels) for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4))),
        *(deep_tiff(samples) for samples in (1, 3)),
        b"P5 8 8 65535\n" + bytes(128),
        b"P6\n# as a camera writes it\n8 8\n1023\n" + bytes(384),
    ],
)
def test_more_than_8_bits_are_refused_in_grey_and_in_colour(data):
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        as_shown(data, OTHER_FORMAT, APPLY)


def test_the_loader_refuses_16_bits_too():
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        decode(deep_png(2, 3), "png")


backgrounds = st.sampled_from([("grey", 128), ("black", 0), ("white", 255), ("#0a141e", (10, 20, 30))])


@settings(max_examples=30)
@given(st.integers(0, 2**32), backgrounds, st.sampled_from(["PNG", "TIFF", "WEBP"]), st.booleans())
def test_transparent_parts_show_the_background(seed, background, kind, binary):
    """Against the definition of compositing; hidden colours have no influence where nothing of them is seen."""
    name, colour = background
    random = np.random.default_rng(seed)
    rgba = random.integers(0, 256, (8, 6, 4), dtype=np.uint8)
    rgba[0, 0, 3] = 0
    if binary:
        rgba[..., 3] = random.integers(0, 2, (8, 6)) * 255
        rgba[0, 0, 3] = 0
    options = {"WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    shown = as_shown(saved(Image.fromarray(rgba), kind, **options), OTHER_FORMAT, ImageRules(background=name))
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * np.broadcast_to(colour, (8, 6, 3))
    assert np.abs(shown.pixels - expected).max() <= 1  # Pillow composites in integers
    assert (shown.pixels[rgba[..., 3] == 0] == np.broadcast_to(colour, 3)).all()
    assert (shown.notes, shown.encoding, shown.mode) == ((COMPOSITED,), "png", "RGB")


def test_the_transparent_colour_of_a_palette_and_of_a_png_without_alpha_show_the_background():
    palette = Image.fromarray(IMAGE).quantize(8)
    transparent = palette.getpixel((0, 0))
    hidden = np.asarray(palette) == transparent
    for data in (saved(palette, "PNG", transparency=transparent), saved(palette, "GIF", transparency=transparent)):
        shown = as_shown(data, OTHER_FORMAT, ImageRules(background="white"))
        assert (shown.pixels[hidden] == 255).all()
        assert np.array_equal(shown.pixels[~hidden], np.asarray(palette.convert("RGB"))[~hidden])
        assert shown.notes == (COMPOSITED,)
    flat = np.full((8, 8, 3), 7, np.uint8)
    flat[2:4] = 200
    shown = as_shown(saved(Image.fromarray(flat), "PNG", transparency=(7, 7, 7)), "png", APPLY)
    assert (shown.pixels[flat[..., 0] == 7] == 128).all()
    assert (shown.pixels[flat[..., 0] == 200] == 200).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_channel_changes_nothing(mode):
    data = saved(Image.fromarray(IMAGE).convert(mode), "PNG")
    shown = as_shown(data, "png", APPLY)
    assert (shown.data, shown.notes) == (data, ())


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb_in_every_format(kind):
    image = Image.fromarray(IMAGE).convert("CMYK")
    shown = as_shown(saved(image, kind), OTHER_FORMAT, APPLY)
    assert (shown.notes, shown.encoding, shown.mode) == ((FROM_CMYK,), "png", "RGB")
    assert np.abs(shown.pixels.astype(int) - IMAGE).mean() < 10


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="it has 3 frames or pages"):
        as_shown(data, OTHER_FORMAT, APPLY)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_cut_in_its_data_that_ends_as_one_should_is_refused(mode):
    whole = saved(Image.fromarray(np.tile(IMAGE, (4, 4, 1))).convert(mode), "JPEG", quality=95)
    cut = whole[: len(whole) * 2 // 3] + b"\xff\xd9"
    for read in (lambda: as_shown(cut, "jpg", APPLY), lambda: decode(cut, "jpg")):
        with pytest.raises(ValueError, match="premature end"):
            read()


@pytest.mark.parametrize("kind", ["jpg", "png", "gif"])
def test_an_ordinary_image_keeps_its_bytes_or_its_pixels(kind):
    image = np.asarray(Image.fromarray(IMAGE).quantize(16).convert("RGB"))
    data = encode(image, kind)
    shown = as_shown(data, OTHER_FORMAT, APPLY)
    assert shown.notes == ()
    if kind == "gif":
        assert (shown.encoding, shown.converted_from) == ("png", "gif")
        assert np.array_equal(shown.pixels, image)
    else:
        assert (shown.data, shown.encoding) == (data, kind)


@pytest.mark.parametrize("colour", ["gray50", "#12345", "#1234567", "12,3,4", ""])
def test_another_colour_is_refused_with_an_example(colour):
    with pytest.raises(BadInput, match="must be black, grey, white or #rrggbb"):
        ImageRules(background=colour)


# ---- packing and verifying -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Twelve images: two with an orientation, one with transparent parts, one in CMYK."""
    path = tmp_path_factory.mktemp("shown") / "src"
    written = make_folder(path, n=12, size=24)
    odd = [
        saved(Image.fromarray(written.images[0]), "JPEG", 6),
        saved(Image.fromarray(written.images[1]), "PNG", 3),
        saved(Image.fromarray(np.dstack([written.images[2], np.zeros((24, 24), np.uint8)])), "PNG"),
        saved(Image.fromarray(written.images[3]).convert("CMYK"), "JPEG"),
    ]
    for number, data in enumerate(odd):
        (path / "images" / f"{written.ids[number]}.png").write_bytes(data)
    return path


@pytest.mark.parametrize("options", [[], ["--exif", "ignore", "--background", "#010203"]])
def test_the_summary_says_what_was_done(source, tmp_path, options):
    words = ["folder", source, "--out", tmp_path / "out", "--workers", 1, *options]
    for text in (
        succeed_here("data_prep/pack.py", *words).stdout,
        succeed_here("data_prep/show.py", tmp_path / "out").stdout,
    ):
        assert ("2 of them turned as their EXIF orientation says (--exif ignore" in text) == (not options)
        assert ("2 of them left as they are stored" in text) == bool(options)
        assert f"1 of them with transparent parts, put on {'#010203' if options else 'grey'}" in text
        assert "1 of them turned from CMYK" in text
    folder = ShardFolder(tmp_path / "out")
    for split in map(folder.split, folder.manifest.splits):
        for position, stimulus in enumerate(split.stimulus_ids):
            data, encoding = split.image(position)
            if stimulus == "stim0002":
                assert (decode(data, encoding) == ((1, 2, 3) if options else 128)).all()
            if stimulus == "stim0000":
                assert encoding == ("jpg" if options else "png")


def test_a_wrong_colour_on_the_command_line_is_refused_in_a_sentence(source, tmp_path):
    result = run_here("data_prep/pack.py", "folder", source, "--out", tmp_path / "out", "--background", "gray50")
    assert_refused(result, "--background", "must be black, grey, white or #rrggbb")


def cut_in_mid_data(path: Path) -> bytes:
    whole = encode(np.tile(make_images(1, size=24)[0][0], (4, 4, 1)), "jpg")
    cut = whole[: len(whole) * 2 // 3] + b"\xff\xd9"
    path.write_bytes(cut)
    return cut


def test_pack_and_verify_notice_a_jpeg_cut_in_its_data(source, tmp_path):
    shutil.copytree(source, tmp_path / "src")
    cut = cut_in_mid_data(tmp_path / "src" / "images" / "stim0005.png")
    words = ["folder", tmp_path / "src", "--out", tmp_path / "out", "--workers", 1]
    assert_refused(run_here("data_prep/pack.py", *words), "stim0005.png", "premature end of data segment")
    assert not (tmp_path / "out").exists()
    text = succeed_here("data_prep/pack.py", *words, "--no-decode").stdout
    assert "not decoded: damaged images, and copies in other files, were not noticed" in text
    assert_refused(run_here("data_prep/show.py", tmp_path / "out", "--verify"), "1 of")
    assert cut


def test_verify_decodes_every_image(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    png = bytearray(encode(make_images(1, size=24)[0][0], "png"))
    png[60] ^= 0xFF
    folder = reindexed(rewritten(tmp_path / "copy", "png", bytes(png)))
    result = run_here("data_prep/show.py", folder, "--verify")
    assert_refused(result, "1 of")
    assert "train-000000.tar: the image of stim" in result.stderr
    assert "cannot be decoded" in result.stderr


def test_a_folder_without_the_record_still_opens(source, tmp_path):
    folder = pack(Folder(source=source).open(), tmp_path / "out", 50, 1)
    manifest = folder.manifest
    del manifest.provenance["images"], manifest.provenance["copies"]
    manifest.save(tmp_path / "out" / "manifest.json")
    assert "of them" not in succeed_here("data_prep/show.py", tmp_path / "out").stdout
