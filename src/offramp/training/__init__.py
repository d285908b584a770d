"""Training exits: what for (`objectives`), on what (`data`), how (`trainer`)."""

from offramp.runs.folder import TrainingError as TrainingError
from offramp.training.answers import AnswerConfig as AnswerConfig
from offramp.training.answers import answer_documents as answer_documents
from offramp.training.config import WEIGHTS as WEIGHTS
from offramp.training.config import TrainConfig as TrainConfig
from offramp.training.data import Data as Data
from offramp.training.data import prepare as prepare
from offramp.training.data import read_texts as read_texts
from offramp.training.data import text_documents as text_documents
from offramp.training.frequent import frequent_tokens as frequent_tokens
from offramp.training.objectives import OBJECTIVES as OBJECTIVES
from offramp.training.placement import Placement as Placement
from offramp.training.placement import placed as placed
from offramp.training.precision import fast_precision as fast_precision
from offramp.training.trainer import TrainResult as TrainResult
from offramp.training.trainer import train as train
