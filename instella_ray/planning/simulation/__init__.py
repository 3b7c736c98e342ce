"""Discrete-event simulation of the serving graph and of the way from pictures to trained weights. No Ray here."""
