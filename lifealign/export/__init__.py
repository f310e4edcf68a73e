"""Hand over what a run made: a plain PEFT adapter or merged weights, a model card, and proof that it loads again."""

from lifealign.export.folder import export

__all__ = ["export"]
