"""Synthetic scenes: drawn pictures of coloured shapes with text that is true or false of them by construction.

`world` samples and draws scenes, `language` says things about them and knows whether a statement is true,
`tables` writes the Arrow files of every task. Nothing here knows about models or tokenizers.
"""

from meter_fast.data.scenes.language import WORD_KINDS
from meter_fast.data.scenes.tables import write_scenes

__all__ = ["WORD_KINDS", "write_scenes"]
