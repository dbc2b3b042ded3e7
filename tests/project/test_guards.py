"""There is no other way in: the whole source is walked for calls that would execute data, and for opens that are not
guarded; every setting has bounds."""

import ast
import importlib
from pathlib import Path
from typing import get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen
from helpers import ROOT
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from train.run.recipe import ProbeRecipe, Recipe
from train.sweeping.sweep_settings import SweepSettings

SOURCES = sorted(path for part in ("data_prep", "train", "spiketune", "launch") for path in (ROOT / part).rglob("*.py"))

# Calls that must not be, and the files that have a reason.
FORBIDDEN = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "input"), ()),
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "cloudpickle"), ()),
    **dict.fromkeys(("marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle", "pd.read_pickle"), ()),
    **dict.fromkeys(("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.save"), ()),
    **dict.fromkeys(("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.safe_load_all"), ()),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), ()),
    "np.fromfile": ("train/regression/rows.py",),  # scratch space of this run
    **dict.fromkeys(("numpy.fromfile", "xarray.open_dataset", "xr.open_dataset"), ()),
    **dict.fromkeys(("pandas.read_csv", "pd.read_csv", "pandas.read_parquet", "pd.read_parquet"), ()),
    **dict.fromkeys(("webdataset.WebDataset", "webdataset.gopen", "wds.WebDataset", "shutil.unpack_archive"), ()),
    "torch.export.load": ("train/run/predictor.py",),  # a program by its nature, which its first lines say
    "yaml.safe_load": ("train/distributed/launch_environment.py",),  # the configuration of the user's own launcher
    "yaml.SafeLoader": ("train/run/yaml_files.py",),
    "torch.load": ("train/models/weights.py", "train/models/timm_networks.py"),
    "h5py.File": (
        "data_prep/sources/files/hdf5.py",
        "train/evaluation/exporting/prediction_export.py",
    ),  # the latter writes
    "netcdf_file": ("data_prep/sources/files/netcdf.py",),
    "tarfile.open": ("data_prep/shards/members.py",),
    "zipfile.ZipFile": (
        "data_prep/common/safe_reading.py",
        "data_prep/sources/files/image_files.py",
        "train/models/weights.py",
        "train/evaluation/exporting/predictor_export.py",  # writes
    ),
    "Image.open": (
        "data_prep/common/image_decoding.py",
        "train/run/predictor.py",
        "train/run/tensorboard.py",
        "train/run/weights_and_biases.py",
    ),  # the last two: their figures
    # One reader for each format, which knows its bounds.
    "json.load": (),
    "json.loads": (
        "data_prep/common/safe_reading.py",
        "train/run/predictor.py",  # a file of its own, beside the program that it belongs to
        "train/distributed/roll_call.py",  # what the ranks of one run tell each other
        "train/sweeping/sweep_folder.py",  # what it has just written
    ),
    "csv.reader": ("data_prep/common/safe_reading.py",),
    "csv.DictReader": (),
    "read_text": (
        "data_prep/remote/downloader.py",  # the tag of a download, in the cache
        "train/data/free_memory.py",  # the kernel's
        "train/data/mapped_file.py",  # the kernel's
        "train/probing/stored_layers.py",  # scratch space of this run
        "train/reporting/page.py",  # shipped with the package
        "train/run/predictor.py",
        "train/sweep.py",  # the table that it has just written
        "train/sweeping/queue.py",  # heartbeats of this sweep's own workers
        "train/sweeping/supervised_process.py",
        "train/distributed/launch_environment.py",  # the configuration of the user's own launcher
    ),
    "read_bytes": (
        "train/evaluation/exporting/predictor_export.py",  # a file of this package
        "train/run/predictor.py",
    ),
    "model_validate_json": ("data_prep/shards/manifest.py", "train/run/checkpoint.py"),  # after parse_json
    "np.loadtxt": (),
    "np.genfromtxt": (),
    "np.load": (),
    "np.memmap": ("data_prep/common/safe_reading.py",),
    "load_file": ("train/run/checkpoint.py", "train/models/weights.py"),
    "pq.ParquetFile": ("data_prep/sources/responses/response_tables.py",),
    "pq.read_table": (),
}
# launch/ installs and starts the project: what it reads is the user's own.
NOT_IN_LAUNCH = ("json.loads", "read_text", "read_bytes")
METHODS = ("extractall", "extract", "extractfile", "decode_pickle")  # of archives, whatever they are called
MUST_SAY = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}


def name_of(node: ast.expr) -> str:
    """The dotted name `a.b.c` of a called function."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults_of(source: str, path: str) -> list[str]:
    """The unsafe calls of a file."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "pickletools"):
                faults.append(f"{path}:{node.lineno}: imports {name}")
        if not isinstance(node, ast.Call):
            continue
        call, keywords = name_of(node.func), {word.arg: word.value for word in node.keywords}
        where = f"{path}:{node.lineno}: {call}"
        known = next((key for key in (call, call.rpartition(".")[2]) if key in FORBIDDEN and key), None)
        if known == call.rpartition(".")[2] != call and known in ("compile", "input", "eval", "exec"):
            known = None  # re.compile, network.eval()
        if known in NOT_IN_LAUNCH and path.startswith("launch/"):
            known = None
        if known is not None and path not in FORBIDDEN[known]:
            faults.append(where)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            faults.append(where)
        if call in MUST_SAY:
            word, value = MUST_SAY[call]
            if not isinstance(keywords.get(word), ast.Constant) or keywords[word].value is not value:
                faults.append(f"{where} without {word}={value}")
        if "shell" in keywords and not (isinstance(keywords["shell"], ast.Constant) and not keywords["shell"].value):
            faults.append(f"{where} with a shell")
        if any(
            isinstance(word, ast.Constant) and word.value is True
            for name, word in keywords.items()
            if name == "allow_pickle"
        ):
            faults.append(f"{where} with pickles")
    return faults


def test_no_code_of_ours_executes_data_or_opens_files_unguarded():
    faults = [fault for path in SOURCES for fault in faults_of(path.read_text(), path.relative_to(ROOT).as_posix())]
    assert faults == []
    assert len(SOURCES) > 80


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "import pickle",
        "from pickle import loads",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "archive.extractall(folder)",
        "h5py.File(path)",
        "xarray.open_dataset(path)",
        "Image.open(path)",
        "tarfile.open(path)",
        "np.load(path, allow_pickle=False)",
        "np.memmap(path)",
        "np.genfromtxt(path)",
        "json.loads(path.read_text())",
        "json.loads(text)",
        "json.load(file)",
        "csv.reader(file)",
        "path.read_text()",
        "path.read_bytes()",
        "pd.read_csv(path)",
        "pq.ParquetFile(path)",
        "pq.read_table(path)",
    ],
)
def test_the_check_finds_unsafe_code(line):
    assert faults_of(line, "train/elsewhere.py")


def test_the_check_accepts_safe_code():
    assert faults_of("re.compile('a')\nnetwork.eval()\npath.open()\nparse_json('1')", "train/elsewhere.py") == []


# ---- settings ------------------------------------------------------------------------------------------------------


def settings_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting of a model, by its dotted name."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields |= settings_of(kind, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = field
    return fields


def commands() -> list[type[BaseModel]]:
    """The models of all command lines, but those of the recipes, which are recipes."""
    places = {
        "data_prep.pack": "Pack",
        "data_prep.show": "Show",
        "data_prep.fetch": "Fetch",
        "train.evaluation.options": "Evaluate",
        "train.planning.options": "Plan",
        "train.sweep": "SweepCommand",
    }
    return [getattr(importlib.import_module(module), name) for module, name in places.items()]


def numeric_without_bounds(model: type[BaseModel]) -> list[str]:
    odd = []
    for name, field in settings_of(model).items():
        one = get_origin(field.annotation) is not tuple  # the sources check windows and fractions together
        if not one or not {int, float} & {field.annotation, *get_args(field.annotation)}:
            continue
        kinds = {type(bound) for bound in field.metadata}
        if not (kinds & {Ge, Gt} and kinds & {Le, Lt}):
            odd.append(name)
    return odd


@pytest.mark.parametrize("model", [Recipe, ProbeRecipe, SweepSettings, *commands()], ids=lambda model: model.__name__)
def test_every_number_has_a_least_and_a_greatest_value(model):
    assert numeric_without_bounds(model) == []


@pytest.mark.parametrize("model", [Recipe, ProbeRecipe], ids=lambda model: model.__name__)
def test_every_text_of_a_recipe_has_a_greatest_length(model):
    for name, field in settings_of(model).items():
        if field.annotation in (str, str | None):
            marks = [
                *field.metadata,
                *(mark for part in field.metadata if isinstance(part, FieldInfo) for mark in part.metadata),
            ]
            assert any(isinstance(mark, MaxLen) for mark in marks) or "max_length" in str(field), name


def test_all_shipped_code_is_checked():
    assert {path.parts[len(ROOT.parts)] for path in SOURCES} == {"data_prep", "train", "spiketune", "launch"}
    assert Path("train/run/predictor.py") in {path.relative_to(ROOT) for path in SOURCES}
