"""minq: why transformers quantize badly, and two small changes to attention that cure it.

Read in this order: attention.py -> model.py -> quant.py -> outliers.py.
"""
__version__ = "0.1.0"
