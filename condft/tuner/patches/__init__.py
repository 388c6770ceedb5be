"""Changes to other libraries' behavior, and workarounds for it: the reason, and the version that makes it necessary.

Nothing here imports the rest of the tuner: a patch gets the classes and functions of CondFT that it needs as
arguments, from `condft.tuner` or from the module that calls it. The test of each patch also shows the behavior without
it, so it fails when a new version of the library no longer needs the patch.

| module | library | why |
| --- | --- | --- |
| `peft_type` | PEFT 0.21 | a method from outside cannot be registered |
| `hotswap` | PEFT 0.21 | `hotswap_adapter` supports LoRA only |
| `load_adapter` | PEFT 0.21 | an adapter's values can be replaced by those of other units |
| `encoder_fast_path` | torch 2.13 | `nn.TransformerEncoder` reads weights without calling the wrapper's forward |
| `meta_parameters` | accelerate 1.15 | optimizers lose their parameters when FSDP2 shards a model on the meta device |
"""
