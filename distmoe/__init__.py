"""Mixture-of-Experts image classifiers, trained on one process or many."""
