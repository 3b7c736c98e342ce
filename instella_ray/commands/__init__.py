"""The commands of `instella-ray`, one file each; `jobs/` runs those of a cluster as scripts."""
