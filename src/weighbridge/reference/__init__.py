"""Reference bundles: recorded runs of the original weights, and of variants, for every probe of a pool."""
