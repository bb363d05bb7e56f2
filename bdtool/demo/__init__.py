"""`bdtool demo`: the whole pipeline on the shipped model and on pictures that the project draws."""

from bdtool.demo.tour import run_demo

__all__ = ["run_demo"]
