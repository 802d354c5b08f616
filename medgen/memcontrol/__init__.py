"""Fine-tuning that memorises less (MemControl, arXiv 2405.19458): which attention layers to adapt, and how fast, is searched for.

`search` minimises memorisation and the loss of quality at once over binary masks, `train` fine-tunes with a chosen mask, `report` draws
the front beside the usual ways of fine-tuning; `dp` fine-tunes with a guarantee instead (differential privacy).
"""
