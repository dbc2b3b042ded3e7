"""Files behind URLs: transports, downloads, the cache; public data sets."""
