"""Shared by the sources: tables, response arrays, trials, image files, HDF5, NetCDF."""
