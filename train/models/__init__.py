"""Networks: backbones, readouts, losses and weights. Nothing here knows of processes."""
