"""Making of data sets: images written as shards, and shards indexed and verified."""
