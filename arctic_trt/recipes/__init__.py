"""What a command is asked to do, checked once at the boundary: flags over a YAML file over defaults, unknown keys refused."""

from arctic_trt.recipes.base import Recipe, read_yaml, resolve
from arctic_trt.recipes.build import BuildRecipe
from arctic_trt.recipes.evaluate import EvaluateRecipe
from arctic_trt.recipes.quantize import PlanRecipe, QuantizeRecipe
from arctic_trt.recipes.triton import TritonRecipe

__all__ = ["BuildRecipe", "EvaluateRecipe", "PlanRecipe", "QuantizeRecipe", "Recipe", "TritonRecipe", "read_yaml", "resolve"]
