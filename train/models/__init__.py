"""Networks: backbones, readouts, losses and weights; what they score, as ensembles too, and how they are handed on."""
