"""Published numbers, for reference: none of them was measured here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A row of the study's Table I.

    Attributes:
        row: of train/study.py, which runs the same system.
        family, model: as the study calls them.
        r2, mse, explained_variance: as printed there.
    """

    row: str
    family: str
    model: str
    r2: str
    mse: str
    explained_variance: str


SOURCE = (
    "Benquet and Reategui, Mini-project report: Predicting IT neural activity (EPFL, NX-414), Table I: macaque IT, 168 "
    "sites, 288 validation stimuli, which also selected the models"
)
SITES, STIMULI = 168, 288  # that it scored
TABLE = (
    Published("pixels_linear", "Linear regression", "Linear regression + PCA", "-0.090", "0.149", "-0.086"),
    Published("pixels_ridge", "Linear regression", "Ridge regression + PCA", "-0.090", "0.149", "-0.086"),
    Published("resnet50_random", "Task-driven", "Random ResNet-50, layer 3", "0.133", "0.116", "0.137"),
    Published("resnet50_frozen", "Task-driven", "Pre-trained ResNet-50, layer 3", "0.401", "0.0784", "0.404"),
    Published("cnn2", "Data-driven", "2-layers CNN", "-1.523", "0.1264", "-1.502"),
    Published("cnn3", "Data-driven", "3-layers CNN", "-1.097", "0.142", "-1.074"),
    Published("resnet152_whole", "Data-driven", "ResNet-152 (the study's own)", "0.440", "0.063", "0.453"),
    Published("densenet169_frozen", "Task-driven", "DenseNet-169 (the study's own)", "0.422", "0.0721", "0.424"),
)
