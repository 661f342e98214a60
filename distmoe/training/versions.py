"""What is installed, as results and reports say it."""

import importlib.metadata

_PACKAGES = ("distmoe", "torch", "torchvision", "accelerate", "deepspeed", "ffcv", "numpy")


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that a run may use; None for what is not installed."""
    return {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
