"""Names of the independent streams of random numbers: `default_rng([seed, stream, index])`."""

BODY, POSE, SCENE, NOISE, SITES, CALIBRATION = 1, 2, 3, 4, 5, 6
