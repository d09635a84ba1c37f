"""Converting checkpoints between formats: planned, written whole, and read back before it counts.

`bitllm convert` and `bitllm quantize`, the study of dense checkpoints, without their command lines.
"""

from bitllm.convert.plan import FORMATS, Conversion, plan_conversion
from bitllm.convert.run import ConversionResult, run_conversion

__all__ = ["FORMATS", "Conversion", "ConversionResult", "plan_conversion", "run_conversion"]
