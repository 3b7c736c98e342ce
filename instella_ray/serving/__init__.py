"""Serving: the graph around the step engine, on Ray Serve or in one process, and its HTTP API."""
