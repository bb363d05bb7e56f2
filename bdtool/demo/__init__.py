"""`bdtool demo`: the whole pipeline on real labelled images that an installed package ships."""

from bdtool.demo.tour import run_demo

__all__ = ["run_demo"]
