"""Data: sources, prepared files, the plan of which sample goes where, loaders and augmentation."""
