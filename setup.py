"""Everything declarative is in pyproject.toml; this file lets `python setup.py` and old installers work."""

from setuptools import setup

setup()
