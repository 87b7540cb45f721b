"""The stages of a quantization, in order. The run, the memory check and the dry run iterate over this list."""

from gyroquant.pipeline.stages.allocate import Allocate
from gyroquant.pipeline.stages.base import RunContext, Shortage, Stage
from gyroquant.pipeline.stages.compare import Compare
from gyroquant.pipeline.stages.external_solver import RunExternalSolver
from gyroquant.pipeline.stages.finetune import Finetune
from gyroquant.pipeline.stages.guide import Guide
from gyroquant.pipeline.stages.learn import Learn
from gyroquant.pipeline.stages.measure import Measure
from gyroquant.pipeline.stages.prove import Prove
from gyroquant.pipeline.stages.quantize import Quantize
from gyroquant.pipeline.stages.save import Save
from gyroquant.pipeline.stages.windows import Windows

STAGES: tuple[Stage, ...] = (
    Compare(),
    Windows(),
    Measure(),
    Learn(),
    Prove(),
    Allocate(),
    Guide(),
    RunExternalSolver(),
    Quantize(),
    Save(),
    Finetune(),
)

__all__ = ["STAGES", "RunContext", "Shortage", "Stage"]
