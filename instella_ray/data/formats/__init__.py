"""File formats: reading and writing shards, packed codes and images, and the parts and ledger of a job's output."""
