"""Quality and cost of exit policies on tasks: records of every example, summaries with intervals, run folders."""

from offramp.evaluation.arms import FULL as FULL
from offramp.evaluation.arms import document_arms as document_arms
from offramp.evaluation.arms import grid as grid
from offramp.evaluation.arms import static_arms as static_arms
from offramp.evaluation.arms import static_sweep as static_sweep
from offramp.evaluation.arms import sweep_layers as sweep_layers
from offramp.evaluation.evaluate import evaluate as evaluate
from offramp.evaluation.evaluate import evaluate_perplexity as evaluate_perplexity
from offramp.evaluation.evaluate import records_of as records_of
from offramp.evaluation.perplexity import Passage as Passage
from offramp.evaluation.perplexity import read_passages as read_passages
from offramp.evaluation.record_file import Record as Record
from offramp.evaluation.record_file import read_records as read_records
from offramp.evaluation.result import Evaluation as Evaluation
from offramp.evaluation.summary import ArmSummary as ArmSummary
from offramp.evaluation.summary import summarise as summarise
