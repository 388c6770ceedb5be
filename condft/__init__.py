"""condft: teach a pre-trained LLM something new by training only its weights of low condition number.

`import condft` adds CondFT to PEFT's tables, so that `get_peft_model`, `PeftModel.from_pretrained` and transformers'
adapter methods know it. It does so when PEFT itself is imported, before or after, and imports nothing heavy by
itself: each public name imports what it needs when it is first used (PEP 562). The names are in `__init__.pyi`.
"""

import lazy_loader

from condft.runtime.import_hook import when_imported

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register() -> None:
    import condft.tuner  # noqa: F401  (registers itself)


when_imported("peft", _register)
