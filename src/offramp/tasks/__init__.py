"""What models are asked: `task` says how, `examples` reads what, `encoding` turns both into tokens."""

from offramp.tasks.examples import read_examples as read_examples
from offramp.tasks.examples import split_groups as split_groups
from offramp.tasks.examples import take as take
from offramp.tasks.task import TASKS as TASKS
from offramp.tasks.task import Example as Example
from offramp.tasks.task import Pair as Pair
from offramp.tasks.task import Task as Task
from offramp.tasks.task import fit as fit
from offramp.tasks.task import shorten as shorten
from offramp.tasks.task import task_documents as task_documents
