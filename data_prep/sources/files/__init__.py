"""Shared by the sources: tables, trials, image files, HDF5, NetCDF."""
