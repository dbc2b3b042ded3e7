"""The images and the model neurons of the simulated recording."""
