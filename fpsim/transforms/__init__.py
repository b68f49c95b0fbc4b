"""Transforms: changes of tensors before they are rounded, which products or casts undo exactly."""
