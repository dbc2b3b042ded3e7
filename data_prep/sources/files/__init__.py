"""What the sources share: tables, response arrays, trials, image files, HDF5, NetCDF."""
