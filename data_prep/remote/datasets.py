"""Public recordings that data_prep/fetch.py downloads: their files, citations and licences, and how to pack them.

When a file moves, only this table has to change. Its facts are from the sites named in it.
"""

from dataclasses import dataclass
from typing import Literal

_BRAIN_SCORE = "https://brainscore-storage.s3.amazonaws.com/brainio-brainscore/"
_TVSD = "https://gin.g-node.org/paolo_papale/TVSD/raw/master/"
_DRIVE = "https://drive.google.com/uc?export=download&id="
_COWLEY = (
    "https://raw.githubusercontent.com/cowleygroup/V4_compact_models/f4552ad9d34a466ebc66658f72a08a8e5038f1cf/"
    "data_V4_responses/"
)
_COWLEY_NAMES = {
    "210325": "v4_hvm640",
    "210224": "v4_natural800",
    "190925": "v4_we_190925",
    "190927": "v4_we_190927",
    "190928": "v4_we_190928",
    "190929": "v4_we_190929",
    "210305": "v4_pe_210305",
    "210322": "v4_pe_210322",
    "210621": "v4_ra_210621",
}


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        url: of the file.
        path: relative to --out, and to the URL of a mirror.
        sha1: of its content, in hexadecimal digits; None if its publisher states none.
    """

    url: str
    path: str
    sha1: str | None = None


@dataclass(frozen=True)
class Dataset:
    """A public recording.

    Attributes:
        title: one-line description.
        citation: what to cite.
        licence: the terms of use.
        files: to download.
        pack: {name of a packed recording: the arguments of data_prep/pack.py that pack it}; {folder} stands for the
            download folder.
        note: anything else to know or to fetch.
    """

    title: str
    citation: str
    licence: str
    files: tuple[RemoteFile, ...]
    pack: dict[str, str]
    note: str = ""


def _brain_score(**sha1_of: str) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(_BRAIN_SCORE + name, name, sha1) for name, sha1 in sha1_of.items())


def _cowley(**sha1_of: str) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(_COWLEY + path, path, sha1) for path, sha1 in sha1_of.items())


DatasetName = Literal["cowley2023", "majaj2015", "freemanziemba2013", "tvsd", "it-course"]

DATASETS: dict[DatasetName, Dataset] = {
    "cowley2023": Dataset(
        title="Cowley et al. 2023: macaque V4, nine sessions of three animals, photographs, HvM and other images",
        citation="Cowley, Stan, Pillow & Smith 2023, Compact deep neural network models of visual cortex, bioRxiv; "
        "for the HvM images of session 210325 also Majaj, Hong, Solomon & DiCarlo 2015, "
        "doi:10.1523/JNEUROSCI.5181-14.2015",
        licence="GPL-3.0, that of the repository https://github.com/cowleygroup/V4_compact_models",
        files=_cowley(
            **{
                "images/images_210325.zip": "b224477c84cce5f3da0814640a16e822f308aa05",
                "responses_repeat_averaged/responses_210325.npy": "0d2c16de603d4885176ac18b004b04f51d9f5baa",
                "responses_raw/responses_210325.npy": "203ed7b052f4745dd93a403a7227a079e2a90f7b",
                "images/images_210224.zip": "4f2b2893bdd470afb78e0e7c8b6777264481f2e8",
                "responses_repeat_averaged/responses_210224.npy": "a045529c39ee33c68ebf71ea24ccf594de0c7a62",
                "images/images_190925.zip": "40e04718396033bd9265a855761fa1d17db83566",
                "responses_repeat_averaged/responses_190925.npy": "1df3249ae8b4c7d71c73bfd70466981606e12371",
                "images/images_190927.zip": "69398d3ad9b0f4ece3c4828b00d0119719fbe9d4",
                "responses_repeat_averaged/responses_190927.npy": "16fc61b37107e3fd5c3bd6f836b06b4db04e0653",
                "images/images_190928.zip": "f72e92bb49b25e2d3e852498512dd7f1d3091268",
                "responses_repeat_averaged/responses_190928.npy": "876c0c2d49888727c924d5499008c3c4e17f97b6",
                "images/images_190929.zip": "8959757a5f29136f756a0c749ce0b5f4c5d4093c",
                "responses_repeat_averaged/responses_190929.npy": "e198b752c00af911a1588bc0da47e1eb482eef80",
                "images/images_210305.zip": "17787bf9e41ed559facb05b74751d78ca42f0d49",
                "responses_repeat_averaged/responses_210305.npy": "1a91d002bf9c0496ce287d833f67dad0c2f491b4",
                "images/images_210322.zip": "46878efff52bdb9f0d92f6e94c432c33587109d7",
                "responses_repeat_averaged/responses_210322.npy": "47107777b2c07408e2d6cca8aee2557e103263ff",
                "images/images_210621.zip": "218f8b33e8fecec086aecef2477846c526e671e5",
                "responses_repeat_averaged/responses_210621.npy": "8e26c553450668aceb29a065c0bf7287ee5951ff",
            }
        ),
        pack={
            name: f"cowley2023 {{folder}}/images/images_{session}.zip --name {name} "
            "--split random --split-fractions 0.2 0"
            for session, name in _COWLEY_NAMES.items()
        },
        note="Single trials are fetched for session 210325 (v4_hvm640) alone. Sessions of one animal may share neurons "
        "and images. The commands hold out a fifth as val, as for the tables of README.",
    ),
    "majaj2015": Dataset(
        title="Majaj, Hong et al. 2015: macaque V4 and IT, multi-unit sites, HvM images (public part)",
        citation="Majaj, Hong, Solomon & DiCarlo 2015, Journal of Neuroscience 35(39), 13402-13418, "
        "doi:10.1523/JNEUROSCI.5181-14.2015; distributed by Brain-Score (Schrimpf et al. 2018, doi:10.1101/407007)",
        licence="no licence is stated with the files; cite both papers and ask their authors before passing them on",
        files=_brain_score(
            **{
                "assy_dicarlo_MajajHong2015_public.nc": "13d28ca0ce88ee550b54db3004374ae19096e9b9",
                "stimulus_hvm-public.csv": "5ca7a3da00d8e9c694a9cd725df5ba0ad6d735af",
                "stimulus_hvm-public.zip": "8aa44e038d7b551efa8077467622f9d48d72e473",
            }
        ),
        pack={
            "majaj2015": "brainio {folder}/assy_dicarlo_MajajHong2015_public.nc "
            "--stimuli {folder}/stimulus_hvm-public.csv --images {folder}/stimulus_hvm-public.zip"
        },
    ),
    "freemanziemba2013": Dataset(
        title="Freeman, Ziemba et al. 2013: macaque V1 and V2, single units, texture and noise (public part)",
        citation="Freeman, Ziemba, Heeger, Simoncelli & Movshon 2013, Nature Neuroscience 16, 974-981, "
        "doi:10.1038/nn.3402; distributed by Brain-Score (Schrimpf et al. 2018, doi:10.1101/407007)",
        licence="no licence is stated with the files; cite both papers and ask their authors before passing them on",
        files=_brain_score(
            **{
                "assy_movshon_FreemanZiemba2013_public.nc": "761c08f796db4e342555cdb60eef23a4f19ead43",
                "stimulus_FreemanZiemba2013_aperture-public.csv": "194c9b301a4e3e9cff02481d4c19b39331d52660",
                "stimulus_FreemanZiemba2013_aperture-public.zip": "3a6fec1fc28c212882d6833e267ea8654d289611",
            }
        ),
        pack={
            "freemanziemba2013": "brainio {folder}/assy_movshon_FreemanZiemba2013_public.nc "
            "--stimuli {folder}/stimulus_FreemanZiemba2013_aperture-public.csv "
            "--images {folder}/stimulus_FreemanZiemba2013_aperture-public.zip "
            "--time-bin 50 200"  # as Brain-Score does
        },
    ),
    "tvsd": Dataset(
        title="TVSD, THINGS ventral stream spiking dataset: macaque V1, V4 and IT, multi-unit activity",
        citation="Papale, Wang, Self & Roelfsema 2025, Neuron 113(4), 539-553, doi:10.1016/j.neuron.2024.12.003",
        licence="CC BY 4.0",
        files=tuple(
            RemoteFile(f"{_TVSD}monkey{monkey}/{name}", f"monkey{monkey}/{name}")
            for monkey in "FN"
            for name in ("THINGS_normMUA.mat", "_logs/things_imgs.mat")
        ),
        pack={
            f"tvsd-{monkey}": f"tvsd {{folder}}/monkey{monkey}/THINGS_normMUA.mat --images THINGS" for monkey in "FN"
        },
        note="The images are not included: download THINGS (Hebart et al. 2019) from "
        "https://things-initiative.org, under its own terms.",
    ),
    "it-course": Dataset(
        title="IT_data.h5 of the EPFL course NX-414: 168 sites of macaque IT, HvM images",
        citation="Majaj, Hong, Solomon & DiCarlo 2015, Journal of Neuroscience 35(39), 13402-13418, "
        "doi:10.1523/JNEUROSCI.5181-14.2015; prepared by the course NX-414 (EPFL)",
        licence="none is stated; it was handed out for the course",
        files=(RemoteFile(_DRIVE + "1s6caFNRpyR9m7ZM6XEv_e8mcXT3_PnHS", "IT_data.h5"),),
        pack={"it-course": "it-h5 {folder}/IT_data.h5"},
    ),
}
