"""Mixtures of experts on one device: gates, dispatch, experts, layers, losses. Knows nothing of other processes."""
