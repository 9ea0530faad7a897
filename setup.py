"""All metadata is in pyproject.toml. The optional C++ and CUDA extension of csrc/ will be declared here."""

from setuptools import setup

setup()
