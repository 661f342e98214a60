"""Benchmarks: each measures the system beside its peer in one run, and reports medians with their intervals."""
