"""Students that learn from teachers, with early readouts that watch them, judged group by group."""

from offramp.distillation.config import Run as Run
from offramp.distillation.config import Study as Study
from offramp.distillation.config import runs as runs
from offramp.distillation.data import DataConfig as DataConfig
from offramp.distillation.grid import run_grid as run_grid
from offramp.distillation.instance_weights import InstanceWeights as InstanceWeights
from offramp.distillation.language_models import TokenDistillation as TokenDistillation
from offramp.distillation.language_models import distil as distil
from offramp.distillation.methods import METHODS as METHODS
from offramp.distillation.methods import Method as Method
from offramp.distillation.methods import method as method
from offramp.distillation.networks import Network as Network
from offramp.distillation.readout import ReadoutConfig as ReadoutConfig
from offramp.distillation.readout import TokenReadoutConfig as TokenReadoutConfig
from offramp.distillation.texts import OwnAnswers as OwnAnswers
from offramp.distillation.token_report import TokenDistillResult as TokenDistillResult
from offramp.distillation.token_weights import TokenWeights as TokenWeights
