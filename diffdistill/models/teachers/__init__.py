"""Families of diffusers pipelines: one adapter each, and nothing about a family outside its file."""

from diffdistill.models.teachers.family import Family
from diffdistill.models.teachers.pipeline import Pipeline, is_pipeline, load_pipeline, open_pipeline, pipeline_of
from diffdistill.models.teachers.registry import FAMILIES, detect_family, find_family

__all__ = [
    "FAMILIES",
    "Family",
    "Pipeline",
    "detect_family",
    "find_family",
    "is_pipeline",
    "load_pipeline",
    "open_pipeline",
    "pipeline_of",
]
