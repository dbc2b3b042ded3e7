"""Several packed recordings of different sites as one."""

from pathlib import Path

import numpy as np
import pytest
from helpers import assert_refused, run_here, succeed_here
from make_sources import make_folder, write_csv

from data_prep.common.errors import BadInput
from data_prep.shards.folder import ShardFolder
from data_prep.shards.packing import pack
from data_prep.sources.folder import Folder
from data_prep.sources.joined import Joined

N = 30


def make_part(path: Path, rows: slice, sites: int, site_ids: list[str] | None = None, **options):
    """Pack the stimuli in `rows` of a set of 30; returns their content and the shard folder."""
    source = path / "source"
    written = make_folder(source, n=N, splits=True, sites=sites, seed=0, **options)
    keep = range(N)[rows]
    table = {
        "stimulus_id": [written.ids[k] for k in keep],
        "image": [f"images/{written.ids[k]}.png" for k in keep],
        "object": [written.objects[k] for k in keep],
        "split": [written.splits[k] for k in keep],
        f"from_{path.name}": [path.name] * len(keep),
    }
    write_csv(source / "stimuli.csv", table)
    for name in ("rates", "trials"):
        if (source / f"{name}.npy").exists():
            np.save(source / f"{name}.npy", np.load(source / f"{name}.npy")[rows])
    if site_ids:
        write_csv(source / "sites.csv", {"id": site_ids, "region": ["V4"] * sites})
    recording = Folder(source=source, name=path.name, window_ms=(70, 170)).open()
    return written, pack(recording, path / "shards", 8, 1).folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A: stimuli 0-19, 3 sites, trials. B: stimuli 10-29, 4 sites with a region, rates only."""
    path = tmp_path_factory.mktemp("parts")
    a, folder_a = make_part(path / "a", slice(0, 20), 3, rates=None, trials=3)
    b, folder_b = make_part(path / "b", slice(10, 30), 4, [f"site_{k:03d}" for k in range(1, 5)])
    return a, folder_a, b, folder_b


def test_sites_are_put_side_by_side_and_stimuli_matched(parts, tmp_path):
    a, folder_a, b, folder_b = parts
    out = tmp_path / "joined"
    names = ["--subjects", "Ann", "Bob", "--regions", "IT", "V4"]
    succeed_here("data_prep/pack.py", "joined", folder_a, folder_b, "--out", out, "--workers", 1, *names)
    folder = ShardFolder(out)
    assert [site["id"] for site in folder.manifest.sites] == [
        *(f"a_site_{k:03d}" for k in range(3)),
        *(f"b_site_{k:03d}" for k in range(1, 5)),
    ]
    assert folder.manifest.sites[0] == {"id": "a_site_000", "recording": "a", "subject": "Ann", "region": "IT"}
    assert folder.manifest.response_window_ms == (70, 170)
    seen = {}
    for name in folder.manifest.splits:
        split = folder.split(name)
        for position, stimulus in enumerate(split.stimulus_ids):
            k = a.ids.index(stimulus)
            assert a.splits[k] == name
            seen[k] = split.array(position, "rates.npy")
            trials = split.array(position, "trials.npy")
            assert (trials is None) == (k >= 20)
            if trials is not None:
                np.testing.assert_array_equal(trials[:, :3], a.trials[k])
                assert np.isnan(trials[:, 3:]).all()
            facts = split.meta(position)
            assert facts["object"] == a.objects[k]
            assert ("from_a" in facts, "from_b" in facts) == (k < 20, k >= 10)
    assert sorted(seen) == list(range(N))
    expected = np.full((N, 7), np.nan, np.float32)
    expected[:20, :3], expected[10:, 3:] = a.rates[:20], b.rates[10:]
    np.testing.assert_allclose(np.stack([seen[k] for k in range(N)]), expected, rtol=1e-6)
    shown = [recording["name"] for recording in folder.manifest.provenance["recordings"]]
    assert shown == ["a", "b"]


def test_sites_with_names_of_their_own_keep_them_and_can_be_selected(parts, tmp_path):
    _, folder_a, _, _ = parts
    _, folder_c = make_part(tmp_path / "c", slice(0, 5), 2, ["c1", "c2"])
    recording = Joined(source=(folder_a, folder_c)).open()
    assert [site["id"] for site in recording.sites] == [*(f"site_{k:03d}" for k in range(3)), "c1", "c2"]
    recording = Joined(source=(folder_a, folder_c), region=("V4",)).open()
    assert [site["id"] for site in recording.sites] == ["c1", "c2"]
    assert all(stimulus.rates.shape == (2,) for stimulus in recording.read(range(len(recording.stimulus_ids))))
    with pytest.raises(BadInput, match=r"region 'V1' \(--region\); the sites have: V4"):
        Joined(source=(folder_a, folder_c), region=("V1",)).open()


def test_splits_that_contradict_each_other_need_new_ones(parts, tmp_path):
    _, folder_a, _, _ = parts
    source = tmp_path / "other"
    make_folder(source, n=N)
    other = pack(Folder(source=source).open(), tmp_path / "shards", 50, 1).folder
    with pytest.raises(BadInput, match=r"stimulus 'stim\d+' is in different splits .*--new-split"):
        Joined(source=(folder_a, other)).open()
    recording = Joined(source=(folder_a, other), new_split=True, val_fraction=0.2, test_fraction=0).open()
    assert recording.splits.count("val") == 6
    assert len(list(recording.read(range(N)))) == N
    with pytest.raises(BadInput, match="--val-fraction would be ignored"):
        Joined(source=(folder_a, folder_a), val_fraction=0.2).open()


def test_one_id_with_two_images_is_refused_and_nothing_is_left(parts, tmp_path):
    _, folder_a, _, _ = parts
    source = tmp_path / "other"
    written = make_folder(source, n=N, splits=True)
    image, another_image = (source / "images" / f"{written.ids[row]}.png" for row in (4, 5))
    image.write_bytes(another_image.read_bytes())
    other = pack(Folder(source=source).open(), tmp_path / "shards", 50, 1).folder
    out = tmp_path / "joined"
    refused = run_here("data_prep/pack.py", "joined", folder_a, other, "--out", out, "--workers", 1)
    assert_refused(refused, "stim0004", "different images", other, folder_a)
    assert not list(tmp_path.glob("*joined*"))


def test_objects_must_agree_and_one_folder_is_not_enough(parts, tmp_path):
    _, folder_a, _, _ = parts
    with pytest.raises(BadInput, match="at least two shard folders"):
        Joined(source=(folder_a,)).open()
    with pytest.raises(BadInput, match="--subjects: 1 names for 2 folders"):
        Joined(source=(folder_a, folder_a), subjects=("Ann",)).open()
    source = tmp_path / "other"
    make_folder(source, n=N, splits=True, n_objects=1)
    other = pack(Folder(source=source).open(), tmp_path / "shards", 50, 1).folder
    with pytest.raises(BadInput, match=r"shows .* or .*different objects"):
        Joined(source=(folder_a, other)).open()


def test_the_same_recording_twice_keeps_its_sites_apart(parts):
    _, folder_a, _, _ = parts
    recording = Joined(source=(folder_a, folder_a)).open()
    assert [site["id"] for site in recording.sites] == [f"a-{r}_site_{k:03d}" for r in (1, 2) for k in range(3)]
