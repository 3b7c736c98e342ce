"""Jobs on machines of one's own: are those in order, how a job gets there, and where a result comes from."""
