"""The images of the simulated recording."""
