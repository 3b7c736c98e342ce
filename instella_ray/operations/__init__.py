"""What it takes to run jobs on machines of one's own: a job is packed, held against the cluster, sent and followed."""
