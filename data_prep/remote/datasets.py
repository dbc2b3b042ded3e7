"""Public recordings that data_prep/fetch.py downloads: their files, citations and licences, and how to pack them.

When a file moves, only this table has to change. Its facts are from the sites named in it.
"""

from dataclasses import dataclass
from typing import Literal

_BRAIN_SCORE = "https://brainscore-storage.s3.amazonaws.com/brainio-brainscore/"
_TVSD = "https://gin.g-node.org/paolo_papale/TVSD/raw/master/"
_DRIVE = "https://drive.google.com/uc?export=download&id="


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


DatasetName = Literal["majaj2015", "freemanziemba2013", "tvsd", "it-course"]

DATASETS: dict[DatasetName, Dataset] = {
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
