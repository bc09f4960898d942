"""Memory and traffic of a training step on ranks that are not there, by the real code."""

from hf_veomni.dryrun.encoders import image_batch
from hf_veomni.dryrun.report import DryRun
from hf_veomni.dryrun.run import dry_run

__all__ = ["DryRun", "dry_run", "image_batch"]
