"""Everything that touches Transformers: reading a model, patching it, saving the patch with it."""
