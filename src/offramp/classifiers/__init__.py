"""Classifiers of texts and images that stop computing where they are sure enough."""

from offramp.classifiers.batches import IMAGENET as IMAGENET
from offramp.classifiers.batches import Augmentation as Augmentation
from offramp.classifiers.batches import Batch as Batch
from offramp.classifiers.batches import ImagePreprocessing as ImagePreprocessing
from offramp.classifiers.batches import ImageRows as ImageRows
from offramp.classifiers.batches import TextRows as TextRows
from offramp.classifiers.batches import in_order as in_order
from offramp.classifiers.classifier import Classification as Classification
from offramp.classifiers.classifier import EarlyExitClassifier as EarlyExitClassifier
from offramp.classifiers.confidence import CONFIDENCES as CONFIDENCES
from offramp.classifiers.config import ClassifierTrainConfig as ClassifierTrainConfig
from offramp.classifiers.heads import ExitOutput as ExitOutput
from offramp.classifiers.heads import HeadConfig as HeadConfig
from offramp.classifiers.msdnet import MSDNet as MSDNet
from offramp.classifiers.msdnet import MSDNetConfig as MSDNetConfig
from offramp.classifiers.outputs import collect as collect
from offramp.classifiers.outputs import load_outputs as load_outputs
from offramp.classifiers.outputs import save_outputs as save_outputs
from offramp.classifiers.saving import load as load
from offramp.classifiers.trainer import ClassifierTrainResult as ClassifierTrainResult
from offramp.classifiers.trainer import train_classifier as train_classifier
