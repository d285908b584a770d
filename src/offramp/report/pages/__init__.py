"""What a report shows of each kind of run: its figures and words as blocks, without any HTML."""

from offramp.report.pages.blocks import Page as Page
from offramp.report.pages.find import pages_of as pages_of
