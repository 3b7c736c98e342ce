"""Operations: machine and cluster checks (doctor), job submission, and lineage of results."""
