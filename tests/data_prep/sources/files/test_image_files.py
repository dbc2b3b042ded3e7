"""Images in folders and zip archives."""

import zipfile

import numpy as np
import pytest
from make_field_files import write_images

from data_prep.common.errors import BadInput
from data_prep.sources.files.image_files import ImageFiles


def test_images_are_found_by_path_name_or_stem(tmp_path):
    image = np.zeros((2, 4, 4, 3), np.uint8)
    write_images(tmp_path / "p", ["a/one.png", "b/two.jpg"], image)
    write_images(tmp_path / "p", ["a/same.png", "b/same.png"], image)
    (tmp_path / "secret.png").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in (tmp_path / "p").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path / "p"))
    for files in (ImageFiles(tmp_path / "p"), ImageFiles(tmp_path / "p.zip")):
        assert files.find(["a/one.png"]) == "a/one.png"
        assert files.find(["elsewhere\\one.png"]) == "a/one.png"
        assert files.find(["", "two"]) == "b/two.jpg"
        assert files.find(["a/same.png"]) == "a/same.png"
        assert files.find(["same.png"]) is None
        assert files.find(["../secret.png"]) is None
        assert files.find([str(tmp_path / "secret.png")]) is None


def test_a_locked_archive_is_refused(tmp_path):
    write_images(tmp_path / "p.zip", ["one.png"], np.zeros((1, 4, 4, 3), np.uint8))
    data = bytearray((tmp_path / "p.zip").read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 8] |= 1
    (tmp_path / "p.zip").write_bytes(data)
    with ImageFiles(tmp_path / "p.zip").reading() as load, pytest.raises(BadInput, match=r"one\.png.*password"):
        load("one.png")


@pytest.mark.parametrize("as_archive", [False, True])
def test_only_spellings_of_the_same_path_are_found_and_only_if_unique(tmp_path, as_archive):
    names = ("a/café.JPG", "a/b.png", "a/B.png", "two/x.PNG", "two/x.png")
    folder = tmp_path / "images"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if as_archive:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"")
    files = ImageFiles(tmp_path / "images.zip" if as_archive else folder)
    for spelled in ("a/café.jpg", "a\\café.JPG", "./a/café.Jpg", "a/cafe\u0301.jpg"):
        assert files.find_path(spelled) == "a/café.JPG"
    assert [files.find_path(name) for name in names] == list(names)
    for other in ("A/café.jpg", "a/cafe.jpg", "a/café.jpeg", "café.jpg", "two/x.Png", "..\\images\\a\\b.png"):
        assert files.find_path(other) is None
