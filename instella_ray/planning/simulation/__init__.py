"""Discrete-event simulation of the serving graph and of the way from images to trained weights. No Ray here."""
