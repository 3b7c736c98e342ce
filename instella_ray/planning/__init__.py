"""What a run will need and how a cluster will do, told before either is begun."""
