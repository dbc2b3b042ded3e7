"""Files behind URLs: reading, downloading, keeping; public data sets."""
