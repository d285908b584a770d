"""Policies that keep a promise: losses from a task's metrics, a grid of settings, and a certificate.

`offramp.risk` has the mathematics; here it meets models, tasks and files.
"""

from offramp.calibration.calibrate import ORDERS as ORDERS
from offramp.calibration.calibrate import calibrate as calibrate
from offramp.calibration.certificate import Certificate as Certificate
from offramp.calibration.certificate import load as load
from offramp.calibration.drift import Drift as Drift
from offramp.calibration.grid import GAINS as GAINS
from offramp.calibration.grid import SHARES as SHARES
from offramp.calibration.grid import THRESHOLDS as THRESHOLDS
from offramp.calibration.grid import Grid as Grid
from offramp.calibration.grid import Setting as Setting
from offramp.calibration.grid import settings_of as settings_of
from offramp.calibration.layer_thresholds import layer_thresholds as layer_thresholds
from offramp.calibration.posterior import PosteriorConfig as PosteriorConfig
from offramp.calibration.posterior import fit_posterior as fit_posterior
from offramp.calibration.posterior_report import PosteriorReport as PosteriorReport
from offramp.calibration.promise import KINDS as KINDS
from offramp.calibration.promise import MEASURES as MEASURES
from offramp.calibration.promise import Promise as Promise
from offramp.calibration.promise import Spent as Spent
from offramp.calibration.result import Calibration as Calibration
from offramp.calibration.validate import Validation as Validation
from offramp.calibration.validate import validate as validate
