"""ONNX graphs of a pipeline, and the pipeline that runs them."""

from .onnx_graphs import export_onnx
from .onnx_pipeline import load_onnx_pipeline

__all__ = ["export_onnx", "load_onnx_pipeline"]
