"""The version of this package; `setup.cfg` reads it here, so that it needs no installed metadata."""

__version__ = "0.1.0"
