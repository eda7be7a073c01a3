"""Shared fixtures. The repository root goes on sys.path so that tests import `common` like a recipe does."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
