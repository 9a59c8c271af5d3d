"""Contexts in files: `FileStorage` (`storage`), its layouts, and the folder, locks and flushes that they stand on."""

from .storage import FileStorage as FileStorage
