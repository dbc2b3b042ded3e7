"""What a run is told and what it leaves: recipe, folder, checkpoints, log, TensorBoard, figures, exported files."""
