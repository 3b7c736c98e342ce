"""One small file a metric; all of them merge over shards and give intervals (see :mod:`.base`)."""
