"""Token shards, the order samples are read in, and the loader, which alone needs torch."""
