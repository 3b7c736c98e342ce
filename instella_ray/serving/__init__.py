"""Serving of the step engine on Ray Serve or in one process, with an HTTP API."""
